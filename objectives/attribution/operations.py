"""Operations of a canonical network whose backward pass propagates relevance instead of gradients.

Between hooked convolutions and dense layers, zennit's "gradient" is the relevance (design of zennit: Anders et al.
2021). The operations here give every other step of a network its rule by an autograd function of its own, so that no
hook is needed and every version of zennit behaves alike (attention has a module of its own):

=====================  ============================================================================
activation             relevance passes unchanged (the `Pass` rule)
average pooling        in proportion to the contributions (the `Norm` rule)
residual sum           in proportion to the summands (the `Norm` rule)
constant gate          all relevance goes to the gated features, none to the gate
constant sum           in proportion to the summands; the constant (a position embedding) keeps its share
constant tokens        the constant (a class token) keeps what relevance it receives
layer norm             a linear map whose standard deviation is held constant, by the Epsilon rule
=====================  ============================================================================

Within `plain_gradients` none of these rules holds: the backward pass is the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import stabilize

__all__ = [
    "Activation",
    "AveragePool",
    "ConstantGate",
    "ConstantSum",
    "ConstantTokens",
    "LayerNorm",
    "Operation",
    "ResidualSum",
    "STABILIZER",
    "plain_gradients",
]

STABILIZER = 1e-6
"""Added to every denominator with its sign, as zennit's rules do by default."""


class _Ruled(nn.Module):
    """A step with a relevance rule.

    Attributes:
        is_plain: whether gradients pass instead, set by `plain_gradients`.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.is_plain = False


@contextmanager
def plain_gradients(module: nn.Module) -> Iterator[None]:
    """Has every operation of a network pass gradients instead of relevance while the block lasts.

    Attention does so without a rule, as do layers without hooks.
    """
    operations = [child for child in module.modules() if isinstance(child, _Ruled)]
    before = [operation.is_plain for operation in operations]
    try:
        for operation in operations:
            operation.is_plain = True
        yield
    finally:
        for operation, own in zip(operations, before, strict=True):
            operation.is_plain = own


class Operation(_Ruled):
    """One ATen operator applied to its tensor inputs with fixed further arguments.

    Args:
        operator: the ATen overload.
        arguments: positional arguments after the tensor inputs.
        keywords: keyword arguments.
    """

    def __init__(
        self, operator: Callable[..., Tensor], arguments: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.operator = operator
        self.arguments = tuple(arguments)
        self.keywords = dict(keywords or {})

    def apply_operator(self, *inputs: Tensor) -> Tensor:
        """The plain operation, without any relevance rule."""
        return self.operator(*inputs, *self.arguments, **self.keywords)

    def extra_repr(self) -> str:
        """Shows the operator in `print(network)`."""
        return ", ".join([str(self.operator), *map(str, self.arguments)])


class Activation(Operation):
    """An elementwise nonlinearity; relevance passes through it unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` and the result are of any equal shape."""
        if self.is_plain:
            return self.apply_operator(x)
        output: Tensor = _PassFunction.apply(x, self)
        return output


class AveragePool(Operation):
    """An average over space; relevance is shared in proportion to the averaged values."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` is (N, C, H, W)."""
        if self.is_plain:
            return self.apply_operator(x)
        output: Tensor = _NormFunction.apply(x, self)
        return output


class ResidualSum(Operation):
    """The sum of two branches; relevance is shared in proportion to the summands."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Both summands are of one shape."""
        if self.is_plain:
            return left + right
        output: Tensor = _SumFunction.apply(left, right)
        return output


class ConstantGate(Operation):
    """Features multiplied by a gate that counts as a constant (squeeze-and-excite)."""

    def forward(self, features: Tensor, gate: Tensor) -> Tensor:
        """`features` is (N, C, H, W), `gate` broadcasts to it."""
        if self.is_plain:
            return features * gate
        output: Tensor = _GateFunction.apply(features, gate.detach())
        return output


