"""Relevance of every component over the reference samples, and the scores made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from objectives.errors import RelevanceError
from objectives.network import CanonicalNetwork
from objectives.pruning.ranking import Masks, of_kept
from search_spaces.choices import AbsScope

__all__ = ["Relevance", "moments", "normalized", "spread"]


def spread(network: CanonicalNetwork, name: str, relevance: Tensor) -> Tensor:
    """The relevance of a layer's or an attention's outputs with its components in one dimension.

    Args:
        network: canonical.
        name: of what has components.
        relevance: (..., components), (..., components, height, width), of tokens (..., tokens, components), or of heads
            (..., tokens, heads * head_dim).

    Returns:
        (..., components) or, where there are several values of a component, (..., components, height, width); of tokens
        that is (..., components, tokens, 1), of heads (..., heads, tokens, head_dim).
    """
    if name in network.heads:
        by_head: Tensor = relevance.unflatten(-1, (network.heads[name].n_heads, -1))
        return by_head.transpose(-3, -2)
    if len(network.layers[name].output_shape) == 2:
        return relevance.transpose(-2, -1).unsqueeze(-1)
    return relevance


def moments(relevance: Tensor, abs_scope: AbsScope) -> Tensor:
    """What rankings need of a layer's relevance; moments of batches add up.

    Args:
        relevance: of a layer's outputs on N samples, (..., N, components) or (..., N, components, height, width).
        abs_scope: where the absolute value is taken.

    Returns:
        (..., 3, components) in float64, sums over samples: of the relevance summed over space, of its magnitude, and of
        the magnitude's square.
    """
    if relevance.ndim > 3:
        signed = relevance.sum(dim=(-2, -1)).double()
        magnitude = signed.abs() if abs_scope == "sum" else relevance.abs().sum(dim=(-2, -1)).double()
    else:
        signed = relevance.double()
        magnitude = signed.abs()
    return torch.stack([signed.sum(dim=-2), magnitude.sum(dim=-2), magnitude.square().sum(dim=-2)], dim=-2)


@dataclass(frozen=True, slots=True, eq=False)
class Relevance:
    """Moments of every component's relevance over the reference samples.

    All rankings of one composite come from one attribution.

    Attributes:
        n_samples: reference samples.
        sums: layer -> (3, components) in float64, in forward order; see `moments`.
    """

    n_samples: int
    sums: Mapping[str, Tensor]

    @property
    def signed(self) -> dict[str, Tensor]:
        """Mean relevance, layer -> (components,)."""
        return {name: sums[0] / self.n_samples for name, sums in self.sums.items()}

    @property
    def magnitude(self) -> dict[str, Tensor]:
        """Mean magnitude of the relevance, layer -> (components,)."""
        return {name: sums[1] / self.n_samples for name, sums in self.sums.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all moments."""
        return sum(sums.nbytes for sums in self.sums.values())

    def scores(
        self, *, absolute: bool, aggregate: str = "mean", normalize: str = "none", masks: Masks | None = None
    ) -> dict[str, Tensor]:
        """Score of every component, layer -> (components,).

        Args:
            absolute: of the magnitude, rather than of the signed relevance.
            aggregate: the mean over samples, or `rms`, the root of the mean square of the magnitude, whatever
                `absolute` is.
            normalize: `l2` divides a layer's scores by their l2 norm, `mean` by the mean of their absolute values.
            masks: of the pruned network whose relevance this is: only kept components have a score, see `of_kept`, and
                those of layers that relevance no longer reaches have 0.

        Raises:
            RelevanceError: a score isn't finite, or a layer of an unpruned network has no relevance at all.
        """
        scores: dict[str, Tensor] = {}
        for name, (signed, magnitude, square) in (self.sums if masks is None else of_kept(self.sums, masks)).items():
            means = magnitude if absolute else signed
            values = (square / self.n_samples).sqrt() if aggregate == "rms" else means / self.n_samples
            if not bool(values.isfinite().all()):
                raise RelevanceError(
                    f"The relevance of layer {name!r} isn't finite; use a larger epsilon or another rule there."
                )
            if masks is None and not bool((magnitude != 0).any()):
                raise RelevanceError(f"No relevance reaches layer {name!r} under this composite; use another rule.")
            scores[name] = normalized(values, normalize)
        return scores


def normalized(scores: Tensor, normalize: str) -> Tensor:
    """A layer's scores (components,), divided as `Relevance.scores` says; all 0 where the divisor would be."""
    match normalize:
        case "none":
            return scores
        case "l2":
            size = scores.square().sum().sqrt()
        case "mean":
            size = scores.abs().mean()
        case _:
            raise ValueError(f"`normalize` must be none, l2 or mean, but got {normalize=}.")
    # Signed relevances may cancel in every component: then all scores are 0, and stay so.
    return scores / size if bool(size != 0) else scores
