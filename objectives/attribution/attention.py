"""Attention as two operations of a canonical network: the weights A = softmax(scale q k^T), and the heads' product A v.

Whichever rule the relevance R of the product's output o = A v follows, it is chosen by the composite:

=========  ============================================================================================================
CP         A is a constant: R_v = v A^T (R / o); q and k receive none (CP-LRP, Ali et al. 2022)
ZPlus      A is a constant: R_v = v+ A^T (R / A v+)
AttnLRP    A and v share: R_v = v A^T (R / 2 o), R_A = A ((R / 2 o) v^T) (Achtibat et al. 2024, Prop. 3.3); through the
           softmax R_s = s (R_A - A sum_j R_A) (Prop. 3.1) for scores s; q and k share R_s as A and v do
=========  ============================================================================================================

Denominators are stabilized; A is never negative. All tokens' values are (N, tokens, heads * head_dim), as the layers
around attention compute them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import stabilize

from objectives.attribution.operations import STABILIZER
from objectives.attribution.stacks import product, times

__all__ = ["AttentionProduct", "AttentionScores", "AttentionWeights", "Heads", "attention_rule", "heads_of"]


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of one attention module.

    Attributes:
        name: of the canonical module that computes their outputs.
        n_heads: number of heads.
        head_dim: values of a head for one token.
        query: name of the canonical layer that computes q.
        key: likewise of k.
        value: likewise of v.
        projection: name of the user's layer whose rows are q's, k's and v's, in this order.
    """

    name: str
    n_heads: int
    head_dim: int
    query: str
    key: str
    value: str
    projection: str

    def rows(self, heads: Tensor) -> Tensor:
        """Rows of the layers of q, k and v that belong to heads (their indices)."""
        return (heads[:, None] * self.head_dim + torch.arange(self.head_dim, device=heads.device)).flatten()


