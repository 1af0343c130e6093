"""Slimming: the physically smaller network that computes exactly what the masked one computes.

Of a pruned attention head the rows of q, k and v go, and the columns that read it.

Each value in the canonical graph carries a layout: which of its channels are stored. Rows of pruned filters are gone,
the residual stream holds alive channels only, branches are added by index, and a layer whose inputs are all pruned
still emits its bias. No layers need to be coupled. Where a step's effect on channels isn't known (in a gate, say) the
value is filled up with zeros first: slower, never wrong.

Grouped convolutions keep their groups; only wholly dead groups go, other pruned rows stay as zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from objectives.attribution.attention import AttentionProduct, AttentionWeights
from objectives.attribution.operations import (
    Activation,
    AveragePool,
    ConstantGate,
    ConstantSum,
    ConstantTokens,
    Operation,
    ResidualSum,
)
from objectives.network import CanonicalNetwork, channel_axis, n_channels, shape_of
from objectives.pruning.ranking import Masks
from objectives.steps import FLATTENS, PARTS, POOLS, SQUEEZES, pads_with_zeros

__all__ = ["Convolution", "Cost", "Draft", "cost", "depends_on_images", "draft", "like", "slim", "stored_channels"]

aten = torch.ops.aten

_GATE_ACTIVATIONS = {aten.sigmoid.default, aten.hardsigmoid.default}
_READ_SIZES_ONLY = {aten.sym_size.int, aten.new_zeros.default}


@dataclass(frozen=True, slots=True)
class Cost:
    """Size of a network.

    Attributes:
        parameters: weights and biases of convolutions, dense layers and layer norms, and constants such as position
            embeddings; batch norm and LayerScale folded.
        flops: multiply-adds for one image, of convolutions, dense layers and attention.
    """

    parameters: int
    flops: int


class Draft(nn.Module):
    """A network whose code is not written yet: its modules, and the graph that calls them."""

    graph: fx.Graph

    def written(self) -> fx.GraphModule:
        """The network, with what its logits need of graph and modules."""
        self.erase_unread()
        return fx.GraphModule(self, self.graph, "SlimNetwork")

    def erase_unread(self) -> None:
        """Leave out the steps that no logit needs."""
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)


def cost(module: fx.GraphModule | Draft) -> Cost:
    """Parameters and multiply-adds of a canonical or slim network."""
    parameters = flops = 0
    for node in module.graph.nodes:
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parameters += layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel())
            flops += layer.weight.numel() * (math.prod(shape_of(node)) // max(1, n_channels(shape_of(node))))
        elif isinstance(layer, nn.LayerNorm):
            parameters += sum(tensor.numel() for tensor in layer.parameters())
        elif isinstance(layer, ConstantSum | ConstantTokens):
            parameters += sum(tensor.numel() for tensor in layer.buffers())
        elif isinstance(
            layer, AttentionWeights | AttentionProduct
        ):  # of each head (T, d) by (d, T), or (T, T) by (T, d)
            n_tokens, width = shape_of(node.all_input_nodes[-1])
            flops += n_tokens**2 * width
        elif node.target is aten.scaled_dot_product_attention.default:
            n_heads, n_tokens, head_dim = shape_of(node)
            flops += 2 * n_heads * n_tokens**2 * head_dim
        elif node.op == "get_attr" and node.meta.get("parameter") is not None:
            parameters += math.prod(getattr(module, str(node.target)).shape)
    return Cost(parameters, flops)


def depends_on_images(module: fx.GraphModule | Draft) -> bool:
    """Whether anything but the number of images reaches the logits of a slim network."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    seen, queue = set(), [output]
    while queue:
        node = queue.pop()
        if node.op == "placeholder":
            return True
        if node not in seen and node.target not in _READ_SIZES_ONLY:
            seen.add(node)
            queue.extend(node.all_input_nodes)
    return False


