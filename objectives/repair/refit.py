"""Refitting: layer by layer, the remaining weights and biases by ridge regression on the original's outputs.

The inputs are those of the network that is repaired up to the layer, the targets the original network's outputs of the
rows that are kept; the last layer of a residual block has the original's sum less the pruned shortcut as its target, so
that it makes up for errors that came down the stream. The classifier comes last, against the original's logits.
The penalty pulls towards the old weights, of convolutional networks scaled by output (`objectives.repair.ridge`).
Related: He et al. 2017 (channel pruning by reconstruction), Frantar and Alistarh 2022 (layer by layer, closed form).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from objectives.errors import RepairError
from objectives.pruning.ranking import Masks
from objectives.repair.chunks import Chunks
from objectives.repair.order import OrderedNetwork
from objectives.repair.original import Targets
from objectives.repair.passes import RepairPass
from objectives.repair.ridge import Equations, equations, total
from objectives.repair.rows import Linear

__all__ = ["Refit"]

_ROWS = 2048

_log = logging.getLogger(__name__)


class Refit(RepairPass):
    """A pass that refits.

    Args:
        network: the original.
        targets: of each layer.
        masks: kept components.
        images: those that the targets were observed on.
        strength: of the penalty; of each layer's, where they differ.
        n_rows: added up at once.
    """

    def __init__(
        self,
        network: OrderedNetwork,
        targets: Mapping[str, Targets],
        masks: Masks,
        images: Chunks,
        strength: float | Mapping[str, float],
        n_rows: int = _ROWS,
    ) -> None:
        super().__init__(network, targets, masks, images)
        self.strength = strength
        self.n_rows = n_rows
        # As of `bn`, as if one image more had shown no change. A transformer's weights aren't scaled: a DeiT-tiny with
        # one reference a class loses by it.
        self.shrinkage = None if network.is_transformer else 1 / images.firsts[-1]

    def new_layer(self, name: str, inputs: Chunks, live: Tensor, shortcut: Chunks | None) -> Linear:
        """See `RepairPass.new_layer`."""
        layer, targets = self.network.layers[name], self.targets[name]
        # Copies: of a network in float64 these would be its own.
        weight, bias = layer.weight().double().clone(), layer.bias().double().clone()
        fitted = self._fitted(name, live)
        groups, outputs, columns = fitted.groups, fitted.outputs, fitted.columns
        old_weight, old_bias = weight[groups][:, outputs][:, :, columns], bias[groups][:, outputs]
        parts = [equations(old_weight, len(targets.positions), self.shrinkage) for _ in range(self.n_parts(name))]
        # Of a group some outputs may be pruned: there is nothing to explain.
        kept = self.kept(name).view(layer.n_groups, -1)[groups][:, None, outputs]
        sums = torch.zeros_like(bias)
        channels = fitted.channels
        if channels is not None and inputs.stored is not None:
            channels = channels[inputs.stored.channels]
        read = partial(layer.inputs_at, channels=channels)
        for positions, wanted in self._wanted(name, shortcut):
            rows = inputs.read(positions, layer.n_places, read, dim=1)
            sums += wanted.sum(dim=1)
            residuals = wanted[groups][:, :, outputs] - torch.baddbmm(old_bias[:, None, :], rows, old_weight.mT)
            residuals = residuals if bool(kept.all()) else torch.where(kept, residuals, 0.0)
            if len(parts) == 1:
                parts[0].add(rows, residuals)
                continue
            belongs_to = positions // layer.n_places % len(parts)
            for index, part in enumerate(parts):
                part.add(rows[:, belongs_to == index], residuals[:, belongs_to == index])
        if not bool(sums.sum().isfinite()):
            raise RepairError(f"The layer {name!r} can't be repaired: its targets on the references aren't finite.")
        change = total(parts).solve(self.chosen(name, parts))
        if change.is_singular:
            _log.warning("Layer %r has singular equations: of their solutions that nearest to it is taken.", name)
        where = tuple(each.nonzero().flatten() for each in (groups, outputs, columns))
        weight[torch.meshgrid(*where, indexing="ij")] += change.weight
        bias[torch.meshgrid(*where[:2], indexing="ij")] += change.bias
        # What nothing goes into gives its bias alone.
        bias[fitted.silent] = (sums / len(targets.positions))[fitted.silent]
        return layer.replaced(weight, bias)

    def n_parts(self, name: str) -> int:
        """Into how many parts a layer's rows fall, image by image."""
        return 1

    def chosen(self, name: str, parts: Sequence[Equations]) -> float:
        """The strength for a layer."""
        return self.strength[name] if isinstance(self.strength, Mapping) else self.strength

    def _fitted(self, name: str, live: Tensor) -> _Fitted:
        """Of a layer without groups the kept outputs' weights of live inputs; else groups that have both."""
        layer, targets, kept = self.network.layers[name], self.targets[name], self.kept(name)
        if layer.n_groups == 1:
            one = torch.ones(1, dtype=torch.bool, device=targets.positions.device)
            return _Fitted(one, kept, layer.columns_of(live), None, ~one)
        hears = live.view(layer.n_groups, -1).any(dim=1)
        groups = hears & kept.view(layer.n_groups, -1).any(dim=1)
        outputs, columns = (
            torch.ones(size, dtype=torch.bool, device=targets.positions.device)
            for size in (layer.n_outputs // layer.n_groups, layer.n_columns)
        )
        return _Fitted(groups, outputs, columns, layer.inputs_of(groups), ~hears)

    def _wanted(self, name: str, shortcut: Chunks | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of positions (P,) and targets (groups, P, outputs) in float64."""
        layer, targets = self.network.layers[name], self.targets[name]
        for positions, values in zip(
            targets.positions.split(self.n_rows), targets.values.split(self.n_rows), strict=True
        ):
            wanted = values.double()
            if shortcut is not None:
                wanted = wanted - shortcut.read(positions, layer.n_places, layer.outputs_at)
            yield positions, wanted.unflatten(1, (layer.n_groups, -1)).movedim(1, 0)


@dataclass(frozen=True, slots=True, eq=False)
class _Fitted:
    """What of a layer is fitted; all of bool.

    Attributes:
        groups: (groups,).
        outputs: (outputs,) of each of these groups.
        columns: (columns,) of each of these groups.
        channels: (inputs,) of the whole layer, those of these groups; None of a layer without groups.
        silent: (groups,), of which all inputs are zero, so that the bias is all there is to fit.
    """

    groups: Tensor
    outputs: Tensor
    columns: Tensor
    channels: Tensor | None
    silent: Tensor
