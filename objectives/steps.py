"""The steps of an exported graph: the ATen operators that are known, and what a node tells of its step."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from objectives.errors import UnsupportedNetworkError

__all__ = [
    "ACTIVATIONS",
    "ASSERTIONS",
    "AVERAGES",
    "CONVERSIONS",
    "CONVOLUTIONS",
    "EXPANSIONS",
    "FLATTENS",
    "GATE_ACTIVATIONS",
    "IDENTITIES",
    "MOVES",
    "PADS",
    "PARTS",
    "POOLS",
    "PRODUCTS",
    "RESHAPES",
    "SQUEEZES",
    "SUMS",
    "arguments_of",
    "is_alias",
    "is_whole",
    "keeps_dtype",
    "name_of",
    "out_of_place",
    "overwrites",
    "pads_with_zeros",
    "place_of",
    "scope_of",
]

aten = torch.ops.aten

CONVOLUTIONS = {aten.conv2d.default, aten.conv2d.padding}
# Activations f with f(0) = 0: a pruned filter, whose output is zero, stays zero behind them.
ACTIVATIONS = {
    aten.relu.default,
    aten.relu_.default,
    aten.relu6.default,
    aten.relu6_.default,
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.silu.default,
    aten.silu_.default,
    aten.hardswish.default,
    aten.hardswish_.default,
    aten.gelu.default,
    aten.leaky_relu.default,
    aten.leaky_relu_.default,
    aten.elu.default,
    aten.elu_.default,
    aten.selu.default,
    aten.mish.default,
    aten.mish_.default,
    aten.tanh.default,
}
GATE_ACTIVATIONS = {
    aten.sigmoid.default,
    aten.sigmoid_.default,
    aten.hardsigmoid.default,
    aten.hardsigmoid_.default,
}
EXPANSIONS = {aten.expand.default, aten.expand_as.default}
AVERAGES = {aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim}
SUMS = {aten.add.Tensor, aten.add_.Tensor, operator.add, operator.iadd}
PRODUCTS = {aten.mul.Tensor, aten.mul_.Tensor, operator.mul, operator.imul}
IDENTITIES = {
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
}
CONVERSIONS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
}
ASSERTIONS = {aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default}
FLATTENS = {aten.flatten.using_ints, aten.view.default, aten.reshape.default}
SQUEEZES = {aten.squeeze.dims, aten.squeeze.dim}
# Steps that leave values and their order as they are.
RESHAPES = FLATTENS | SQUEEZES
POOLS = {aten.max_pool2d.default, aten.adaptive_max_pool2d.default}
PARTS = {aten.slice.Tensor, aten.select.int}
PADS = {aten.constant_pad_nd.default, aten.pad.default}
# Steps whose gradient already is the right redistribution: they move or select values. What is never negative stays so.
MOVES = RESHAPES | POOLS | PARTS | PADS | {aten.transpose.int, aten.cat.default}


def scope_of(node: fx.Node) -> str:
    """Name of the innermost module whose forward made the node."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def place_of(node: fx.Node) -> str:
    """The innermost module whose forward made the node, as messages name it."""
    scope = scope_of(node)
    return f"module {scope!r}" if scope else "the root module"


def name_of(node: fx.Node) -> str:
    """Name of a node's operator."""
    return getattr(node.target, "_opname", None) or getattr(node.target, "__name__", None) or str(node.target)


def arguments_of(node: fx.Node) -> tuple[Any, ...]:
    """A node's positional arguments, whose types its operator decides."""
    return node.args


def overwrites(node: fx.Node) -> bool:
    """Whether an operator changes its first argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def out_of_place(node: fx.Node) -> Any:
    """The operator that computes what an in-place one writes: a backward pass or a second reader needs its input."""
    if not overwrites(node):
        return node.target
    schema = node.target._schema  # type: ignore[union-attr]
    packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
    plain = getattr(packet, schema.overload_name or "default", None)
    if plain is None or plain._schema.is_mutable:
        raise UnsupportedNetworkError(
            f"The in-place step {name_of(node)!r} in {place_of(node)} has no form that isn't."
        )
    return plain


def is_alias(node: fx.Node) -> bool:
    """Whether an operator's result shares memory with its first argument."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    return any(result.alias_info is not None for result in schema.returns) or "dropout" in schema.name


def is_whole(node: fx.Node) -> bool:
    """Whether a slice leaves nothing out."""
    return bool(node.meta["val"].shape == arguments_of(node)[0].meta["val"].shape)


def pads_with_zeros(node: fx.Node) -> bool:
    """Whether a step puts zeros around its first argument, along as many dimensions as its second argument says."""
    return node.target in PADS and {*node.args[2:], *node.kwargs.values()} <= {"constant", None, 0}


def keeps_dtype(node: fx.Node) -> bool:
    """Whether a conversion changes no dtype."""
    before, after = arguments_of(node)[0].meta["val"], node.meta["val"]
    return bool(before.dtype == after.dtype)