def slim(network: CanonicalNetwork, masks: Masks) -> fx.GraphModule:
    """The network without its pruned components.

    Args:
        network: canonical; it isn't changed.
        masks: kept components of every layer or attention that has any pruned.

    Returns:
        (N, C, H, W) -> logits (N, classes), equal to the masked network's up to rounding.
    """
    return draft(network, masks).written()


def draft(network: CanonicalNetwork, masks: Masks, orders: Mapping[str, Tensor] | None = None) -> Draft:
    """As `slim`, for who goes on to change the network.

    Args:
        network: canonical; it isn't changed.
        masks: kept components of every layer or attention that has any pruned.
        orders: name of a node of the canonical graph -> its channels, all of them, in the order in which the slim
            network has those that it stores; ascending by default. With orders no weight is changed, but for the rows
            and columns that it is without: what masks leave dead in groups that aren't wholly dead is zeroed behind the
            convolution instead.
    """
    return _Slimmer(network, masks, orders).build()


def stored_channels(network: CanonicalNetwork, masks: Masks) -> dict[str, Tensor]:
    """Channels that the slim network stores of each value, name of the canonical graph's node -> indices, ascending."""
    slimmer = _Slimmer(network, masks)
    slimmer.build()
    return {node.name: value.channels for node, value in slimmer.values.items()}


@dataclass(frozen=True, slots=True)
class _Value:
    """A value in the slim graph.

    Attributes:
        node: computes it; `None` where no channel is stored, that is, where it is zero.
        channels: (stored,) indices of the stored channels, in the order in which they are stored; the others are zero.
        shape: of the full value, without the batch dimension.
    """

    node: fx.Node | None
    channels: Tensor
    shape: tuple[int, ...]

    @property
    def axis(self) -> int:
        """Of the channels, the batch dimension included."""
        return channel_axis(self.shape)

    def shape_of(self, n: int) -> tuple[int, ...]:
        """The shape with `n` channels."""
        place = self.axis - 1
        return (*self.shape[:place], n, *self.shape[place + 1 :])