class AttentionWeights(nn.Module):
    """A = softmax(scale q k^T) of every head.

    Args:
        n_heads: number of heads.
        scale: of the scores.

    Attributes:
        rule: of attention, set by `attention_rule`; without one, gradients pass.
    """

    def __init__(self, n_heads: int, scale: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.scale = scale
        self.rule: str | None = None

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """The scores, (N, heads, tokens, tokens)."""
        return self.scale * heads_of(query, self.n_heads) @ heads_of(key, self.n_heads).transpose(-2, -1)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """`query` and `key` are (N, tokens, heads * head_dim); returns (N, heads, tokens, tokens)."""
        if self.rule == "AttnLRP":
            weights: Tensor = _WeightsFunction.apply(query, key, self)
            return weights
        return self.scores(query, key).softmax(dim=-1)

    def extra_repr(self) -> str:
        """Shows heads and scale in `print(network)`."""
        return f"n_heads={self.n_heads}, scale={self.scale:.6g}"


class AttentionProduct(nn.Module):
    """A v of every head.

    Attributes:
        n_heads: number of heads.
        rule: of attention, set by `attention_rule`; without one, gradients pass.
    """

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.rule: str | None = None

    def plain(self, weights: Tensor, value: Tensor) -> Tensor:
        """The product without any relevance rule."""
        return tokens_of(weights @ heads_of(value, self.n_heads))

    def forward(self, weights: Tensor, value: Tensor) -> Tensor:
        """`weights` is (N, heads, tokens, tokens), `value` and the result are (N, tokens, heads * head_dim)."""
        if self.rule is None:
            return self.plain(weights, value)
        output: Tensor = _ProductFunction.apply(weights if self.rule == "AttnLRP" else weights.detach(), value, self)
        return output

    def positive(self, weights: Tensor, value: Tensor) -> Tensor:
        """The product with positive values alone, the denominator of ZPlus."""
        return self.plain(weights, value.clamp(min=0))

    def relevance(
        self,
        weights: Tensor,
        value: Tensor,
        output: Tensor,
        relevance: Tensor,
        rule: str | None,
        positive: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Relevance of the weights, if the rule gives them any, and of the values.

        Args:
            weights: (N, heads, tokens, tokens).
            value: (N, tokens, heads * head_dim), as everything else.
            output: of the product.
            relevance: of the output, (rows * N, ...); so are the results.
            rule: of attention.
            positive: the method of this name, where it is known.
        """
        match rule:
            case "CP":
                factor, denominator = value, output
            case "ZPlus":
                factor = value.clamp(min=0)
                denominator = self.positive(weights, value) if positive is None else positive
            case "AttnLRP":
                factor, denominator = value, 2 * output
            case _:
                raise ValueError(f"`rule` must be CP, ZPlus or AttnLRP, but got {rule=}.")
        share = heads_of(times(relevance, stabilize(denominator, STABILIZER).reciprocal()), self.n_heads)
        at_value = times(tokens_of(product(weights.transpose(-2, -1), share)), factor)
        if rule != "AttnLRP":
            return None, at_value
        return times(product(share, heads_of(value, self.n_heads).transpose(-2, -1)), weights), at_value

    def extra_repr(self) -> str:
        """Shows the number of heads in `print(network)`."""
        return f"n_heads={self.n_heads}"


@dataclass(frozen=True, slots=True, eq=False)
class AttentionScores:
    """How the relevance of weights reaches q and k under AttnLRP.

    Attributes:
        module: of the weights.
        query: (N, tokens, heads * head_dim).
        key: likewise.
        scores: (N, heads, tokens, tokens).
        weights: likewise.
    """

    module: AttentionWeights
    query: Tensor
    key: Tensor
    scores: Tensor
    weights: Tensor

    @classmethod
    def of(cls, module: AttentionWeights, query: Tensor, key: Tensor) -> AttentionScores:
        """Computes scores and weights."""
        scores = module.scores(query, key)
        return cls(module, query, key, scores, scores.softmax(dim=-1))

    def at_scores(self, relevance: Tensor) -> Tensor:
        """Relevance of the scores from that of the weights, (rows * N, heads, tokens, tokens)."""
        kept = relevance - times(relevance.sum(dim=-1, keepdim=True), self.weights)
        return times(kept, self.scores)

    def at_inputs(self, relevance: Tensor) -> tuple[Tensor, Tensor]:
        """Relevance of q and k from that of the weights, (rows * N, tokens, heads * head_dim)."""
        share = times(self.at_scores(relevance), self.module.scale / stabilize(2 * self.scores, STABILIZER))
        n_heads = self.module.n_heads
        at_query = tokens_of(product(share, heads_of(self.key, n_heads)))
        at_key = tokens_of(product(share.transpose(-2, -1), heads_of(self.query, n_heads)))
        return times(at_query, self.query), times(at_key, self.key)


@contextmanager
def attention_rule(module: nn.Module, rule: str | None) -> Iterator[None]:
    """Has all attention of a network follow a rule while the block lasts."""
    operations = [child for child in module.modules() if isinstance(child, AttentionWeights | AttentionProduct)]
    before = [operation.rule for operation in operations]
    try:
        for operation in operations:
            operation.rule = rule
        yield
    finally:
        for operation, own in zip(operations, before, strict=True):
            operation.rule = own


def heads_of(tokens: Tensor, n_heads: int) -> Tensor:
    """(..., tokens, heads * head_dim) -> (..., heads, tokens, head_dim)."""
    head_dim = tokens.shape[-1] // max(n_heads, 1)  # a resized network may have no heads left in a block
    heads: Tensor = tokens.unflatten(-1, (n_heads, head_dim))
    return heads.transpose(-3, -2)


def tokens_of(heads: Tensor) -> Tensor:
    """(..., heads, tokens, head_dim) -> (..., tokens, heads * head_dim)."""
    return heads.transpose(-3, -2).flatten(-2)


class _WeightsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, module: AttentionWeights) -> Tensor:
        attention = AttentionScores.of(module, query, key)
        ctx.module = module
        ctx.save_for_backward(query, key, attention.scores, attention.weights)
        return attention.weights

    @staticmethod
    def backward(ctx: Any, *relevances: Tensor) -> tuple[Tensor, Tensor, None]:
        at_query, at_key = AttentionScores(ctx.module, *ctx.saved_tensors).at_inputs(relevances[0])
        return at_query, at_key, None


class _ProductFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, value: Tensor, module: AttentionProduct) -> Tensor:
        output = module.plain(weights, value)
        ctx.module, ctx.rule = module, module.rule
        ctx.save_for_backward(weights, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *relevances: Tensor) -> tuple[Tensor | None, Tensor, None]:
        return *ctx.module.relevance(*ctx.saved_tensors, relevances[0], ctx.rule), None
