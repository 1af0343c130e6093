"""Programs: networks as they are run in evaluation."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from objectives.pruning.slimming import Draft, like

__all__ = ["Program"]


class Program:
    """A network as the list of its steps, run one after the other.

    To write Python code for a network and compile it (`fx.GraphModule`) takes longer than a pass over few images; to
    look a node up at every step (`fx.Interpreter`) doubles the overhead of small layers.

    Args:
        network: of which the modules and tensors are used as they are.

    Attributes:
        graph: the network's.
    """

    def __init__(self, network: Draft) -> None:
        self.graph = network.graph
        self._network = network
        places = {node: place for place, node in enumerate(self.graph.nodes)}
        self._values: list[Any] = [None] * len(places)
        self._inputs: list[int] = []
        self._steps: list[_Step] = []
        last_reads: dict[fx.Node, _Step] = {}
        for node, place in places.items():
            if node.op == "placeholder":
                self._inputs.append(place)
            elif node.op == "get_attr":
                self._values[place] = operator.attrgetter(str(node.target))(network)
            elif node.op == "output":
                (self._logits,) = (places[source] for source in node.all_input_nodes)
            else:
                target: Any = node.target
                step = _Step(network.get_submodule(target) if node.op == "call_module" else target, node, places)
                self._steps.append(step)
                last_reads |= dict.fromkeys(node.all_input_nodes, step)
        for node, step in last_reads.items():
            if node.op != "get_attr" and places[node] != self._logits:
                step.read_last.append(places[node])

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Images (N, C, H, W), and whatever else the graph is given -> logits (N, classes)."""
        values = self._values.copy()
        for place, value in zip(self._inputs, inputs, strict=True):
            values[place] = value
        for step in self._steps:
            values[step.place] = step(values)
            for place in step.read_last:  # its memory is free for what comes
                values[place] = None
        logits: Tensor = values[self._logits]
        return logits

    def silenced(self, kept: Mapping[str, Tensor]) -> Program:
        """The same network with zeros in place of some outputs of its layers; it shares all that this doesn't change.

        Args:
            kept: layer -> (outputs,) of bool, on the layers' device: those that stay.

        Raises:
            ValueError: a layer doesn't compute its own outputs in order and no others, see `moves` of `fused`.
        """
        layers = {}
        for name, mask in kept.items():
            if not mask.all():
                layer: Any = self._network.get_submodule(name)
                if len(layer.weight) != len(mask):
                    raise ValueError(f"Layer {name!r} has {len(layer.weight)} outputs, but got {len(mask)} to keep.")
                weight = layer.weight * mask.view(-1, *[1] * (layer.weight.ndim - 1))
                layers[name] = like(layer, weight, None if layer.bias is None else layer.bias * mask)
        new = copy.copy(self)
        new._values = self._values.copy()
        for place, node in enumerate(self.graph.nodes):
            if node.op == "get_attr":
                name, tensor_of = node.meta.get("of_layer", (None, None))
                if name in layers:
                    new._values[place] = tensor_of(layers[name])
        new._steps = [step.calling(layers[step.layer]) if step.layer in layers else step for step in self._steps]
        return new


class _Step:
    """One call: of what, and where the values are that it takes.

    Attributes:
        place: of its value.
        read_last: places of values that no later step takes.
        layer: name of the module that it calls, if it calls one.
    """

    def __init__(self, function: Callable[..., Any], node: fx.Node, places: dict[fx.Node, int]) -> None:
        self.place = places[node]
        self.read_last: list[int] = []
        self.layer = str(node.target) if node.op == "call_module" else None
        self._function = function
        self._arguments, self._keywords = list(node.args), dict(node.kwargs)
        self._taken = [(index, places[each]) for index, each in enumerate(node.args) if isinstance(each, fx.Node)]
        nested = set(node.all_input_nodes) - {each for each in node.args if isinstance(each, fx.Node)}
        self._places = places if nested else None

    def __call__(self, values: list[Any]) -> Any:
        """The step's value, from those before it."""
        places = self._places
        if places is None:
            arguments = self._arguments.copy()
            for index, place in self._taken:
                arguments[index] = values[place]
            return self._function(*arguments, **self._keywords)
        given: Any = fx.node.map_arg((tuple(self._arguments), self._keywords), lambda node: values[places[node]])
        return self._function(*given[0], **given[1])

    def calling(self, layer: nn.Module) -> _Step:
        """The same step of another layer."""
        new = copy.copy(self)
        new._function = layer
        return new
