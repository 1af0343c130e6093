"""The ranking: all components of a network, least relevant first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Masks", "Ranking", "rank"]

Masks = Mapping[str, Tensor]
"""Layer -> (components,) of bool: true where the component is kept."""


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """An order of all components over the whole network.

    Attributes:
        order: (n,) positions in the concatenation of all layers, least relevant first.
        widths: components of each layer, in forward order.
    """

    order: Tensor
    widths: dict[str, int]

    def __len__(self) -> int:
        return len(self.order)

    def masks(self, n_pruned: int) -> dict[str, Tensor]:
        """Masks with the `n_pruned` least relevant components pruned; nested for growing numbers."""
        kept = torch.ones(len(self.order), dtype=torch.bool)
        kept[self.order[:n_pruned]] = False
        return dict(zip(self.widths, kept.split(list(self.widths.values())), strict=True))


def rank(scores: Mapping[str, Tensor]) -> Ranking:
    """Ranks components by score over the whole network.

    Args:
        scores: layer -> (components,), in forward order.

    Returns:
        The stable order: ties follow layer order, then index.
    """
    order = torch.cat([values.detach().cpu().double() for values in scores.values()]).argsort(stable=True)
    return Ranking(order, {name: len(values) for name, values in scores.items()})
