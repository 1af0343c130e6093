"""The way of relevance through a canonical network: which steps it takes, in which order, and where composites part.

Relevance flows from the logits to the first layer that has components. The way is cut into segments: each begins at
the first layer of a group that no layer before it belongs to, so two composites share all relevance up to the segment
of the first group whose rules differ, also where a user's groups don't follow the depth. Attention counts as a group of
its own, which begins where the first heads are met.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from objectives.attribution.attention import AttentionProduct, AttentionWeights
from objectives.attribution.operations import (
    Activation,
    AveragePool,
    ConstantGate,
    ConstantSum,
    ConstantTokens,
    LayerNorm,
    Operation,
    ResidualSum,
)
from objectives.network import CanonicalNetwork, shape_of
from objectives.steps import MOVES

__all__ = ["ATTENTION", "Plan", "Segment", "make_plan"]

aten = torch.ops.aten

ATTENTION = "attention"
"""The group of all attention, whose rule is the composite's `attention`."""

_RECTIFIERS = {aten.relu.default, aten.relu6.default}
_CLIPPERS = {aten.hardtanh.default}
_ATTENTION = (AttentionProduct, AttentionWeights)
_MODULES = (
    nn.Conv2d,
    nn.Linear,
    Activation,
    AveragePool,
    ConstantGate,
    ConstantSum,
    ConstantTokens,
    LayerNorm,
    ResidualSum,
    *_ATTENTION,
)


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A part of the way in which relevance depends on the rules of some groups.

    Attributes:
        group: whose rule first takes part here.
        groups: all whose layers are here.
        nodes: of the graph, in the order in which relevance passes them.
        components: layers whose scores are taken here, in that order.
        elements: of the largest input or output of a layer that relevance passes here, for one sample.
    """

    group: str
    groups: tuple[str, ...]
    nodes: tuple[fx.Node, ...]
    components: tuple[str, ...]
    elements: int


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What of a canonical network takes part in attribution.

    Attributes:
        module: the network's.
        logits: the node where relevance starts.
        segments: from the logits on.
        layer_groups: group of every layer and attention.
        wanted: nodes whose relevance is needed.
        non_negative: nodes whose values are never negative, whatever the images are.
        silent: nodes without relevance wherever their value isn't positive: their readers are rectifiers.
        elements: that one forward pass keeps for relevance, for one sample.
    """

    module: fx.GraphModule
    logits: fx.Node
    segments: tuple[Segment, ...]
    layer_groups: Mapping[str, str]
    wanted: frozenset[fx.Node]
    non_negative: frozenset[fx.Node]
    silent: frozenset[fx.Node]
    elements: int = field(repr=False)

    def sources(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes that receive relevance from `node`, as often as it reads them."""
        return tuple(source for source in _carriers(self.module, node) if source in self.wanted)


def make_plan(network: CanonicalNetwork, layer_groups: Mapping[str, str]) -> Plan | str:
    """The plan of a network; a text that names the step where the shared engine has no rule for one."""
    module, graph = network.module, network.module.graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    logits: fx.Node = output.args[0]
    path = _path(module, logits)
    components = network.components
    wanted: set[fx.Node] = set()
    for node in graph.nodes:
        if node in path and (node.target in components or not wanted.isdisjoint(_carriers(module, node))):
            wanted.add(node)
    for node in wanted:
        if not _is_known(module, node):
            return f"the step {node.name!r}"
    attention = [str(node.target) for node in wanted if _is_attention(module, node)]
    layer_groups = {**layer_groups, **dict.fromkeys(attention, ATTENTION)}
    non_negative = _non_negative(module, path)
    return Plan(
        module=module,
        logits=logits,
        segments=_segments(module, wanted, components, layer_groups),
        layer_groups=layer_groups,
        wanted=frozenset(wanted),
        non_negative=frozenset(non_negative),
        silent=frozenset(_silent(module, path)),
        # The value of each node, and two sums of its positive and of its negative contributions.
        elements=sum(math.prod(shape_of(node)) * (3 if _is_linear(module, node) else 1) for node in path),
    )


def _segments(
    module: nn.Module, wanted: set[fx.Node], components: Mapping[str, int], layer_groups: Mapping[str, str]
) -> tuple[Segment, ...]:
    """Cuts the way before the first layer of every group."""
    parts: list[tuple[list[str], list[fx.Node]]] = []
    seen: set[str] = set()
    before: list[fx.Node] = []
    for node in reversed(next(iter(wanted)).graph.nodes) if wanted else ():
        if node not in wanted:
            continue
        follows_rule = _is_linear(module, node) or _is_attention(module, node)
        if follows_rule and not wanted.isdisjoint(_carriers(module, node)):
            group = layer_groups[str(node.target)]
            if group not in seen:
                seen.add(group)
                parts.append(([], before if not parts else []))
            if group not in parts[-1][0]:
                parts[-1][0].append(group)
        (parts[-1][1] if parts else before).append(node)
    return tuple(
        Segment(
            group=groups[0],
            groups=tuple(groups),
            nodes=tuple(nodes),
            components=tuple(str(node.target) for node in nodes if node.target in components),
            elements=max(
                math.prod(shape_of(end))
                for node in nodes
                for source in _carriers(module, node)
                if (_is_linear(module, node) or _is_attention(module, node)) and source in wanted
                for end in (source, node)
            ),
        )
        for groups, nodes in parts
    )


def _path(module: nn.Module, logits: fx.Node) -> set[fx.Node]:
    path: set[fx.Node] = set()
    queue = [logits]
    while queue:
        node = queue.pop()
        if node not in path:
            path.add(node)
            queue.extend(_carriers(module, node))
    return path


def _carriers(module: nn.Module, node: fx.Node) -> tuple[fx.Node, ...]:
    """The tensors that a node shares its relevance among, as often as it reads them: a gate is a constant."""
    read: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), read.append)
    is_gate = node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), ConstantGate)
    carriers = read[:1] if is_gate else read
    return tuple(carrier for carrier in carriers if "shape" in carrier.meta)


def _is_linear(module: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), nn.Conv2d | nn.Linear)


def _is_attention(module: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), _ATTENTION)


def _is_known(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) in _MODULES
    return node.op == "call_function" and node.target in MOVES


def _rectifies(operation: Operation) -> bool:
    lowest = operation.arguments[0] if operation.arguments else operation.keywords.get("min_val", -1.0)
    return operation.operator in _RECTIFIERS or (operation.operator in _CLIPPERS and lowest == 0)


def _non_negative(module: nn.Module, path: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in next(iter(path)).graph.nodes:
        if node not in path:
            continue
        from_non_negative = bool(node.all_input_nodes) and found.issuperset(_carriers(module, node))
        operation: Any = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        match operation:
            case Activation():
                keeps = _rectifies(operation)
            case AveragePool() | ResidualSum() | ConstantGate():  # gates are made by sigmoids
                keeps = from_non_negative
            case _:
                keeps = node.target in MOVES and from_non_negative
        if keeps:
            found.add(node)
    return found


# Operations that give each input relevance in proportion to its value.
_PROPORTIONAL = (
    nn.Conv2d,
    nn.Linear,
    ResidualSum,
    AveragePool,
    ConstantSum,
    LayerNorm,
    AttentionProduct,
    AttentionWeights,
)


def _silent(module: nn.Module, path: set[fx.Node]) -> set[fx.Node]:
    """Nodes without relevance where their value isn't positive.

    Every step but the start gives its inputs relevance in proportion to their values, or passes on what its output has;
    so a value of zero has none, and a rectifier carries this to the values below zero that it made zero.
    """
    without_at_zero: set[fx.Node] = set()
    silent: set[fx.Node] = set()
    for node in reversed(next(iter(path)).graph.nodes):
        if node not in path:
            continue
        readers = [user for user in node.users if user in path and node in _carriers(module, user)]
        proportional, rectified = bool(readers), bool(readers)
        for reader in readers:
            operation: Any = module.get_submodule(str(reader.target)) if reader.op == "call_module" else None
            passes_on = not isinstance(operation, _PROPORTIONAL)
            proportional &= not passes_on or reader in without_at_zero
            rectified &= isinstance(operation, Activation) and _rectifies(operation) and reader in without_at_zero
        if any(user.op == "output" for user in node.users):
            proportional = rectified = False
        if proportional:
            without_at_zero.add(node)
        if rectified:
            silent.add(node)
    return silent
