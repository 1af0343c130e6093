"""The order of a repair: the layer that ends a branch comes last before its sum, and can make up for what went before.

In a residual block the sum of the original is the last layer's target, less what the pruned shortcut brings. Where both
branches end in a layer, the one with more weights does so.

Of a transformer only the layers that write what heads and MLP neurons give to the stream are repaired, and the
classifier: what they compute is linear in what pruning leaves. The patch embedding, the layers of q, k and v and the
MLPs' first ones, read by attention and activations, stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from objectives.attribution.attention import AttentionProduct, AttentionWeights
from objectives.attribution.operations import Activation, ResidualSum
from objectives.network import shape_of
from objectives.repair.rows import LinearLayer

__all__ = ["OrderedNetwork", "order"]


@dataclass(frozen=True, slots=True, eq=False)
class OrderedNetwork:
    """A canonical graph in the order in which its layers are repaired.

    Attributes:
        module: computes what the canonical network computes, with its layers.
        layers: every convolution and dense layer by name, those of gates too, in this order.
        repairable: names of those that a repair may change.
        is_transformer: whether it has attention.
        sums: name of a layer that ends a branch -> the sum that it is the last summand of.
        shortcuts: name of such a layer -> the sum's other summand.
    """

    module: fx.GraphModule
    layers: dict[str, LinearLayer]
    repairable: frozenset[str]
    is_transformer: bool
    sums: dict[str, fx.Node]
    shortcuts: dict[str, fx.Node]


def order(module: fx.GraphModule) -> OrderedNetwork:
    """A canonical network in the order of repair.

    Args:
        module: of a `CanonicalNetwork`; it isn't changed.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    for old, new in copies.items():
        new.meta = dict(old.meta)
    sums: dict[str, fx.Node] = {}
    shortcuts: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if not _is(module, node, ResidualSum):
            continue
        branches = [branch for branch in node.all_input_nodes if _is_layer(module, branch) and len(branch.users) == 1]
        if len(node.all_input_nodes) == 2 and branches:
            last = max(branches, key=lambda branch: _n_weights(module, branch))
            node.prepend(last)
            sums[str(last.target)] = node
            (shortcuts[str(last.target)],) = (branch for branch in node.all_input_nodes if branch is not last)
    ordered = fx.GraphModule(module, graph, "OrderedNetwork").eval()
    layers = {
        str(node.target): LinearLayer(module.get_submodule(str(node.target)), shape_of(node))  # type: ignore[arg-type]
        for node in graph.nodes
        if _is_layer(module, node)
    }
    is_transformer = any(_is(module, node, AttentionProduct) for node in graph.nodes)
    repairable = frozenset(
        str(node.target)
        for node in graph.nodes
        if _is_layer(module, node) and not (is_transformer and (_is_read(module, node) or _reads_images(node)))
    )
    return OrderedNetwork(ordered, layers, repairable, is_transformer, sums, shortcuts)


def _reads_images(layer: fx.Node) -> bool:
    return any(node.op == "placeholder" for node in layer.all_input_nodes)


def _is_read(module: fx.GraphModule, layer: fx.Node) -> bool:
    """Whether an activation or attention reads a layer's outputs, with no other layer or sum in between."""
    readers = list(layer.users)
    for node in readers:
        if _is(module, node, (Activation, AttentionWeights, AttentionProduct)):
            return True
        if not _is_layer(module, node) and not _is(module, node, ResidualSum):
            readers.extend(node.users)
    return False


def _is(module: fx.GraphModule, node: fx.Node, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), kind)


def _is_layer(module: fx.GraphModule, node: fx.Node) -> bool:
    return _is(module, node, (nn.Conv2d, nn.Linear))


def _n_weights(module: fx.GraphModule, node: fx.Node) -> int:
    weight = module.get_submodule(str(node.target)).weight
    assert isinstance(weight, torch.Tensor)
    return weight.numel()
