"""The ranking: all components of a network, least relevant first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from objectives.pruning.rates import n_pruned

__all__ = ["Masks", "Ranking", "n_pruned_by", "of_kept", "rank"]

Masks = Mapping[str, Tensor]
"""Layer -> (components,) of bool: true where the component is kept."""


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """An order of all components over the whole network.

    Attributes:
        order: (n,) positions in the concatenation of all layers, least relevant first.
        widths: components of each layer, in forward order.
        kinds: number of components of each kind that is ranked within itself; one where all are ranked together.
    """

    order: Tensor
    widths: dict[str, int]
    kinds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.order)

    def n_pruned(self, rate: float) -> int:
        """Components pruned at a rate: floor(rate * n) of each kind."""
        return sum(n_pruned(rate, n) for n in self.kinds)

    def masks(self, n_pruned: int) -> dict[str, Tensor]:
        """Masks with the `n_pruned` least relevant components pruned; nested for growing numbers."""
        kept = torch.ones(len(self.order), dtype=torch.bool)
        kept[self.order[:n_pruned]] = False
        return self.split(kept)

    def split(self, kept: Tensor) -> dict[str, Tensor]:
        """Masks from (n,) of bool in the concatenation of all layers; views of it."""
        return dict(zip(self.widths, kept.split(list(self.widths.values())), strict=True))


def n_pruned_by(masks: Masks) -> int:
    """Components that masks prune."""
    return sum(int((~mask).sum()) for mask in masks.values())


def of_kept(values: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """Of values (..., components) by layer those of kept components, without layers that keep none."""
    return {name: of_layer[..., masks[name]] for name, of_layer in values.items() if bool(masks[name].any())}


def rank(scores: Mapping[str, Tensor], kinds: Mapping[str, str] | None = None, masks: Masks | None = None) -> Ranking:
    """Ranks components by score over the whole network, or each kind of them within itself.

    Kinds that are ranked apart take turns in the one order, so that each has lost its share at
    `Ranking.n_pruned(rate)`.

    Args:
        scores: layer -> (components,), in forward order; under masks those of kept components alone, see `of_kept`.
        kinds: layer -> kind, where each is ranked within itself.
        masks: of a pruned network, in forward order: what it has lost comes before all that it keeps.

    Returns:
        The stable order: ties follow layer order, then index.
    """
    values = torch.cat([values.detach().cpu().double() for values in scores.values()])
    widths = {name: len(values) for name, values in scores.items()}
    if masks is not None:
        widths = {name: len(mask) for name, mask in masks.items()}
        kept = torch.cat(list(masks.values()))
        values = torch.full(kept.shape, -torch.inf, dtype=torch.float64).masked_scatter(kept, values)
    order = values.argsort(stable=True)
    if kinds is None:
        return Ranking(order, widths, (len(values),))
    known = list(dict.fromkeys(kinds[name] for name in widths))
    kind = torch.cat([torch.full((width,), known.index(kinds[name])) for name, width in widths.items()])
    sizes = torch.bincount(kind, minlength=len(known))
    share = torch.empty_like(values)  # of its kind that is gone with a component
    for index, size in enumerate(sizes.tolist()):
        share[order[kind[order] == index]] = torch.arange(1, size + 1, dtype=torch.float64) / size
    return Ranking(share.argsort(stable=True), widths, tuple(sizes.tolist()))
