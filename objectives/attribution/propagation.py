"""Propagation: how each step of a canonical network gives the relevance of its output to its inputs, on one batch.

A step keeps what it needs of the batch's forward pass, so relevances of many composites pass through it, stacked along
the batch dimension: a relevance is (rows * N, ...) for N images, sample by sample within each row.

With a the inputs, z = f(a, W) + b the outputs of a layer, a+ = max(a, 0), a- = min(a, 0) and T the transposed layer,

===============  ====================================================================================================
Epsilon          R_in = a T(R / z, W)
ZPlus            R_in = a+ T(R / z+, W+) + a- T(R / z+, W-)
AlphaBeta        R_in = a+ (T(alpha R / z+, W+) - T(beta R / z-, W-)) + a- (T(alpha R / z+, W-) - T(beta R / z-, W+))
Gamma            R_in = a T((1 + gamma/2) (P + N), W) + |a| T(gamma/2 (P - N), |W|),
                 P = R / (z + gamma z+) where z > 0 and N = R / (z + gamma z-) where z < 0, else 0
===============  ====================================================================================================

where z+ = f(a+, W+) + f(a-, W-) + b+, z- = f(a+, W-) + f(a-, W+) + b-, and every denominator is stabilized. These are
zennit's definitions. In Gamma, a+ W+ + a- W- is written as (a W + |a| |W|) / 2, and a+ W- + a- W+ with a minus, which
needs two transposed layers instead of four; ZPlus and AlphaBeta would lose digits that way where z+ or z- is small.
Where inputs are never negative the terms of a- vanish; Gamma then needs one transposed layer, with W + gamma W+, if
relevance is zero wherever z isn't positive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from objectives.attribution.attention import AttentionProduct, AttentionScores, AttentionWeights
from objectives.attribution.operations import STABILIZER, Activation, ConstantGate, ConstantSum, LayerNorm, ResidualSum
from objectives.attribution.plan import Plan
from objectives.attribution.stacks import times
from objectives.steps import RESHAPES
from search_spaces.rules import RuleSpec

__all__ = ["Batch", "LinearStep", "Rule", "Step"]

Rule = RuleSpec | str | None
"""A layer's rule, the name of attention's, or none."""


class Step(Protocol):
    """One step of a forward pass on N images."""

    def propagate(self, relevance: Tensor, rule: Rule) -> tuple[Tensor | None, ...]:
        """The relevance of each input; None for one that has none.

        Args:
            relevance: of the output, (rows * N, ...); it isn't changed.
            rule: of the layer or of attention; None for other steps.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One forward pass of a canonical network, ready for relevance.

    Attributes:
        plan: of the network.
        steps: of the nodes in `plan.wanted` that pass relevance on.
        logits: (N, classes).
    """

    plan: Plan
    steps: dict[fx.Node, Step]
    logits: Tensor

    @classmethod
    def of(cls, plan: Plan, images: Tensor) -> Batch:
        """Runs the network on images (N, C, H, W)."""
        return _Forward(plan).run(images)

    def propagate(self, node: fx.Node, relevance: Tensor, rule: Rule) -> Sequence[tuple[fx.Node, Tensor]]:
        """The relevance that a node gives each of its sources that has any."""
        if node not in self.steps:
            return ()
        shares = zip(self.plan.sources(node), self.steps[node].propagate(relevance, rule), strict=True)
        return tuple((source, share) for source, share in shares if share is not None)


class _Forward:
    """One forward pass; what no later step reads is let go."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.values: dict[fx.Node, Any] = {}
        self.steps: dict[fx.Node, Step] = {}

    def run(self, images: Tensor) -> Batch:
        readers = {node: len(node.users) for node in self.plan.module.graph.nodes}
        for node in self.plan.module.graph.nodes:
            match node.op:
                case "placeholder":
                    self.values[node] = images
                case "get_attr":
                    self.values[node] = getattr(self.plan.module, str(node.target))
                case "output":
                    break
                case _:
                    self.values[node] = self._run(node)
            for source in node.all_input_nodes:
                readers[source] -= 1
                if not readers[source]:
                    del self.values[source]
        return Batch(self.plan, self.steps, self.values[self.plan.logits])

    def _run(self, node: fx.Node) -> Any:
        arguments: Any
        arguments, keywords = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        function: Any = node.target
        if node.op == "call_module":
            function = self.plan.module.get_submodule(str(node.target))
        sources = self.plan.sources(node) if node in self.plan.wanted else ()
        if not sources:
            return function(*arguments, **keywords)
        if node.target in RESHAPES:
            self.steps[node] = _Reshape.of(arguments[0])
        elif isinstance(function, Activation):
            self.steps[node] = _Passage()
        elif isinstance(function, ConstantGate):
            self.steps[node] = _Gate(arguments[0].shape)
        elif isinstance(function, ResidualSum):
            output, self.steps[node] = function(*arguments), _Shares.of(*arguments, wanted=self._wanted(node))
            return output
        elif isinstance(function, LayerNorm):
            output = function.plain(*arguments)
            self.steps[node] = _Norm(function, arguments[0], output, function.inverse_deviation(arguments[0]))
            return output
        elif isinstance(function, ConstantSum):
            output, self.steps[node] = function(*arguments), _Shares.of_constant(arguments[0], function.constant)
            return output
        elif isinstance(function, AttentionWeights):
            scores = AttentionScores.of(function, *arguments)
            self.steps[node] = _Weights(scores)
            return scores.weights
        elif isinstance(function, AttentionProduct):
            output = function.plain(*arguments)
            self.steps[node] = _Product(function, arguments[0], arguments[1], output)
            return output
        elif isinstance(function, nn.Conv2d | nn.Linear):
            (source,) = sources
            output = function(*arguments)
            never_negative, silent = source in self.plan.non_negative, node in self.plan.silent
            self.steps[node] = LinearStep(function, arguments[0], output, never_negative, silent)
            return output
        else:
            recorded = _Recorded.of(function, arguments, keywords, wanted=self._wanted(node))
            self.steps[node] = recorded
            return recorded.output.detach()
        return function(*arguments, **keywords)

    def _wanted(self, node: fx.Node) -> list[bool]:
        """Of each tensor that a node reads, whether its relevance is needed."""
        read: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), read.append)
        return [source in self.plan.wanted for source in read if "shape" in source.meta]


