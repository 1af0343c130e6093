"""Tokens: a network computes those alone that its logits depend on.

Where a vision transformer's logits are read from the class token, its last block's queries, the MLP and all between
them are needed of that token only, keys and values of all. (Queries that are normed by head are computed for all
tokens.) The logits stay the same up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from objectives.network import shape_of
from objectives.pruning.slimming import Draft
from objectives.steps import ACTIVATIONS

__all__ = ["leave_out_tokens"]

aten = torch.ops.aten


def leave_out_tokens(network: Draft) -> None:
    """Leaves out what a slim network computes of tokens that no logit depends on.

    Args:
        network: made by `slimming.draft`; it is changed.
    """
    needed: dict[fx.Node, int] = {}  # how many of the first tokens, of values of which not all are
    for node in reversed(network.graph.nodes):
        if node.users and _operands(network, node):
            demands = [_demand(network, user, node, needed) for user in node.users]
            known = [demand for demand in demands if demand is not None]
            if len(known) == len(demands):
                needed[node] = max(known)
    for node, n_tokens in needed.items():
        for source in _operands(network, node):
            if needed.get(source, math.inf) > n_tokens:
                axis = _token_axis(source)
                with network.graph.inserting_before(node):
                    part = network.graph.call_function(aten.slice.Tensor, (source, axis, 0, n_tokens))
                _shorten(part, source, n_tokens)
                node.replace_input_with(source, part)
        _shorten(node, node, n_tokens)


def _demand(network: Draft, user: fx.Node, source: fx.Node, needed: Mapping[fx.Node, int]) -> int | None:
    """How many of the first tokens of `source` a node needs; None for all of them."""
    arguments: Any = user.args
    if user.target is aten.select.int and arguments[1] == _token_axis(source) and arguments[2] >= 0:
        return int(arguments[2]) + 1
    if source in _others(user) or source not in _operands(network, user):
        return None
    return needed.get(user)


def _operands(network: Draft, node: fx.Node) -> Sequence[fx.Node]:
    """Values of which each token goes into the same token of a node's value, and into no other one.

    Empty where a node isn't known to be of that kind.
    """
    arguments: Any = node.args
    match node.target:
        case aten.add.Tensor:
            operands = arguments
        case aten.index_add.default if arguments[1] == 2:
            operands = (arguments[0], arguments[3])
        case aten.scaled_dot_product_attention.default | aten.unflatten.int:
            operands = arguments[:1]
        case aten.transpose.int if "shape" not in node.meta:  # of heads and tokens
            operands = arguments[:1]
        case aten.flatten.using_ints if arguments[1:] == (2,):
            operands = arguments[:1]
        case _ if node.op == "call_module":
            layer = network.get_submodule(str(node.target))
            operands = arguments if isinstance(layer, nn.Linear | nn.LayerNorm) else ()
        case _:
            operands = arguments[:1] if node.target in ACTIVATIONS else ()
    return operands if _has_tokens(node) and all(map(_has_tokens, operands)) else ()


def _others(node: fx.Node) -> Sequence[fx.Node]:
    """Values of which every token of a node's value needs all: an attention's keys and values."""
    return node.all_input_nodes[1:] if node.target is aten.scaled_dot_product_attention.default else ()


def _has_tokens(value: Any) -> bool:
    return isinstance(value, fx.Node) and _token_axis(value) is not None


def _token_axis(node: fx.Node) -> int | None:
    """The axis of tokens of a value (N, T, C), (N, T, heads, d) or (N, heads, T, d), counted with N.

    Those by head stand inside an attention of the slim network and have no shape of their own. Of any other value of
    two axes beside N the first one counts as that of tokens: what works row by row on it keeps them apart.
    """
    arguments: Any = node.args
    if node.target is aten.scaled_dot_product_attention.default:
        return 2
    if node.target is aten.unflatten.int:  # into heads
        return 1 if arguments[1] == -1 and _token_axis(arguments[0]) == 1 else None
    if node.target is aten.transpose.int and arguments[1:] == (1, 2) and "shape" not in node.meta:
        axis = _token_axis(arguments[0])
        return None if axis is None else 3 - axis
    return 1 if len(node.meta.get("shape", ())) == 2 else None


def _shorten(node: fx.Node, like: fx.Node, n_tokens: int) -> None:
    """The shape of a node's value is another's with so many tokens."""
    axis = _token_axis(like)
    if "shape" in like.meta and axis is not None:
        shape = list(shape_of(like))
        shape[axis - 1] = n_tokens
        node.meta["shape"] = tuple(shape)
