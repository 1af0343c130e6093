"""One pass through a pruned network in which each layer is repaired before it computes.

So the inputs of every layer are those of the network as it is repaired up to there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, fx

from objectives.errors import RepairError
from objectives.pruning.ranking import Masks
from objectives.repair.order import OrderedNetwork
from objectives.repair.original import Targets
from objectives.repair.rows import Linear, LinearLayer, silenced

__all__ = ["RepairPass"]


class RepairPass(fx.Interpreter, ABC):
    """Repairs the layers that pruning has touched; the others stay as they are, so nothing pruned is nothing changed.

    Args:
        network: the original.
        targets: of each layer.
        masks: kept components.
        batch_size: images a layer computes at once.
    """

    def __init__(
        self, network: OrderedNetwork, targets: dict[str, Targets], masks: Masks, batch_size: int
    ) -> None:
        super().__init__(network.module)
        self.network = network
        self.targets = targets
        self.masks = masks
        self.batch_size = batch_size
        self.repaired: dict[str, Linear] = {}
        self._touched: set[fx.Node] = set()

    def repair(self, images: Tensor) -> dict[str, Linear]:
        """The layers that have changed, by name.

        Args:
            images: those that the targets were observed on.

        Raises:
            RepairError: a layer's values aren't finite.
        """
        with torch.inference_mode():
            self.run(images)
        return self.repaired

    @abstractmethod
    def new_layer(self, name: str, inputs: Tensor, shortcut: Tensor | None) -> Linear:
        """The repaired layer.

        Args:
            name: of the layer.
            inputs: in the pruned network.
            shortcut: what will be added to the outputs, of a layer that ends a branch.
        """

    def kept(self, name: str, layer: LinearLayer) -> Tensor:
        """(outputs,) of bool: the layer's components that aren't pruned."""
        mask = self.masks.get(name)
        device = layer.module.weight.device
        return torch.ones(layer.n_outputs, dtype=torch.bool, device=device) if mask is None else mask.to(device)

    def run_node(self, n: fx.Node) -> Any:
        """One step; a layer is repaired first."""
        if not self._touched.isdisjoint(n.all_input_nodes):
            self._touched.add(n)
        if n.op != "call_module" or n.target not in self.network.layers:
            return super().run_node(n)
        name = str(n.target)
        layer, kept = self.network.layers[name], self.kept(name, self.network.layers[name])
        (inputs,), _ = self.fetch_args_kwargs_from_env(n)
        shortcut = self.network.shortcuts.get(name)
        module = layer.module
        if (n in self._touched or shortcut in self._touched) and bool(kept.any()):
            if not bool(inputs.isfinite().all()):
                raise RepairError(f"The layer {name!r} can't be refitted: its inputs aren't finite on the references.")
            module = self.new_layer(name, inputs, None if shortcut is None else self.env[shortcut])
            self.repaired[name] = module
            self._touched.add(n)
        outputs = torch.cat([module(part) for part in inputs.split(self.batch_size)])
        if bool(kept.all()):
            return outputs
        self._touched.add(n)
        return silenced(outputs, kept, channels_last=isinstance(module, torch.nn.Linear))
