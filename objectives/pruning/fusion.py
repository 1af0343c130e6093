"""Fusion: the slim network once more, arranged so that its layers do nothing but multiply and add.

A slim network moves channels between its layers: it selects those that a layer still reads, and adds a branch's few
channels to the many of a residual stream. Where a convolution computes the moved value, its rows can stand in the right
places from the start, rows of zeros among them: the same numbers without a copy. On a CPU, what follows a convolution
(its activation, the sum with a residual stream) is then left to oneDNN, which does it while the values are in registers
(as PyTorch's own Inductor does).

Everything here keeps the function that the network computes up to rounding; sizes are counted before.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from objectives.network import shape_of
from objectives.pruning.program import Program
from objectives.pruning.slimming import Convolution, Draft
from objectives.pruning.tokens import leave_out_tokens

__all__ = ["fused", "images_cached", "largest_step", "step_sizes"]

aten = torch.ops.aten

# Operators f with f(0) = 0 that work value by value: a row of zeros stays one behind them.
_ELEMENTWISE = {
    aten.relu.default: ("relu", ()),
    aten.relu_.default: ("relu", ()),
    aten.relu6.default: ("hardtanh", (0.0, 6.0)),
    aten.relu6_.default: ("hardtanh", (0.0, 6.0)),
    aten.hardtanh.default: ("hardtanh", None),
    aten.hardtanh_.default: ("hardtanh", None),
    aten.silu.default: ("swish", ()),
    aten.silu_.default: ("swish", ()),
    aten.hardswish.default: ("hardswish", ()),
    aten.hardswish_.default: ("hardswish", ()),
}
# What a CPU's caches hold of a step's inputs and outputs. Of images of 32 pixels whole batches fit; of MobileNetV2's at
# 224 pixels four do, which takes a third of the time of fifty (measured on an EPYC).
_BYTES_CACHED = 24 * 2**20
# What oneDNN can fuse behind a convolution that adds.
_BEHIND_A_SUM = {aten.relu.default, aten.relu_.default}
# Channels that oneDNN computes together: rows that fill up a vector cost nothing.
_VECTOR = 16
# What moving one channel costs, in multiply-adds a value (measured on a CPU with AVX-512).
_MOVE = 32
# Entries of the 0/1 matrix up to which a product is faster than `index_add` (measured on a CPU with AVX-512).
_LARGEST_MATRIX = 2**14


def fused(network: Draft, *, moves: bool = True) -> Program:
    """The same function, faster.

    Args:
        network: made by `slimming.draft`, on its device and in its dtype; it is used up.
        moves: whether layers may compute their rows elsewhere, with zeros between them.
    """
    leave_out_tokens(network)
    if moves:
        _move_rows(network)
    _widen_kernels(network)
    if _has_onednn(network):
        _multiply_attention(network)
        _LayerFusion(network).run()
    network.erase_unread()
    return Program(network)


def _has_onednn(module: Draft) -> bool:
    """Whether oneDNN computes this network here, in its dtype."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    dtypes = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.add(torch.bfloat16)
    tensors = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    return all(tensor.device.type == "cpu" and tensor.dtype in dtypes for tensor in tensors)


def largest_step(graph: fx.Graph) -> int:
    """Values that a slim network's largest step reads and writes for one image."""
    return max(step_sizes(graph))


def step_sizes(graph: fx.Graph) -> list[int]:
    """Values that each step of a slim network reads and writes for one image, weights aside."""
    sizes = {node: math.prod(shape_of(node)) for node in graph.nodes if "shape" in node.meta}
    return [size + sum(sizes.get(source, 0) for source in node.all_input_nodes) for node, size in sizes.items()]