@dataclass(frozen=True, slots=True, eq=False)
class LinearStep:
    """A convolution or dense layer.

    Attributes:
        layer: with weight W and bias b.
        inputs: a, (N, ...).
        outputs: z, (N, ...).
        never_negative: whether a never is.
        silent: whether relevance is zero wherever z isn't positive.
    """

    layer: nn.Conv2d | nn.Linear
    inputs: Tensor
    outputs: Tensor
    never_negative: bool = False
    silent: bool = False
    _sums: dict[bool, Tensor] = field(default_factory=dict)

    def propagate(self, relevance: Tensor, rule: Rule) -> tuple[Tensor, ...]:
        """See `Step.propagate`."""
        assert isinstance(rule, RuleSpec)
        parameters = rule.parameters
        match rule.name:
            case "Epsilon":
                share = times(relevance, _reciprocal(self.outputs, parameters["epsilon"]))
                return (self._weighed(self._transposed(share, self._weight)),)
            case "ZPlus":
                return (self._positive_part(times(relevance, _reciprocal(self.contributions(positive=True)))),)
            case "AlphaBeta":
                return (self._alpha_beta(relevance, parameters["alpha"], parameters["beta"]),)
            case "Gamma":
                return (self._gamma(relevance, parameters["gamma"]),)
            case _:
                raise ValueError(f"`rule` must be one that this step knows, but got {rule=}.")

    def contributions(self, *, positive: bool) -> Tensor:
        """z+ or z-: the sums of all positive or all negative contributions, bias included; kept once computed."""
        if positive not in self._sums:
            same, other = (self._rises, self._falls) if positive else (self._falls, self._rises)
            bias = self.layer.bias
            if bias is not None:
                bias = bias.clamp(min=0) if positive else bias.clamp(max=0)
            if self.never_negative:
                total = self._applied(self.inputs, same(), bias)
            else:
                total = self._applied(self.inputs.clamp(min=0), same(), bias)
                total += self._applied(self.inputs.clamp(max=0), other(), None)
            self._sums[positive] = total
        return self._sums[positive]

    def _positive_part(self, share: Tensor) -> Tensor:
        relevance = self._weighed(self._transposed(share, self._rises()), 1)
        return (
            relevance
            if self.never_negative
            else relevance.add_(self._weighed(self._transposed(share, self._falls()), -1))
        )

    def _alpha_beta(self, relevance: Tensor, alpha: float, beta: float) -> Tensor:
        above = times(relevance, alpha * _reciprocal(self.contributions(positive=True)))
        if not beta:
            return self._positive_part(above)
        below = times(relevance, -beta * _reciprocal(self.contributions(positive=False)))
        rises, falls = self._rises(), self._falls()
        result = self._weighed(self._transposed(above, rises).add_(self._transposed(below, falls)), 1)
        if self.never_negative:
            return result
        return result.add_(self._weighed(self._transposed(above, falls).add_(self._transposed(below, rises)), -1))

    def _gamma(self, relevance: Tensor, gamma: float) -> Tensor:
        rising = self.contributions(positive=True)
        if self.silent and self.never_negative:
            share = times(relevance, _reciprocal(torch.add(self.outputs, rising, alpha=gamma)))
            return self._weighed(self._transposed(share, self._weight + gamma * self._rises()))
        sign = self.outputs.sign()
        chosen = rising * sign.clamp(min=0)
        if not self.silent:
            chosen -= self.contributions(positive=False) * sign.clamp(max=0)
        size = _reciprocal(torch.add(self.outputs, chosen, alpha=gamma)).mul_(sign)  # of P and of -N
        folded = times(relevance, size * (gamma / 2))
        plain = times(relevance, size.mul_(sign).mul_(1 + gamma / 2))
        result = self._weighed(self._transposed(plain, self._weight))
        return result.add_(times(self._transposed(folded, self._weight.abs()), self.inputs.abs(), in_place=True))

    @property
    def _weight(self) -> Tensor:
        return self.layer.weight.detach()

    def _rises(self) -> Tensor:
        return self._weight.clamp(min=0)

    def _falls(self) -> Tensor:
        return self._weight.clamp(max=0)

    def _weighed(self, transposed: Tensor, sign: int = 0) -> Tensor:
        """`transposed` times a, a+ (`sign` 1) or a- (`sign` -1); it is overwritten."""
        inputs = self.inputs
        if sign and not self.never_negative:
            inputs = inputs.clamp(min=0) if sign > 0 else inputs.clamp(max=0)
        return times(transposed, inputs, in_place=True)

    def _applied(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return nn.functional.linear(inputs, weight, bias)
        return nn.functional.conv2d(inputs, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    def _transposed(self, share: Tensor, weight: Tensor) -> Tensor:
        """T: the vector-Jacobian product of the layer with a weight."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return share @ weight
        strides, dilations = _pair(layer.stride), _pair(layer.dilation)
        extents = [dilation * (size - 1) for dilation, size in zip(dilations, layer.kernel_size, strict=True)]
        match layer.padding:
            case "valid":
                paddings = [0, 0]
            case "same":  # an odd row or column more is at the end, see `missing`
                paddings = [extent // 2 for extent in extents]
            case _:
                paddings = list(_pair(layer.padding))
        wanted = self.inputs.shape[2:]
        reached = [
            (size - 1) * stride - 2 * padding + extent + 1
            for size, stride, padding, extent in zip(share.shape[2:], strides, paddings, extents, strict=True)
        ]
        # Rows and columns that the stride left unread, or that stand in the padding's odd one.
        missing = [max(want - reach, 0) for want, reach in zip(wanted, reached, strict=True)]
        result = nn.functional.conv_transpose2d(
            share, weight, None, strides, paddings, missing, layer.groups, dilations
        )
        return result[:, :, : wanted[0], : wanted[1]]


@dataclass(frozen=True, slots=True, eq=False)
class _Passage:
    """An activation: relevance passes unchanged."""

    def propagate(self, relevance: Tensor, rule: Rule) -> tuple[Tensor, ...]:
        return (relevance,)


@dataclass(frozen=True, slots=True, eq=False)
class _Reshape:
    """Another arrangement of the same values."""

    shape: torch.Size
    memory_format: torch.memory_format

    @classmethod
    def of(cls, inputs: Tensor) -> _Reshape:
        last = inputs.ndim == 4 and inputs.is_contiguous(memory_format=torch.channels_last)
        return cls(inputs.shape, torch.channels_last if last else torch.contiguous_format)

    def propagate(self, relevance: Tensor, rule: Rule) -> tuple[Tensor, ...]:
        return (relevance.reshape(-1, *self.shape[1:]).contiguous(memory_format=self.memory_format),)


@dataclass(frozen=True, slots=True, eq=False)
class _Gate:
    """A gate that counts as a constant: the features take all relevance.

    A single position that the gate was spread over takes the relevance of all places.
    """

    shape: torch.Size

    def propagate(self, relevance: Tensor, rule: Rule) -> tuple[Tensor, ...]:
        return (relevance.sum_to_size(len(relevance), *self.shape[1:]),)


@dataclass(frozen=True, slots=True, eq=False)
class _Shares:
    """A residual sum: each summand's share of the stabilized sum."""

    shares: tuple[Tensor, ...]

    @classmethod
    def of(cls, left: Tensor, right: Tensor, *, wanted: Sequence[bool]) -> _Shares:
        reciprocal = _reciprocal(left + right)
        return cls(tuple(part * reciprocal for part, kept in zip((left, right), wanted, strict=True) if kept))

    @classmethod
    def of_constant(cls, x: Tensor, constant: Tensor) -> _Shares:
        """Of a sum with a constant, which keeps its own share."""
        return cls((x * _reciprocal(x + constant),))

    def propagate(self, relevance: Tensor, rule: Rule) -> tuple[Tensor, ...]:
        return tuple(times(relevance, share) for share in self.shares)


@dataclass(frozen=True, slots=True, eq=False)
class _Norm:
    """A layer norm: a linear map whose standard deviation is held constant."""

    norm: LayerNorm
    inputs: Tensor
    outputs: Tensor
    inverse: Tensor

    def propagate(self, relevance: Tensor, rule: Rule) -> tuple[Tensor, ...]:
        return (self.norm.relevance(self.inputs, self.outputs, relevance, self.inverse),)


@dataclass(frozen=True, slots=True, eq=False)
class _Weights:
    """Attention's weights; only AttnLRP gives them any relevance."""

    attention: AttentionScores

    def propagate(self, relevance: Tensor, rule: Rule) -> tuple[Tensor, ...]:
        return self.attention.at_inputs(relevance)


@dataclass(frozen=True, slots=True, eq=False)
class _Product:
    """Attention's product of weights and values."""

    product: AttentionProduct
    weights: Tensor
    values: Tensor
    outputs: Tensor
    _positive: list[Tensor] = field(default_factory=list)

    def propagate(self, relevance: Tensor, rule: Rule) -> tuple[Tensor | None, ...]:
        assert isinstance(rule, str)
        if rule == "ZPlus" and not self._positive:
            self._positive.append(self.product.positive(self.weights, self.values))
        positive = self._positive[0] if rule == "ZPlus" else None
        return self.product.relevance(self.weights, self.values, self.outputs, relevance, rule, positive)


@dataclass(frozen=True, slots=True, eq=False)
class _Recorded:
    """A step whose backward pass is its rule: pooling, and steps that move values."""

    inputs: tuple[Tensor, ...]
    output: Tensor

    @classmethod
    def of(cls, function: Callable[..., Any], arguments: Any, keywords: Any, *, wanted: Sequence[bool]) -> _Recorded:
        leaves: list[Tensor] = []

        def record(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]

        with torch.enable_grad():
            parted, named = fx.node.map_aggregate((arguments, keywords), record)
            output = function(*parted, **named)
        return cls(tuple(leaf for leaf, kept in zip(leaves, wanted, strict=True) if kept), output)

    def propagate(self, relevance: Tensor, rule: Rule) -> tuple[Tensor, ...]:
        rows = [
            torch.autograd.grad(self.output, self.inputs, row, retain_graph=True)
            for row in relevance.split(len(self.output))
        ]
        return tuple(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*rows, strict=True))


def _reciprocal(denominator: Tensor, stabilizer: float = STABILIZER) -> Tensor:
    """1 / (z + stabilizer sign(z)) with sign(0) = 1, as in zennit."""
    # A denominator of -0.0 is a sum of nothing but zeros, which take no relevance whatever the sign is.
    return torch.copysign(denominator.new_full((), stabilizer), denominator).add_(denominator).reciprocal_()


def _pair(value: tuple[int, ...] | str | int) -> tuple[int, int]:
    assert isinstance(value, tuple)
    return value[0], value[1]
