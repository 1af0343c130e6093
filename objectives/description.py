"""What a rewritten graph is: its layers, residual sums, blocks and kinds of components, each of its steps known."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from objectives.attribution.attention import Heads
from objectives.attribution.operations import ConstantGate, ResidualSum
from objectives.errors import UnsupportedNetworkError
from objectives.network import CanonicalNetwork, Layer, lies_in, n_channels, shape_of
from objectives.steps import MOVES, arguments_of, name_of

__all__ = ["RewrittenGraph", "describe"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class RewrittenGraph:
    """A graph rewritten step by step, and what was found on the way.

    Attributes:
        module: the graph and its modules.
        input_shape: (C, H, W).
        heads: of each attention, by the name of its module.
        folded: name of the batch norm folded into a layer, by the layer's.
        scales: names of the parameters that a layer's outputs are multiplied by, folded into it, by the layer's name.
        averaged: name of the other of two layers whose mean one computes, by that one's.
        scopes: name of the innermost module of the user's network whose forward made a node.
        not_by_image: nodes whose first dimension isn't the images'.
    """

    module: fx.GraphModule
    input_shape: tuple[int, int, int]
    heads: dict[str, Heads]
    folded: dict[str, str]
    scales: dict[str, tuple[str, ...]]
    averaged: dict[str, str]
    scopes: dict[fx.Node, str]
    not_by_image: set[fx.Node]


def describe(graph: RewrittenGraph) -> CanonicalNetwork:
    """The canonical network that a rewritten graph is.

    Raises:
        UnsupportedNetworkError: relevance flows through a step that isn't known, or the logits aren't a layer's.
    """
    module = graph.module
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    carrying = _relevance_path(module, output.args[0])
    for node in module.graph.nodes:
        if node in carrying:
            _check(graph, node)
    layers: dict[str, Layer] = {}
    for node in module.graph.nodes:
        if node in carrying and node.op == "call_module" and _is_layer(module, node):
            name = str(node.target)
            layers[name] = Layer(
                name,
                width=n_channels(shape_of(node)),
                norm=graph.folded.get(name),
                input_shape=shape_of(node.all_input_nodes[0]),
                output_shape=shape_of(node),
                kernel=tuple(getattr(module.get_submodule(name), "kernel_size", (1, 1))),
                scales=graph.scales.get(name, ()),
                averaged=graph.averaged.get(name),
            )
    if not layers:
        raise UnsupportedNetworkError("The network has no convolution or dense layer that relevance flows through.")
    classifier = _classifier(output.args[0], layers)
    sums = [
        node
        for node in module.graph.nodes
        if node in carrying and node.op == "call_module" and isinstance(module.get_submodule(node.target), ResidualSum)
    ]
    scopes = tuple(dict.fromkeys(graph.scopes[node] for node in sums))
    blocks = _blocks(scopes, layers, classifier, graph.heads)
    return CanonicalNetwork(
        module=module,
        layers=layers,
        classifier=classifier,
        residual_scopes=scopes,
        residual_sums=tuple(str(node.target) for node in sums),
        blocks=blocks,
        input_shape=graph.input_shape,
        heads=graph.heads,
        kinds=_kinds(graph, layers, classifier, blocks),
    )


def _kinds(
    graph: RewrittenGraph, layers: dict[str, Layer], classifier: str, blocks: Sequence[Sequence[str]]
) -> dict[str, str]:
    """Kind of all that could be components, by name in forward order."""
    if not graph.heads:
        return {name: "filters" for name in layers if name != classifier}
    no_mlp = {name for heads in graph.heads.values() for name in (heads.query, heads.key, heads.value)} | {classifier}
    kinds = {}
    for node in graph.module.graph.nodes:
        name = str(node.target)
        if name in graph.heads:
            kinds[name] = "heads"
            continue
        if name not in layers or name in no_mlp or layers[name].is_convolution:
            continue
        in_block = any(lies_in(name, *block) for block in blocks)
        if in_block and not _reads_heads(graph.module, node, graph.heads):
            kinds[name] = "mlp"
    return kinds


def _check(graph: RewrittenGraph, node: fx.Node) -> None:
    known = node.op in ("placeholder", "output", "call_module") or node.target in MOVES
    if known and node.target in (aten.constant_pad_nd.default, aten.pad.default):
        mode_and_value = (*arguments_of(node)[2:], *node.kwargs.values())
        known = all(argument in (None, 0, "constant") for argument in mode_and_value)
    if known and node.op == "call_module" and isinstance(graph.module.get_submodule(str(node.target)), nn.Linear):
        known = len(shape_of(node)) <= (2 if graph.heads else 1)
    if any(source.op == "get_attr" for source in node.all_input_nodes):
        known = False  # a parameter that takes part otherwise than as a weight would take relevance unseen
    scope = graph.scopes.get(node)
    place = f"module {scope!r}" if scope else "the root module"
    if not known:
        raise UnsupportedNetworkError(
            f"The step {name_of(node)!r} in {place} has no relevance "
            "rule here, so the network can't be attributed correctly."
        )
    if node in graph.not_by_image:
        raise UnsupportedNetworkError(
            f"The step {name_of(node)!r} in {place} gives values whose first dimension isn't the images' "
            "(MobileViT folds patches into it), so relevance can't be told apart by image."
        )


def _classifier(logits: fx.Node, layers: dict[str, Layer]) -> str:
    node = logits
    while not (node.op == "call_module" and node.target in layers):
        source = arguments_of(node)[0] if node.target in MOVES else None
        if not isinstance(source, fx.Node):
            raise UnsupportedNetworkError(
                f"The logits aren't the outputs of a dense layer: they come from {node.name!r}."
            )
        node = source
    name = str(node.target)
    if math.prod(shape_of(node)) != layers[name].width or math.prod(shape_of(logits)) != layers[name].width:
        raise UnsupportedNetworkError(f"The last layer {name!r} doesn't give one value a class.")
    return name


def _relevance_path(module: fx.GraphModule, logits: fx.Node) -> set[fx.Node]:
    """Every node that relevance reaches from the logits: gates are constants, sizes are no tensors."""
    path: set[fx.Node] = set()
    queue = [logits]
    while queue:
        node = queue.pop()
        if node in path or "shape" not in node.meta:
            continue
        path.add(node)
        is_gate = node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), ConstantGate)
        queue.extend(node.all_input_nodes[:1] if is_gate else node.all_input_nodes)
    return path


def _blocks(
    residual_scopes: Sequence[str], layers: Mapping[str, Layer], classifier: str, heads: Collection[str]
) -> tuple[tuple[str, ...], ...]:
    """Residual scopes of each block, in forward order.

    They are the innermost one around an attention's heads, and those behind it with dense layers and no other block's
    heads: there attention and MLP have a residual sum each in a module of its own.
    """
    around = [[scope for scope in residual_scopes if scope and lies_in(name, scope)] for name in heads]
    blocks: dict[str, list[str]] = {max(scopes, key=len): [] for scopes in around if scopes}
    latest = None
    for scope in residual_scopes:
        if scope in blocks:
            latest = scope
        elif latest is not None and scope and not lies_in(classifier, scope):
            dense = any(lies_in(name, scope) and not layer.is_convolution for name, layer in layers.items())
            if dense and all(lies_in(name, latest) for name in heads if lies_in(name, scope)):
                blocks[latest].append(scope)
    return tuple((scope, *further) for scope, further in blocks.items())


def _reads_heads(module: fx.GraphModule, node: fx.Node, heads: dict[str, Heads]) -> bool:
    """Whether a layer reads heads' outputs with no other layer in between."""
    queue = list(node.all_input_nodes)
    while queue:
        source = queue.pop()
        if source.target in heads:
            return True
        if not (source.op == "call_module" and _is_layer(module, source)):
            queue.extend(source.all_input_nodes)
    return False


def _is_layer(module: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(module.get_submodule(str(node.target)), nn.Conv2d | nn.Linear)