def images_cached(graph: fx.Graph, dtype: torch.dtype, device: torch.device) -> int | None:
    """Images a pass beyond which larger batches gain nothing, as a CPU's caches hold no more; None elsewhere."""
    if device.type != "cpu":
        return None
    return max(1, _BYTES_CACHED // (largest_step(graph) * dtype.itemsize))


# Rows in their places.


def _move_rows(module: Draft) -> None:
    for node in list(module.graph.nodes):
        if node.target is aten.index_select.default:
            source, _, indices = node.args
            rows = _constant(module, indices)
            everywhere = torch.arange(len(rows), device=rows.device)
            moved = source if _reorder(module, source, rows, everywhere, len(rows)) else None
        elif node.target is aten.index_copy.default and node.args[0].target is aten.new_zeros.default:
            _, _, places, source = node.args
            moved = _scattered(module, node, source, _constant(module, places))
        elif node.target is aten.index_add.default:
            stream, _, places, source = node.args
            moved = _scattered(module, node, source, _constant(module, places))
            if moved is not None:
                with module.graph.inserting_before(node):
                    moved = module.graph.call_function(aten.add.Tensor, (stream, moved))
                moved.meta.update(node.meta)
        else:
            continue
        if moved is not None:
            node.replace_all_uses_with(moved)
            module.graph.erase_node(node)


def _constant(module: Draft, node: fx.Node) -> Tensor:
    return module.get_buffer(str(node.target))


def _scattered(module: Draft, node: fx.Node, source: fx.Node, places: Tensor) -> fx.Node | None:
    """The value with its channels at their places among zeros: by the rows of its layer, or else by a 0/1 matrix."""
    n_channels = shape_of(node)[0]
    if _reorder(module, source, torch.arange(len(places), device=places.device), places, n_channels):
        return source
    if len(shape_of(source)) != 3 or len(places) * n_channels > _LARGEST_MATRIX:
        return None
    matrix = torch.zeros(n_channels, len(places), 1, 1, dtype=_dtype(module), device=places.device)
    matrix[places, torch.arange(len(places), device=places.device)] = 1
    name = f"scatter_{node.name}"
    module.add_module(name, Convolution(matrix, None))
    with module.graph.inserting_before(node):
        moved = module.graph.call_module(name, (source,))
    moved.meta["shape"] = (n_channels, *shape_of(source)[1:])
    return moved


def _reorder(module: Draft, value: fx.Node, rows: Tensor, places: Tensor, n_channels: int) -> bool:
    """Has the layer that computes a value compute `rows` of it at `places`, zeros elsewhere, if that is worth it."""
    chain = [value]
    while _keeps_zeros(chain[-1]) and len(chain[-1].users) == 1:
        chain.append(chain[-1].all_input_nodes[0])
    node = chain[-1]
    layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(layer, nn.Conv2d) or layer.groups > 1 or len(node.users) > 1:
        return False
    more = _vectors(n_channels) - _vectors(layer.out_channels)
    if more * _VECTOR * layer.weight[0].numel() > _MOVE * n_channels:
        return False
    weight = layer.weight.new_zeros(n_channels, *layer.weight.shape[1:])
    weight[places] = layer.weight[rows]
    if layer.bias is not None:
        bias = layer.bias.new_zeros(n_channels)
        bias[places] = layer.bias[rows]
        layer.bias = nn.Parameter(bias, requires_grad=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.out_channels = n_channels
    for step in chain:
        step.meta["shape"] = (n_channels, *shape_of(step)[1:])
    return True


def _keeps_zeros(node: fx.Node) -> bool:
    """Whether a step leaves channels of zeros as they are, and every other channel to itself."""
    if node.target is aten.constant_pad_nd.default:
        padding: Any = node.args[1]
        return len(padding) == 4 and not any(node.args[2:]) and not node.kwargs
    return node.target in _ELEMENTWISE


def _dtype(module: Draft) -> torch.dtype:
    dtype: torch.dtype = next(tensor.dtype for tensor in module.parameters())
    return dtype


def _vectors(n_channels: int) -> int:
    return -(-n_channels // _VECTOR)


# Padding.


def _widen_kernels(module: Draft) -> None:
    """Leaves padding to convolutions that work channel by channel.

    They pad both sides alike: where the sides differ, weights of zeros stand before or behind the kernel's own.
    """
    for node in list(module.graph.nodes):
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, nn.Conv2d) or layer.weight.shape[1] > 1 or isinstance(layer.padding, str):
            continue
        (source,) = node.all_input_nodes
        if source.target is not aten.constant_pad_nd.default or not _keeps_zeros(source) or layer.dilation != (1, 1):
            continue
        left, right, top, bottom = source.args[1]
        if min(left, right, top, bottom) < 0:
            continue
        layer.weight = nn.Parameter(
            nn.functional.pad(
                layer.weight,
                (max(right - left, 0), max(left - right, 0), max(bottom - top, 0), max(top - bottom, 0)),
            ),
            requires_grad=False,
        )
        layer.padding = (layer.padding[0] + max(top, bottom), layer.padding[1] + max(left, right))
        layer.kernel_size = tuple(layer.weight.shape[2:])
        node.replace_input_with(source, source.all_input_nodes[0])


# Attention.


def _multiply_attention(module: Draft) -> None:
    """Attention in bfloat16 as its two products, which take half as long as PyTorch's fused kernel for a CPU."""
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        if _dtype(module) != torch.bfloat16:
            return
        query, key, value = node.args
        n_heads, n_tokens, _ = shape_of(node)
        with graph.inserting_before(node):
            scaled = graph.call_function(aten.mul.Tensor, (query, node.kwargs["scale"]))
            columns = graph.call_function(aten.transpose.int, (key, 2, 3))
            logits = graph.call_function(aten.matmul.default, (scaled, columns))
            weights = graph.call_function(aten.softmax.int, (logits, 3))
            product = graph.call_function(aten.matmul.default, (weights, value))
        logits.meta["shape"] = weights.meta["shape"] = (n_heads, n_tokens, node.meta["n_keys"])
        product.meta.update(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)


# Layers with what follows them.


class _LayerFusion:
    """One pass over the convolutions of a graph, in order."""

    def __init__(self, module: Draft) -> None:
        self.module = module
        self.graph = module.graph
        self.position = {node: index for index, node in enumerate(self.graph.nodes)}
        self.fresh: set[fx.Node] = set()  # values that a fused layer has put into memory of its own
        self.changed_at: dict[fx.Node, int] = {}  # where a value's memory takes a sum

    def run(self) -> None:
        for node in list(self.graph.nodes):
            layer = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str):
                self._fuse(node, layer)

    def _fuse(self, node: fx.Node, layer: nn.Conv2d) -> None:
        steps, stream = [node], None
        follower = _only_user(node)
        if follower is not None and follower.target is aten.add.Tensor:
            stream = self._stream(node, follower)
            if stream is not None:
                steps.append(follower)
        activation = _only_user(steps[-1])
        fusible = _ELEMENTWISE.keys() if stream is None else _BEHIND_A_SUM
        if activation is not None and activation.target in fusible and not activation.kwargs:
            steps.append(activation)
        if self.changed_at.get(node.all_input_nodes[0], math.inf) < self.position[steps[-1]]:
            steps, stream = [node], None
        last = steps[-1]
        with self.graph.inserting_before(last):
            new = self._emit(node, layer, stream, last if last.target in _ELEMENTWISE else None)
        new.meta.update(last.meta)
        last.replace_all_uses_with(new)
        self.position[new] = self.position[last]
        self.fresh.add(new)
        if stream is not None:
            self.changed_at[stream] = self.position[last]
        for step in reversed(steps):
            self.graph.erase_node(step)

    def _stream(self, node: fx.Node, total: fx.Node) -> fx.Node | None:
        """The other summand, if its memory may take the sum: nothing looks at it later."""
        summands = total.all_input_nodes
        if len(summands) != 2 or len(total.args) != 2 or total.kwargs:
            return None
        other = summands[0] if summands[1] is node else summands[1]
        readers = [user for user in other.users if user is not total]
        is_last = all(self.position[reader] < self.position[total] for reader in readers)
        if other in self.fresh and is_last and all(reader in self.fresh for reader in readers):
            return other if shape_of(other) == shape_of(total) else None
        return None

    def _emit(self, node: fx.Node, layer: nn.Conv2d, stream: fx.Node | None, activation: fx.Node | None) -> fx.Node:
        geometry: list[Any] = [list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups]
        source = node.all_input_nodes[0]
        shape = [1, *shape_of(source)]

        def packed(layer: nn.Module) -> Tensor:
            tensor: Tensor = torch.ops.mkldnn._reorder_convolution_weight(layer.weight, *geometry, shape)
            return tensor

        self.module.register_buffer(f"{node.name}_packed", packed(layer))
        weight = self.graph.get_attr(f"{node.name}_packed")
        weight.meta["of_layer"] = (str(node.target), packed)
        bias = None if layer.bias is None else self.graph.get_attr(f"{node.target}.bias")
        if bias is not None:
            bias.meta["of_layer"] = (str(node.target), operator.attrgetter("bias"))
        name, scalars = _epilogue(activation)
        if stream is None:
            arguments = (source, weight, bias, *geometry, name, scalars, "")
            return self.graph.call_function(torch.ops.mkldnn._convolution_pointwise.default, arguments)
        behind = None if activation is None else name
        sum_arguments = (stream, source, weight, bias, *geometry, "add", 1.0, behind, scalars, None)
        return self.graph.call_function(torch.ops.mkldnn._convolution_pointwise_.binary, sum_arguments)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _epilogue(activation: fx.Node | None) -> tuple[str, list[float]]:
    """Name and numbers by which oneDNN knows an activation."""
    if activation is None:
        return "none", []
    operator: Any = activation.target
    name, scalars = _ELEMENTWISE[operator]
    if scalars is None:  # of `hardtanh`: its bounds, by default -1 and 1
        given: Any = activation.args[1:]
        scalars = (*given, *(-1.0, 1.0)[len(given) :])
    return name, [float(scalar) for scalar in scalars]
