"""Refitting: layer by layer, the remaining weights and biases by ridge regression on the original's outputs.

The inputs are those of the network that is repaired up to the layer, the targets the original network's outputs of the
rows that are kept; the last layer of a residual block has the original's sum less the pruned shortcut as its target, so
that it makes up for errors that came down the stream. The classifier comes last, against the original's logits. Related:
He et al. 2017 (channel pruning by reconstruction), Frantar and Alistarh 2022 (layer-wise, in closed form).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from objectives.errors import RepairError
from objectives.pruning.ranking import Masks
from objectives.repair.order import OrderedNetwork
from objectives.repair.original import Targets
from objectives.repair.passes import RepairPass
from objectives.repair.ridge import NormalEquations, left_out_error, solve
from objectives.repair.rows import Linear

__all__ = ["Refit", "STRENGTHS"]

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Penalties among which leaving out chooses."""

_PARTS = 5
_ROWS = 2048

_log = logging.getLogger(__name__)


class Refit(RepairPass):
    """A pass that refits.

    Args:
        network: the original.
        targets: of each layer.
        masks: kept components.
        batch_size: images a layer computes at once.
        strengths: of the penalty, by layer; None chooses each by leaving references out.
        n_rows: added up at once.
    """

    def __init__(
        self,
        network: OrderedNetwork,
        targets: dict[str, Targets],
        masks: Masks,
        batch_size: int,
        strengths: dict[str, float] | None,
        n_rows: int = _ROWS,
    ) -> None:
        super().__init__(network, targets, masks, batch_size)
        self.strengths = strengths
        self.chosen: dict[str, float] = {}
        self.errors: dict[str, list[float]] = {}
        self.n_rows = n_rows

    def new_layer(self, name: str, inputs: Tensor, shortcut: Tensor | None) -> Linear:
        """See `RepairPass.new_layer`."""
        layer, targets = self.network.layers[name], self.targets[name]
        weight, bias = layer.weight().double(), layer.bias().double()
        kept = self.kept(name, layer).unflatten(0, (layer.n_groups, -1))
        live = columns = None
        if layer.n_groups == 1:
            live = layer.live_inputs(inputs)
            columns = layer.columns_of(live)
        own_weight, own_bias = self._part(weight, kept, columns), self._part(bias, kept)
        wanted = targets.values
        parts = [
            NormalEquations.zeros(own_weight.shape[0], own_weight.shape[2], own_weight.shape[1], inputs.device)
            for _ in range(1 if self.strengths is not None else min(_PARTS, len(inputs)))
        ]
        bounds = torch.linspace(0, len(inputs), len(parts) + 1).long().tolist()
        for part, first, end in zip(parts, bounds, bounds[1:], strict=False):
            start, stop = torch.searchsorted(
                targets.positions, torch.tensor([first * layer.n_places, end * layer.n_places], device=inputs.device)
            ).tolist()
            for index in range(start, stop, self.n_rows):
                chunk = slice(index, min(index + self.n_rows, stop))
                positions = targets.positions[chunk]
                rows = layer.inputs_at(inputs, positions, live)
                expected = wanted[chunk]
                if shortcut is not None:
                    expected = expected - layer.outputs_at(shortcut, positions)
                grouped = expected.double().unflatten(1, (layer.n_groups, -1)).movedim(1, 0)
                if layer.n_groups == 1:
                    grouped = grouped[:, :, kept[0]]
                part.add(rows, grouped - (rows @ own_weight.mT + own_bias[:, None, :]))
        strength = self._strength(name, parts)
        whole = parts[0]
        for part in parts[1:]:
            whole = whole.plus(part)
        if not bool(whole.cross.isfinite().all()) or not bool(whole.gram.isfinite().all()):
            raise RepairError(f"The layer {name!r} can't be refitted: its outputs aren't finite on the references.")
        change = solve(whole, strength)
        if change.is_least_norm:
            _log.info("The equations of layer %s are singular; of their solutions the smallest change is taken.", name)
        if layer.n_groups == 1:
            rows_kept = kept[0].nonzero().flatten()
            whole_change = torch.zeros_like(weight[0])
            whole_change[rows_kept[:, None], columns.nonzero().flatten()] = change.weight[0]
            weight[0] += whole_change
            bias[0, rows_kept] += change.bias[0]
        else:
            weight, bias = weight + change.weight, bias + change.bias
        return layer.replaced(weight, bias)

    @staticmethod
    def _part(tensor: Tensor, kept: Tensor, columns: Tensor | None = None) -> Tensor:
        if kept.shape[0] > 1:
            return tensor
        tensor = tensor[:, kept[0]]
        return tensor if columns is None else tensor[:, :, columns]

    def _strength(self, name: str, parts: list[NormalEquations]) -> float:
        if self.strengths is not None:
            return self.strengths[name]
        if len(parts) == 1:
            return STRENGTHS[-1]
        self.errors[name] = [left_out_error(parts, strength) for strength in STRENGTHS]
        base = sum(part.square for part in parts)
        self.errors[name].append(base)
        self.chosen[name] = STRENGTHS[min(range(len(STRENGTHS)), key=lambda i: self.errors[name][i])]
        return self.chosen[name]
