"""Refitting: layer by layer, the remaining weights and biases by ridge regression on the original's outputs.

The inputs are those of the network that is repaired up to the layer, the targets the original network's outputs of the
rows that are kept; the last layer of a residual block has the original's sum less the pruned shortcut as its target, so
that it makes up for errors that came down the stream. The classifier comes last, against the original's logits.
Related: He et al. 2017 (channel pruning by reconstruction), Frantar and Alistarh 2022 (layer by layer, closed form).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from objectives.errors import RepairError
from objectives.pruning.ranking import Masks
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
        batch_size: images a layer computes at once.
        strength: of the penalty.
        n_rows: added up at once.
    """

    def __init__(
        self,
        network: OrderedNetwork,
        targets: Mapping[str, Targets],
        masks: Masks,
        batch_size: int,
        strength: float,
        n_rows: int = _ROWS,
    ) -> None:
        super().__init__(network, targets, masks, batch_size)
        self.strength = strength
        self.n_rows = n_rows
        self.n_parts = 1

    def new_layer(self, name: str, inputs: Tensor, shortcut: Tensor | None) -> Linear:
        """See `RepairPass.new_layer`."""
        layer = self.network.layers[name]
        # Copies: of a network in float64 these would be its own.
        weight, bias = layer.weight().double().clone(), layer.bias().double().clone()
        outputs, columns = self._fitted(name, inputs)
        n_rows = len(self.targets[name].positions)
        parts = [
            equations(len(weight), int(columns.sum()), int(outputs.sum()), n_rows, inputs.device)
            for _ in range(self.n_parts)
        ]
        old_weight, old_bias = weight[:, outputs][:, :, columns], bias[:, outputs]
        for positions, rows, wanted in self._rows(name, inputs, shortcut):
            residuals = wanted[:, :, outputs] - torch.baddbmm(old_bias[:, None, :], rows, old_weight.mT)
            if len(parts) == 1:
                parts[0].add(rows, residuals)
                continue
            belongs_to = positions // layer.n_places % len(parts)
            for index, part in enumerate(parts):
                part.add(rows[:, belongs_to == index], residuals[:, belongs_to == index])
        whole = total(parts)
        if not math.isfinite(whole.square):
            raise RepairError(f"The layer {name!r} can't be repaired: its targets on the references aren't finite.")
        change = whole.solve(self.chosen(name, parts))
        if change.is_least_norm:
            _log.warning("The equations of layer %r are singular: of their solutions the smallest is taken.", name)
        rows_at, columns_at = outputs.nonzero(), columns.nonzero().flatten()
        weight[:, rows_at, columns_at] += change.weight
        bias[:, outputs] += change.bias
        return layer.replaced(weight, bias)

    def chosen(self, name: str, parts: Sequence[Equations]) -> float:
        """The strength for a layer."""
        return self.strength

    def _fitted(self, name: str, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and columns that are fitted, of bool, within a group: of groups all."""
        layer = self.network.layers[name]
        if layer.n_groups == 1:
            return self.kept(name), layer.columns_of(layer.live_inputs(inputs))
        n_outputs = layer.n_outputs // layer.n_groups
        sizes = (n_outputs, layer.n_columns)
        return tuple(torch.ones(size, dtype=torch.bool, device=inputs.device) for size in sizes)  # type: ignore[return-value]

    def _rows(self, name: str, inputs: Tensor, shortcut: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Chunks of positions (P,), inputs (groups, P, columns) and targets (groups, P, outputs)."""
        layer, targets = self.network.layers[name], self.targets[name]
        channels = layer.live_inputs(inputs) if layer.n_groups == 1 else None
        for positions, values in zip(
            targets.positions.split(self.n_rows), targets.values.split(self.n_rows), strict=True
        ):
            wanted = values.double()
            if shortcut is not None:
                wanted = wanted - layer.outputs_at(shortcut, positions)
            yield (
                positions,
                layer.inputs_at(inputs, positions, channels),
                wanted.unflatten(1, (layer.n_groups, -1)).movedim(1, 0),
            )
