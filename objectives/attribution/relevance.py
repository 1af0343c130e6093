"""Relevance of every component for every reference sample, and the scores made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from objectives.errors import RelevanceError

__all__ = ["AbsScope", "Relevance"]

AbsScope = Literal["sum", "element"]
"""Where the absolute value is taken: of each sample's sum over space (Hatefi et al. 2024), or of every element before
any sum (Yeom et al. 2021)."""


@dataclass(frozen=True, slots=True, eq=False)
class Relevance:
    """Relevance summed over space, by layer in forward order.

    Both rankings, signed and absolute, come from one attribution.

    Attributes:
        signed: layer -> (samples, components), the sum over space.
        magnitude: layer -> (samples, components): with scope "sum" the absolute value of `signed`, with scope "element"
            the sum over space of absolute values.
    """

    signed: Mapping[str, Tensor]
    magnitude: Mapping[str, Tensor]

    def scores(self, *, absolute: bool) -> dict[str, Tensor]:
        """Score of every component: the mean over samples, layer -> (components,).

        Raises:
            RelevanceError: a score isn't finite, or a layer has no relevance at all.
        """
        source = self.magnitude if absolute else self.signed
        scores = {name: values.double().mean(dim=0) for name, values in source.items()}
        for name, values in scores.items():
            if not bool(values.isfinite().all()):
                raise RelevanceError(
                    f"The relevance of layer {name!r} isn't finite; use a larger epsilon or another rule there."
                )
            if not bool((self.magnitude[name] != 0).any()):
                raise RelevanceError(f"No relevance reaches layer {name!r} under this composite; use another rule.")
        return scores
