"""One pass through a pruned network in which each layer is repaired before it computes.

So the inputs of every layer are those of the network as it is repaired up to there. All values are in chunks of images.
What wholly pruned layers alone would read isn't computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from objectives.attribution.operations import Activation, ResidualSum
from objectives.errors import RepairError
from objectives.network import shape_of
from objectives.pruning.ranking import Masks
from objectives.repair.chunks import Chunks, Stored
from objectives.repair.order import OrderedNetwork
from objectives.repair.original import Targets
from objectives.repair.rows import Linear
from objectives.steps import POOLS, arguments_of, pads_with_zeros

__all__ = ["RepairPass"]


class RepairPass(fx.Interpreter, ABC):
    """Repairs the layers that pruning reaches; the others stay as they are, so where nothing is pruned nothing changes.

    To be used once.

    Args:
        network: the original.
        targets: of each layer.
        masks: kept components.
        images: those that the targets were observed on.
    """

    def __init__(self, network: OrderedNetwork, targets: Mapping[str, Targets], masks: Masks, images: Chunks) -> None:
        super().__init__(network.module)
        self.extra_traceback = False  # or it would be added to the messages of our errors
        self.network = network
        self.targets = targets
        self.masks = masks
        self.images = images
        self.repaired: dict[str, Linear] = {}
        self._gone = {name for name, mask in masks.items() if name in network.layers and not bool(mask.any())}
        self._reached: set[fx.Node] = set()
        self._read = self._steps_that_are_read()

    def repair(self) -> dict[str, Linear]:
        """The layers that have changed, by name.

        Raises:
            RepairError: a layer's values aren't finite.
        """
        with torch.no_grad():
            self.run(self.images)
        return self.repaired

    @abstractmethod
    def new_layer(self, name: str, inputs: Chunks, live: Tensor, shortcut: Chunks | None) -> Linear:
        """The repaired layer.

        Args:
            name: of the layer.
            inputs: in the pruned network; of a layer that takes some, those that live alone.
            live: (inputs,) of bool: which input channels are anywhere other than zero.
            shortcut: what will be added to the outputs, of a layer that ends a branch.
        """

    def kept(self, name: str) -> Tensor:
        """(outputs,) of bool: a layer's components that aren't pruned."""
        layer = self.network.layers[name]
        mask = self.masks.get(name)
        device = layer.module.weight.device
        return torch.ones(layer.n_outputs, dtype=torch.bool, device=device) if mask is None else mask.to(device)

    def _steps_that_are_read(self) -> set[fx.Node]:
        """Those that the logits follow from; a wholly pruned layer reads nothing."""
        read: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            readers = [user for user in node.users if not (user.op == "call_module" and user.target in self._gone)]
            if node.op == "output" or not read.isdisjoint(readers):
                read.add(node)
        return read

    def run_node(self, n: fx.Node) -> Any:
        """One step; a layer is repaired first."""
        if n not in self._read:
            return None
        if not self._reached.isdisjoint(n.all_input_nodes):
            self._reached.add(n)
        if n.op != "call_module" or n.target not in self.network.layers:
            value = self._chunk_by_chunk(n)
            return self._heads(n, value) if n.op == "call_module" and n.target in self.masks else value
        name = str(n.target)
        layer, kept, shortcut = self.network.layers[name], self.kept(name), self.network.shortcuts.get(name)
        if name in self._gone:
            self._reached.add(n)
            parts = self.images.parts
            return self.images.map(lambda index: parts[index].new_zeros(len(parts[index]), *layer.output_shape))
        rows = kept.nonzero().flatten()
        (source,) = n.all_input_nodes
        inputs: Chunks = self.env[source] if layer.takes_some else self._full(source)
        is_reached = n in self._reached or shortcut in self._reached
        if not is_reached and len(rows) == len(kept):
            return inputs.map(lambda index: layer.module(inputs.parts[index]))
        self._reached.add(n)
        extremes = torch.stack([layer.input_extremes(part) for part in inputs])
        lives = (extremes != 0).any(dim=1).any(dim=0)
        live = lives if inputs.stored is None else inputs.stored.among_all(lives)
        if layer.takes_some:
            inputs = inputs.narrowed(lives, layer.axis)
        module = layer.module
        if is_reached and name in self.network.repairable:
            if not bool(extremes.isfinite().all()):
                raise RepairError(f"The layer {name!r} can't be repaired: its inputs on the references aren't finite.")
            module = self.new_layer(name, inputs, live, None if shortcut is None else self._full(shortcut))
            self.repaired[name] = module
        return self._outputs(name, module, rows, inputs)

    def _full(self, node: fx.Node) -> Chunks:
        """A value that has been computed, with all its channels; it is kept so."""
        value: Chunks = self.env[node].full()
        self.env[node] = value
        return value

    def _outputs(self, name: str, module: Linear, rows: Tensor, inputs: Chunks) -> Chunks:
        """What a layer with a module's values computes, its outputs but for the kept rows zero."""
        layer = self.network.layers[name]
        stored = None if len(rows) == layer.n_outputs else Stored(rows, layer.n_outputs, layer.axis)
        if not layer.takes_some:
            silenced = module if stored is None else layer.silenced(module, self.kept(name))
            return inputs.map(lambda index: silenced(inputs.parts[index]))
        columns = None if inputs.stored is None else inputs.stored.channels
        compute = layer.between(module, None if stored is None else rows, columns)
        return inputs.map(lambda index: compute(inputs.parts[index]), stored)

    def _heads(self, node: fx.Node, outputs: Chunks) -> Chunks:
        """Heads' outputs side by side, those of pruned heads zero."""
        kept = self.masks[str(node.target)]
        if bool(kept.all()):
            return outputs
        self._reached.add(node)
        first: Tensor = outputs.parts[0]
        factors = kept.to(first).repeat_interleave(first.shape[-1] // len(kept))
        return outputs.map(lambda index: outputs.parts[index] * factors)

    def _chunk_by_chunk(self, node: fx.Node) -> Any:
        """What a step gives for each chunk; of no images, at once."""
        if node.op == "placeholder" or node.op == "output":
            return super().run_node(node)
        sources = [source for source in node.all_input_nodes if isinstance(self.env[source], Chunks)]
        if not sources:
            return super().run_node(node)
        module = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ResidualSum) and len(sources) == 2:
            return self.env[sources[0]].plus(self.env[sources[1]])
        # Each channel by itself, and zeros stay zeros.
        is_by_channel = isinstance(module, Activation) or node.target in POOLS or _pads_images(node)
        stored = self.env[sources[0]].stored if is_by_channel else None
        chunked = [self.env[source] if stored is not None else self._full(source) for source in sources]
        args, keywords = self.fetch_args_kwargs_from_env(node)

        def step(index: int) -> Any:
            def part(value: Any) -> Any:
                return value.parts[index] if isinstance(value, Chunks) else value

            here = fx.node.map_aggregate(args, part), fx.node.map_aggregate(keywords, part)
            return getattr(self, node.op)(node.target, *here)

        return chunked[0].map(step, stored)


def _pads_images(node: fx.Node) -> bool:
    """Whether a step puts zeros around each channel of an image."""
    return pads_with_zeros(node) and len(arguments_of(node)[1]) <= 4 and len(shape_of(node)) == 3