class ConstantSum(_Ruled):
    """Tokens plus a constant, such as a position embedding.

    Args:
        constant: (1, tokens, channels).
    """

    constant: Tensor

    def __init__(self, constant: Tensor) -> None:
        super().__init__()
        self.register_buffer("constant", constant.clone())

    def forward(self, x: Tensor) -> Tensor:
        """`x` is (N, tokens, channels)."""
        if self.is_plain:
            return x + self.constant
        output: Tensor = _ConstantSumFunction.apply(x, self.constant)
        return output


class ConstantTokens(nn.Module):
    """Constant tokens before those of the image.

    Args:
        tokens: (1, constant tokens, channels).
    """

    tokens: Tensor

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens.clone())

    def forward(self, x: Tensor) -> Tensor:
        """`x` is (N, tokens, channels)."""
        return torch.cat([self.tokens.expand(len(x), -1, -1), x], dim=1)


class LayerNorm(_Ruled, nn.LayerNorm):
    """Layer norm over the last dimension, or over equal parts of it (each head's own)."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` is (..., parts * normalized)."""
        if self.is_plain:
            return self.plain(x)
        output: Tensor = _LayerNormFunction.apply(x, self)
        return output

    def inverse_deviation(self, x: Tensor) -> Tensor:
        """One over the standard deviation, (..., parts, 1)."""
        inverse: Tensor = (self.parts(x).var(dim=-1, correction=0, keepdim=True) + self.eps).rsqrt()
        return inverse

    def relevance(self, x: Tensor, output: Tensor, relevance: Tensor, inverse: Tensor | None = None) -> Tensor:
        """Relevance of the inputs (rows * N, ...) from that of the outputs; `inverse_deviation` may be given."""
        if inverse is None:
            inverse = self.inverse_deviation(x)
        share = relevance.unflatten(0, (-1, len(x))) / stabilize(output, STABILIZER)
        share = self.parts(share) * inverse
        if self.weight is not None:
            share = share * self.weight.detach()
        share = share - share.mean(dim=-1, keepdim=True)
        result: Tensor = share.flatten(-2) * x
        return result.flatten(0, 1)

    def parts(self, x: Tensor) -> Tensor:
        """(..., parts * normalized) -> (..., parts, normalized)."""
        size = self.normalized_shape[0]
        parts: Tensor = x.unflatten(-1, (x.shape[-1] // size, size))
        return parts

    def plain(self, x: Tensor) -> Tensor:
        """The plain operation, without any relevance rule."""
        return super().forward(self.parts(x)).flatten(-2)


class _PassFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, operation: Operation) -> Tensor:
        return operation.apply_operator(x)

    @staticmethod
    def backward(ctx: Any, *relevances: Tensor) -> tuple[Tensor, None]:
        return relevances[0], None


class _NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, operation: Operation) -> Tensor:
        ctx.operation = operation
        ctx.save_for_backward(x)
        return operation.apply_operator(x)

    @staticmethod
    def backward(ctx: Any, *relevances: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            output = ctx.operation.apply_operator(x)
            (gradient,) = torch.autograd.grad(output, x, relevances[0] / stabilize(output.detach(), STABILIZER))
        return x.detach() * gradient, None


class _SumFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return left + right

    @staticmethod
    def backward(ctx: Any, *relevances: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        share = relevances[0] / stabilize(left + right, STABILIZER)
        return left * share, right * share


class _GateFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, gate: Tensor) -> Tensor:
        return features * gate

    @staticmethod
    def backward(ctx: Any, *relevances: Tensor) -> tuple[Tensor, None]:
        return relevances[0], None


class _ConstantSumFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, constant: Tensor) -> Tensor:
        ctx.save_for_backward(x, constant)
        return x + constant

    @staticmethod
    def backward(ctx: Any, *relevances: Tensor) -> tuple[Tensor, None]:
        x, constant = ctx.saved_tensors
        return x * relevances[0] / stabilize(x + constant, STABILIZER), None


class _LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: LayerNorm) -> Tensor:
        output = norm.plain(x)
        ctx.norm = norm
        ctx.save_for_backward(x, output)
        return output

    @staticmethod
    def backward(ctx: Any, *relevances: Tensor) -> tuple[Tensor, None]:
        return ctx.norm.relevance(*ctx.saved_tensors, relevances[0]), None