class _Slimmer:
    def __init__(self, network: CanonicalNetwork, masks: Masks, orders: Mapping[str, Tensor] | None = None) -> None:
        self.network = network
        self.orders = orders
        self.masks = {name: mask.cpu() for name, mask in masks.items()}
        self.source = network.module
        self.root = Draft()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, _Value] = {}
        self.other: dict[fx.Node, fx.Node] = {}
        self.demanded: set[fx.Node] = set()
        self.parents: dict[str, nn.Module] = {"": self.root}
        self.n_buffers = 0
        self.images: fx.Node | None = None
        self.heads = network.heads
        self.of_heads = {
            layer: heads for heads in network.heads.values() for layer in (heads.query, heads.key, heads.value)
        }
        self.queries_and_keys: dict[fx.Node, tuple[_Value, _Value, float]] = {}

    def build(self) -> Draft:
        for node in self.source.graph.nodes:
            if node.op == "placeholder":
                self.images = self.graph.placeholder("images")
                self._store(node, _Value(self.images, torch.arange(n_channels(shape_of(node))), shape_of(node)))
            elif node.op == "output":
                self.graph.output(self._full(node.args[0]))
            elif node.op == "call_module":
                self._module(node, self.source.get_submodule(str(node.target)))
            else:
                self._function(node)
        self.root.graph = self.graph
        self.root.erase_unread()
        return self.root.eval().requires_grad_(False)

    # Values.

    def _store(self, old: fx.Node, value: _Value) -> None:
        if value.node is not None:
            value.node.meta["shape"] = value.shape_of(len(value.channels))
        self.values[old] = value

    def _emit(self, operator: Callable[..., Any], *arguments: Any, **keywords: Any) -> fx.Node:
        return self.graph.call_function(operator, arguments, keywords)

    def _buffer(self, tensor: Tensor, *, parameter: str | None = None) -> fx.Node:
        """A tensor of the network's own; `parameter` names what it is of, if it counts as a parameter."""
        name = f"buffer_{self.n_buffers}"
        self.n_buffers += 1
        self.root.register_buffer(name, tensor.clone())
        node = self.graph.get_attr(name)
        node.meta["parameter"] = parameter
        return node

    def _index(self, indices: Tensor) -> fx.Node:
        return self._buffer(indices.to(self._device(), non_blocking=True))

    def _device(self) -> torch.device:
        weight = self.source.get_submodule(self.network.classifier).weight
        assert isinstance(weight, Tensor)
        return weight.device

    def _with_channels(self, value: _Value, channels: Tensor) -> fx.Node:
        """The value with exactly these channels in this order: others are dropped, missing ones are zeros."""
        if value.node is not None and torch.equal(value.channels, channels):
            return value.node
        places = _places(value.channels, n_channels(value.shape))[channels]
        is_stored = places >= 0
        taken = places[is_stored]
        node, n_kept, shape = value.node, len(taken), value.shape_of(len(channels))
        if node is not None and n_kept > 0 and not torch.equal(taken, torch.arange(len(value.channels))):
            node = self._emit(aten.index_select.default, node, value.axis, self._index(taken))
            node.meta["shape"] = value.shape_of(n_kept)
        if node is None or n_kept < len(channels):
            batch = self._emit(aten.sym_size.int, self.images, 0)
            zeros = self._emit(aten.new_zeros.default, self.images, [batch, *shape])
            zeros.meta["shape"] = shape
            if node is None or n_kept == 0:
                return zeros
            stored = self._index(is_stored.nonzero().flatten())
            node = self._emit(aten.index_copy.default, zeros, value.axis, stored, node)
            node.meta["shape"] = shape
        return node

    def _in_order(self, node: fx.Node, channels: Tensor) -> Tensor:
        """Channels of a node's value, given in ascending order, in the order in which they are to be stored."""
        order = None if self.orders is None else self.orders.get(node.name)
        return channels if order is None else order[torch.isin(order, channels)]

    def _full(self, old: fx.Node) -> fx.Node:
        value = self.values[old]
        return self._with_channels(value, torch.arange(n_channels(value.shape)))

    # Modules.

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        operands: Any = node.args
        # Attention's weights are no value of their own: they stay inside the attention.
        inputs = [self.values.get(operand, _NOTHING) for operand in operands]
        match module:
            case nn.Conv2d() if module.groups > 1:
                self._grouped_convolution(node, module, inputs[0])
            case nn.Conv2d() | nn.Linear():
                self._layer(node, module, inputs[0])
            case ResidualSum():
                self._sum(node, inputs[0], inputs[1])
            case ConstantGate():
                self._gate(node, inputs[0], inputs[1])
            case AveragePool():
                self._pool(node, module, inputs[0])
            case Activation():
                self._channelwise(node, module, inputs[0])
            case nn.LayerNorm():
                self._norm(node, module, inputs[0])
            case ConstantSum():
                constant = self._buffer(module.constant, parameter=str(node.target))
                self._store_full(node, self._emit(aten.add.Tensor, self._full(operands[0]), constant))
            case ConstantTokens():
                self._tokens(node, module)
            case AttentionWeights():
                self.queries_and_keys[node] = (inputs[0], inputs[1], module.scale)
            case AttentionProduct():
                self._attention(node, inputs[1])
            case _:
                raise TypeError(f"A canonical network holds no {type(module).__name__}.")

    def _kept(self, node: fx.Node) -> Tensor:
        """Indices of the rows to keep: unmasked components, and of a gate only what its features still need."""
        mask = self.masks.get(str(node.target))
        if (heads := self.of_heads.get(str(node.target))) is not None:
            return heads.rows(self._kept_heads(heads.name))
        if mask is not None:
            return self._in_order(node, mask.nonzero().flatten())
        features = self._gated_by(node)
        if features is None:
            return self._in_order(node, torch.arange(n_channels(shape_of(node))))
        self.demanded.add(node)
        return self.values[features].channels

    def _gated_by(self, node: fx.Node) -> fx.Node | None:
        """The features that a layer's activated outputs gate, channel by channel, if nothing else reads them."""
        activation = next(iter(node.users)) if len(node.users) == 1 else None
        if activation is None or activation.target not in _GATE_ACTIVATIONS or len(activation.users) != 1:
            return None
        gate = next(iter(activation.users))
        if gate.op != "call_module" or not isinstance(self.source.get_submodule(str(gate.target)), ConstantGate):
            return None
        features = gate.all_input_nodes[0]
        same_width = features in self.values and shape_of(features)[0] == shape_of(node)[0]
        return features if same_width and features is not activation else None

    def _layer(self, node: fx.Node, layer: nn.Conv2d | nn.Linear, value: _Value) -> None:
        name, shape = str(node.target), shape_of(node)
        rows = self._kept(node)
        if len(rows) == 0:
            self._store(node, _Value(None, rows, shape))
            return
        bias = None if layer.bias is None else _select(layer.bias, 0, rows)
        if value.node is None:
            self._constant(node, rows, bias)
            return
        weight = _select(_select(layer.weight, 0, rows), 1, value.channels)
        self._add_layer(name, like(layer, weight, bias, groups=1))
        new = self.graph.call_module(name, (value.node,))
        self._store(node, _Value(new, rows, shape))

    def _constant(self, node: fx.Node, rows: Tensor, bias: Tensor | None) -> None:
        """A layer without inputs: its bias at every position, or zero."""
        shape = shape_of(node)
        if bias is None:
            self._store(node, _Value(None, rows[:0], shape))
            return
        batch = self._emit(aten.sym_size.int, self.images, 0)
        value = _Value(None, rows, shape)
        places = [len(rows) if axis == value.axis else 1 for axis in range(len(shape) + 1)]
        column = self._buffer(bias.detach().reshape(places), parameter=f"{node.target}.bias")
        new = self._emit(aten.expand.default, column, [batch, *value.shape_of(len(rows))])
        self._store(node, _Value(new, rows, shape))

    def _grouped_convolution(self, node: fx.Node, layer: nn.Conv2d, value: _Value) -> None:
        name, shape = str(node.target), shape_of(node)
        rows = self._kept(node)
        out_of_group = shape[0] // layer.groups
        in_of_group = value.shape[0] // layer.groups
        groups = (rows // out_of_group).unique()
        outputs = self._in_order(node, (groups[:, None] * out_of_group + torch.arange(out_of_group)).flatten())
        groups = outputs[::out_of_group] // out_of_group
        if len(groups) == 0:
            self._store(node, _Value(None, rows, shape))
            return
        weight, bias = layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()
        dead = torch.ones(shape[0], dtype=torch.bool)
        dead[rows] = False
        if self.orders is None:
            weight[dead.to(weight.device)] = 0
        if bias is not None:
            if self.orders is None:
                bias[dead.to(bias.device)] = 0
            bias = _select(bias, 0, outputs)
        if value.node is None:
            self._constant(node, outputs, bias)
            self._silence(node, dead)
            return
        inputs = (groups[:, None] * in_of_group + torch.arange(in_of_group)).flatten()
        self._add_layer(name, like(layer, _select(weight, 0, outputs), bias, groups=len(groups)))
        new = self.graph.call_module(name, (self._with_channels(value, inputs),))
        self._store(node, _Value(new, outputs, shape))
        self._silence(node, dead)

    def _silence(self, node: fx.Node, dead: Tensor) -> None:
        """Zeroes the stored rows that are dead (channels of bool), where the weights don't."""
        value = self.values[node]
        rows = dead[value.channels].nonzero().flatten()
        if self.orders is not None and value.node is not None and len(rows) > 0:
            silent = self._emit(aten.index_fill.int_Scalar, value.node, value.axis, self._index(rows), 0)
            self._store(node, _Value(silent, value.channels, value.shape))

    def _add_layer(self, name: str, layer: nn.Module) -> None:
        self._parent(name.rpartition(".")[0]).add_module(name.rpartition(".")[2], layer)

    def _parent(self, name: str) -> nn.Module:
        """The module of this name, made if it isn't there."""
        if name not in self.parents:
            above, _, last = name.rpartition(".")
            self.parents[name] = nn.Module()
            self._parent(above).add_module(last, self.parents[name])
        return self.parents[name]

    def _sum(self, node: fx.Node, left: _Value, right: _Value) -> None:
        shape = shape_of(node)
        if left.node is None or right.node is None:
            self._store(node, right if left.node is None else left)
            return
        if len(right.channels) > len(left.channels):
            left, right = right, left
        union = self._in_order(node, torch.cat([left.channels, right.channels]).unique())
        left = _Value(self._with_channels(left, union), union, shape)
        if torch.equal(left.channels, right.channels):
            new = self._emit(aten.add.Tensor, left.node, right.node)
        else:
            places = self._index(_places(union, shape[left.axis - 1])[right.channels])
            new = self._emit(aten.index_add.default, left.node, left.axis, places, right.node)
        self._store(node, _Value(new, left.channels, shape))

    def _gate(self, node: fx.Node, features: _Value, gate: _Value) -> None:
        if features.node is None:
            self._store(node, features)
            return
        channels = features.channels if gate.shape[0] == features.shape[0] else torch.arange(gate.shape[0])
        factor = self._with_channels(gate, channels)
        self._store(node, _Value(self._emit(aten.mul.Tensor, features.node, factor), features.channels, shape_of(node)))

    def _pool(self, node: fx.Node, module: Operation, value: _Value) -> None:
        if module.operator is aten.mean.dim and not _averages_space_only(module, value):
            self._dense(node)
            return
        self._channelwise(node, module, value)

    def _channelwise(self, node: fx.Node, module: Operation, value: _Value) -> None:
        new = None
        if value.node is not None:
            new = self._emit(module.operator, value.node, *module.arguments, **module.keywords)
        self._store(node, _Value(new, value.channels, shape_of(node)))

    # Transformers.

    def _store_full(self, old: fx.Node, new: fx.Node) -> None:
        self._store(old, _Value(new, torch.arange(n_channels(shape_of(old))), shape_of(old)))

    def _tokens(self, node: fx.Node, module: ConstantTokens) -> None:
        batch = self._emit(aten.sym_size.int, self.images, 0)
        constant = self._buffer(module.tokens, parameter=str(node.target))
        spread = self._emit(aten.expand.default, constant, [batch, *module.tokens.shape[1:]])
        self._store_full(node, self._emit(aten.cat.default, [spread, self._full(node.all_input_nodes[0])], 1))

    def _norm(self, node: fx.Node, module: nn.LayerNorm, value: _Value) -> None:
        """A layer norm over all channels, zeros included, or over those of each head."""
        width, (size,) = n_channels(value.shape), module.normalized_shape
        if size < width and value.node is None:
            self._store(node, value)
            return
        norm = nn.LayerNorm(size, eps=module.eps, elementwise_affine=False)
        for key in ("weight", "bias"):
            tensor = getattr(module, key)
            setattr(norm, key, None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False))
        self._add_layer(str(node.target), norm)
        if size == width:
            self._store_full(node, self.graph.call_module(str(node.target), (self._full(node.all_input_nodes[0]),)))
            return
        parted = self._emit(aten.unflatten.int, value.node, -1, [len(value.channels) // size, size])
        normed = self.graph.call_module(str(node.target), (parted,))
        self._store(node, _Value(self._emit(aten.flatten.using_ints, normed, -2), value.channels, value.shape))

    def _kept_heads(self, name: str) -> Tensor:
        mask, heads = self.masks.get(name), self.heads[name]
        kept = torch.arange(heads.n_heads) if mask is None else mask.nonzero().flatten()
        (node,) = (node for node in self.source.graph.nodes if node.target == name)
        return self._in_order(node, heads.rows(kept))[:: heads.head_dim] // heads.head_dim

    def _attention(self, node: fx.Node, value: _Value) -> None:
        heads, shape = self.heads[str(node.target)], shape_of(node)
        kept = self._kept_heads(heads.name)
        if len(kept) == 0:
            self._store(node, _Value(None, kept, shape))
            return
        query, key, scale = self.queries_and_keys[node.all_input_nodes[0]]
        by_head = [
            self._emit(
                aten.transpose.int, self._emit(aten.unflatten.int, part.node, -1, [len(kept), heads.head_dim]), 1, 2
            )
            for part in (query, key, value)
        ]
        product = self._emit(aten.scaled_dot_product_attention.default, *by_head, scale=scale)
        product.meta["shape"] = (len(kept), shape[0], heads.head_dim)
        product.meta["n_keys"] = shape[0]
        joined = self._emit(aten.flatten.using_ints, self._emit(aten.transpose.int, product, 1, 2), 2)
        self._store(node, _Value(joined, heads.rows(kept), shape))

    # Functions.

    def _function(self, node: fx.Node) -> None:
        source = node.args[0] if node.args else None
        value = self.values.get(source) if isinstance(source, fx.Node) else None
        if node.op == "call_function" and value is not None and "shape" in node.meta:
            if node.target in _GATE_ACTIVATIONS and source in self.demanded:
                self.demanded.add(node)
                self._elsewhere(node, value, value.channels, node.args[1:])
                return
            if node.target in POOLS or self._slices_space(node, value):
                self._elsewhere(node, value, value.channels, node.args[1:])
                return
            if node.target in FLATTENS and self._is_flatten(node, value):
                self._flatten(node, value)
                return
            if pads_with_zeros(node) and len(value.shape) == 3:
                self._pad(node, value)
                return
            if self._squeezes_space(node, value):
                self._elsewhere(node, value, value.channels, node.args[1:])
                return
        if node.target is aten.cat.default and self._concatenates_channels(node):
            self._concatenate(node)
            return
        self._dense(node)

    def _elsewhere(self, node: fx.Node, value: _Value, channels: Tensor, arguments: Sequence[Any]) -> None:
        new = None if value.node is None else self._emit(node.target, value.node, *arguments, **node.kwargs)  # type: ignore[arg-type]
        self._store(node, _Value(new, channels, shape_of(node)))

    def _slices_space(self, node: fx.Node, value: _Value) -> bool:
        return node.target in PARTS and len(node.args) > 1 and _is_spatial(node.args[1], value)

    def _squeezes_space(self, node: fx.Node, value: _Value) -> bool:
        if node.target not in SQUEEZES:
            return False
        dimensions: Any = node.args[1] if node.target is aten.squeeze.dims else node.args[1:]
        return all(_is_spatial(dimension, value) for dimension in dimensions)

    def _is_flatten(self, node: fx.Node, value: _Value) -> bool:
        return value.axis == 1 and len(shape_of(node)) == 1 and math.prod(shape_of(node)) == math.prod(value.shape)

    def _flatten(self, node: fx.Node, value: _Value) -> None:
        area = math.prod(value.shape[1:])
        channels = (value.channels[:, None] * area + torch.arange(area)).flatten()
        new = None if value.node is None else self._emit(aten.flatten.using_ints, value.node, 1)
        self._store(node, _Value(new, channels, shape_of(node)))

    def _pad(self, node: fx.Node, value: _Value) -> None:
        """Zero padding; added channels are zero, so they aren't stored."""
        padding: Any = node.args[1]
        amounts = [int(amount) for amount in padding]
        before = amounts[4] if len(amounts) > 4 else 0
        new = value.node
        if new is not None and any(amounts[:4]):
            new = self._emit(aten.constant_pad_nd.default, new, amounts[:4])
        self._store(node, _Value(new, value.channels + before, shape_of(node)))

    def _concatenates_channels(self, node: fx.Node) -> bool:
        shape = shape_of(node)
        return channel_axis(shape) == 1 and len(node.args) > 1 and node.args[1] in (1, -len(shape))

    def _concatenate(self, node: fx.Node) -> None:
        operands: Any = node.args[0]
        values = [self.values[operand] for operand in operands]
        starts = [0]
        for value in values:
            starts.append(starts[-1] + value.shape[0])
        channels = torch.cat([value.channels + start for value, start in zip(values, starts, strict=False)])
        parts = [value.node for value in values if value.node is not None]
        new = self._emit(aten.cat.default, parts, 1) if parts else None
        joined = _Value(new, channels, shape_of(node))
        ordered = self._in_order(node, channels)
        if new is not None and not torch.equal(ordered, channels):
            new.meta["shape"] = joined.shape_of(len(channels))
            joined = _Value(self._with_channels(joined, ordered), ordered, joined.shape)
        self._store(node, joined)

    def _dense(self, node: fx.Node) -> None:
        """Any other step, on values filled up with zeros."""

        def convert(argument: fx.Node) -> fx.Node:
            return self._full(argument) if argument in self.values else self.other[argument]

        if node.op == "get_attr":
            tensor = self.source.get_buffer(str(node.target))
            self.root.register_buffer(str(node.target), tensor.clone())
        if node.op == "call_module":
            module = self.source.get_submodule(str(node.target))
            assert isinstance(module, Operation)
            operands: Any = node.args
            inputs = [convert(operand) for operand in operands]
            new = self._emit(module.operator, *inputs, *module.arguments, **module.keywords)
        else:
            new = self.graph.node_copy(node, convert)
        if "shape" in node.meta and len(shape_of(node)) > 0:
            self._store_full(node, new)
        else:
            self.other[node] = new


_NOTHING = _Value(None, torch.arange(0), (0,))


def _places(channels: Tensor, n: int) -> Tensor:
    """Where each of `n` channels is among the given ones; -1 where it isn't."""
    places = torch.full((n,), -1)
    places[channels] = torch.arange(len(channels))
    return places


def _is_spatial(dimension: Any, value: _Value) -> bool:
    return int(dimension) % (len(value.shape) + 1) not in (0, value.axis)


def _averages_space_only(module: Operation, value: _Value) -> bool:
    return all(_is_spatial(dimension, value) for dimension in module.arguments[0])


class Convolution(nn.Conv2d):
    """A convolution of given weights, made without what takes the time: weights are neither drawn nor allocated.

    Args:
        weight: (out, in / groups, height, width).
        bias: (out,).
        like: has the same stride, padding and dilation; by default 1, 0 and 1.
        groups: of the channels.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, like: nn.Conv2d | None = None, groups: int = 1) -> None:
        nn.Module.__init__(self)
        self.out_channels, self.in_channels = weight.shape[0], weight.shape[1] * groups
        self.kernel_size = tuple(weight.shape[2:])
        self.stride, self.padding, self.dilation = (
            ((1, 1), (0, 0), (1, 1)) if like is None else (like.stride, like.padding, like.dilation)
        )
        self.groups, self.padding_mode = groups, "zeros"
        self.transposed, self.output_padding = False, (0, 0)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)


class _Dense(nn.Linear):
    """A dense layer of given weights (out, in), made as `Convolution` is."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))


def like(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None, groups: int | None = None) -> nn.Module:
    """A layer of these weights with another one's stride, padding and dilation, and its groups by default."""
    if isinstance(layer, nn.Conv2d):
        return Convolution(weight, bias, layer, layer.groups if groups is None else groups)
    return _Dense(weight, bias)


def _select(tensor: Tensor, dimension: int, indices: Tensor) -> Tensor:
    """Rows or columns of a tensor; the tensor itself, not a copy, where all are kept as they are."""
    if len(indices) == tensor.shape[dimension] and torch.equal(indices, torch.arange(len(indices))):
        return tensor.detach()
    return tensor.detach().index_select(dimension, indices.to(tensor.device, non_blocking=True))
