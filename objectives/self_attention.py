"""Self-attention as it stands in an exported graph, fused or not.

Both forms of timm's vision transformers begin with one layer of q, k and v for all heads and end with the heads'
outputs side by side:

    linear -> reshape (N, T, 3, heads, d) -> permute -> unbind -> [norm of q and k] -> attention -> transpose -> reshape

where attention is one operator, or scores, softmax and product.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

__all__ = ["SelfAttention", "find_self_attention"]

aten = torch.ops.aten

_SOFTMAXES = {aten.softmax.int, aten._softmax.default}
_RESHAPES = {aten.reshape.default, aten.view.default}
_PASSED = {aten.dropout.default, aten.clone.default, aten.contiguous.default}


@dataclass(frozen=True, slots=True, eq=False)
class SelfAttention:
    """One attention, from its layer of q, k and v to its heads' outputs.

    Attributes:
        projection: the layer of q, k and v.
        query_norm: the layer norm of q, if there is one.
        key_norm: likewise of k.
        operator: the node of the attention itself, by which its module is known.
        output: heads' outputs side by side, (N, tokens, heads * head_dim).
        interior: all nodes between `projection` and `output`, and `output`.
        n_heads: number of heads.
        head_dim: values of a head for one token.
        scale: of the scores.
    """

    projection: fx.Node
    query_norm: fx.Node | None
    key_norm: fx.Node | None
    operator: fx.Node
    output: fx.Node
    interior: frozenset[fx.Node]
    n_heads: int
    head_dim: int
    scale: float


def find_self_attention(nodes: Iterable[fx.Node]) -> Iterator[SelfAttention]:
    """Every attention of a form known here; others are left as they are."""
    for node in nodes:
        if node.target is aten.scaled_dot_product_attention.default or node.target in _SOFTMAXES:
            found = _match(node)
            if found is not None:
                yield found


@dataclass(slots=True, eq=False)
class _Operand:
    """q, k or v: which of the three it is, and what is done to it on the way."""

    index: int
    stack: fx.Node
    norm: fx.Node | None
    scale: float
    passed: list[fx.Node]


def _match(operator: fx.Node) -> SelfAttention | None:
    parts = _unfused(operator) if operator.target in _SOFTMAXES else _fused(operator)
    if parts is None:
        return None
    (query, key, value), scale, product, interior = parts
    operands = [_operand(node) for node in (query, key, value)]
    if any(operand is None for operand in operands):
        return None
    q, k, v = (operand for operand in operands if operand is not None)
    if (q.index, k.index, v.index) != (0, 1, 2) or not q.stack is k.stack is v.stack or v.norm or v.scale != 1:
        return None
    projection = _projection(q.stack)
    if projection is None:
        return None
    layer, between = projection
    n_heads, _, head_dim = (int(size) for size in q.stack.meta["val"][0].shape[1:])
    output = _joined(product, n_heads * head_dim)
    if output is None:
        return None
    after, last = output
    inside = frozenset([operator, *interior, *q.passed, *k.passed, *v.passed, q.stack, *between, product, *after])
    if not all(user in inside or _is_size(user) for node in (inside - {last}) for user in node.users):
        return None
    if not all(user in inside for user in layer.users):
        return None
    scale = (1 / math.sqrt(head_dim) if scale is None else scale) * q.scale * k.scale
    return SelfAttention(layer, q.norm, k.norm, operator, last, inside, n_heads, head_dim, scale)


_Parts = tuple[tuple[fx.Node, fx.Node, fx.Node], float | None, fx.Node, list[fx.Node]]


def _fused(operator: fx.Node) -> _Parts | None:
    query, key, value, *further = operator.args
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    options: dict[str, Any] = {**dict(zip(names, further, strict=False)), **operator.kwargs}
    scale = options.pop("scale", None)
    if any(options.values()):
        return None
    return (query, key, value), scale, operator, []  # type: ignore[return-value] # of an operator on three tensors


def _unfused(operator: fx.Node) -> _Parts | None:
    scores: Any
    scores, dimension, *_ = operator.args
    if dimension not in (-1, 3) or scores.target is not aten.matmul.default:
        return None
    query, transposed = scores.args
    if transposed.target is not aten.transpose.int or not _swaps(transposed, -2, -1):
        return None
    interior = [scores, transposed]
    weights = operator
    while (user := _only_user(weights)) is not None and _passes(user):
        interior.append(user)
        weights = user
    if user is None or user.target is not aten.matmul.default or user.args[0] is not weights:
        return None
    value: Any = user.args[1]
    return (query, transposed.args[0], value), 1.0, user, interior


def _operand(node: fx.Node) -> _Operand | None:
    norm, scale, passed = None, 1.0, []
    while True:
        arguments: Any = node.args
        passed.append(node)
        if _passes(node):
            pass
        elif node.target is aten.mul.Tensor and norm is None and isinstance(arguments[1], int | float):
            scale *= arguments[1]
        elif node.target is aten.layer_norm.default and norm is None:
            norm = node
        elif getattr(node.target, "__name__", "") == "getitem" and arguments[0].target is aten.unbind.int:
            return _Operand(arguments[1], arguments[0], norm, scale, passed)
        else:
            return None
        node = arguments[0]


def _projection(stack: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The layer of q, k and v, and the nodes that take it apart."""
    permuted: Any = stack.args[0]
    if permuted.target is not aten.permute.default or list(permuted.args[1]) != [2, 0, 3, 1, 4] or stack.args[1:]:
        return None
    reshaped = permuted.args[0]
    if reshaped.target not in _RESHAPES or reshaped.args[0].target is not aten.linear.default:
        return None
    shape = reshaped.meta["val"].shape
    layer: fx.Node = reshaped.args[0]
    if len(layer.meta["val"].shape) != 3 or shape[2] != 3:
        return None
    return layer, [permuted, reshaped]


def _joined(product: fx.Node, width: int) -> tuple[list[fx.Node], fx.Node] | None:
    """What puts the heads' outputs side by side, and its last node."""
    transposed = _only_user(product)
    if transposed is None or transposed.target is not aten.transpose.int or not _swaps(transposed, 1, 2):
        return None
    between = [transposed]
    last = _only_user(transposed)
    while last is not None and _passes(last):
        between.append(last)
        last = _only_user(last)
    if last is None or last.target not in _RESHAPES or tuple(last.meta["val"].shape[2:]) != (width,):
        return None
    return [*between, last], last


def _passes(node: fx.Node) -> bool:
    """Whether a step leaves its values as they are; an active dropout doesn't."""
    return node.target in _PASSED and not (node.target is aten.dropout.default and node.args[2])


def _swaps(node: fx.Node, first: int, second: int) -> bool:
    rank = len(node.meta["val"].shape)
    dimensions: Collection[Any] = node.args[1:]
    return {int(dimension) % rank for dimension in dimensions} == {first % rank, second % rank}


def _only_user(node: fx.Node) -> fx.Node | None:
    users = [user for user in node.users if not _is_size(user)]
    return users[0] if len(users) == 1 else None


def _is_size(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), torch.Tensor | list | tuple)
