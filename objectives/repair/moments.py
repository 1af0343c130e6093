"""Matching moments (`bn`): each channel's mean and variance on the reference images as in the original network.

A scale and a shift behind each layer, folded into it, so that it works on networks whose batch norm is folded. With the
original's mean m and variance v, and m', v' in the pruned network repaired up to there, the scale is
sqrt((v + k v) / (v' + k v)) and the new mean lies 1 / (1 + k) of the way from m' to m: with the strength k the pull
towards no change grows, and no channel is scaled by more than sqrt(1 + 1 / k).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from objectives.errors import RepairError
from objectives.pruning.ranking import Masks
from objectives.repair.chunks import Chunks
from objectives.repair.order import OrderedNetwork
from objectives.repair.original import MomentSums, Targets
from objectives.repair.passes import RepairPass
from objectives.repair.rows import Linear

__all__ = ["MatchMoments"]


class MatchMoments(RepairPass):
    """A pass that matches moments.

    Args:
        network: the original.
        targets: of each layer.
        masks: kept components.
        images: those that the targets were observed on.
        strength: k above.
    """

    def __init__(
        self, network: OrderedNetwork, targets: Mapping[str, Targets], masks: Masks, images: Chunks, strength: float
    ) -> None:
        # A layer is matched by itself: what the sum behind it lacks isn't its business.
        super().__init__(replace(network, shortcuts={}), targets, masks, images)
        self.strength = strength

    def new_layer(self, name: str, inputs: Chunks, live: Tensor, shortcut: Chunks | None) -> Linear:
        """See `RepairPass.new_layer`."""
        layer, wanted = self.network.layers[name], self.targets[name].moments
        compute = layer.module if inputs.stored is None else layer.between(layer.module, None, inputs.stored.channels)
        sums = MomentSums()
        for part in inputs:
            sums.add(compute(part), layer.axis)
        here = sums.moments()
        if not bool(here.variance.isfinite().all()):
            raise RepairError(f"The layer {name!r} can't be repaired: its outputs on the references aren't finite.")
        own = self.strength * wanted.variance
        ratio = ((wanted.variance + own) / (here.variance + own)).sqrt()
        scale = torch.where(here.variance + own > 0, ratio, 1.0)
        mean = here.mean + (wanted.mean - here.mean) / (1 + self.strength)
        by_group = scale.unflatten(0, (layer.n_groups, -1))
        bias = layer.bias().double() * by_group + (mean - scale * here.mean).view_as(by_group)
        return layer.replaced(layer.weight().double() * by_group[:, :, None], bias)
