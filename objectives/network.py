"""The canonical network: a functional copy of a classifier in which every step is known.

`torch.export` captures the network as one graph of ATen operators; from it a copy is built with batch norm folded into
the convolution before it (with its epsilon), residual sums, activations, average pooling and squeeze-and-excite gates
as modules of their own. In vision transformers, so are layer norms, constant tokens and position embeddings; LayerScale
is folded into the layer before it, attention has a layer each for q, k and v, and the two classifiers of a distilled
network become one. Attribution, grouping and slimming all read this one graph, so no list of architectures is
needed. What the graph holds beyond the known steps is refused with the module's name: a wrong relevance is worse than
none.

The user's network is read, never changed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ExportGraphSignature
from torch.fx.experimental.symbolic_shapes import statically_known_true

from objectives.attribution.attention import AttentionProduct, AttentionWeights, Heads
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
from objectives.errors import UnsupportedNetworkError
from objectives.self_attention import SelfAttention, find_self_attention
from search_spaces.suggestions import did_you_mean

__all__ = ["CanonicalNetwork", "Components", "Layer", "canonize", "channel_axis", "n_channels", "shape_of"]

Components = Literal["all", "heads", "mlp"]
"""Which components are pruned: attention heads, neurons of a transformer's MLPs, or all that there are."""

aten = torch.ops.aten

_CONVOLUTIONS = {aten.conv2d.default, aten.conv2d.padding}
# Activations f with f(0) = 0: a pruned filter, whose output is zero, stays zero behind them.
_ACTIVATIONS = {
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
_GATE_ACTIVATIONS = {
    aten.sigmoid.default,
    aten.sigmoid_.default,
    aten.hardsigmoid.default,
    aten.hardsigmoid_.default,
}
_EXPANSIONS = {aten.expand.default, aten.expand_as.default}
_AVERAGES = {aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim}
_SUMS = {aten.add.Tensor, aten.add_.Tensor, operator.add, operator.iadd}
_PRODUCTS = {aten.mul.Tensor, aten.mul_.Tensor, operator.mul, operator.imul}
_IDENTITIES = {
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
}
_CONVERSIONS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
}
_ASSERTIONS = {aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default}
# Steps whose gradient already is the right redistribution: they move or select values.
_MOVES = {
    aten.max_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.dims,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.transpose.int,
    aten.constant_pad_nd.default,
    aten.pad.default,
    aten.cat.default,
}


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or dense layer that relevance flows through.

    Attributes:
        name: of the module in the user's network; behind it `.q`, `.k` and `.v`, where these share one.
        width: number of output channels or neurons.
        norm: name of the batch norm folded into it, if any.
        input_shape: without the batch dimension.
        output_shape: without the batch dimension.
        kernel: (height, width) of a convolution; (1, 1) for a dense layer.
    """

    name: str
    width: int
    norm: str | None
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    kernel: tuple[int, ...]

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution; otherwise it is a dense layer."""
        return len(self.output_shape) == 3


@dataclass(frozen=True, slots=True, eq=False)
class CanonicalNetwork:
    """A copy of a classifier in canonical form.

    Attributes:
        module: the copy; its submodules keep the names of the user's. Backward through it is relevance propagation once
            rules are attached to its convolutions and dense layers.
        layers: those that relevance flows through, in forward order, by name.
        classifier: name of the last layer, whose outputs are the logits.
        residual_scopes: names of the modules that hold a residual sum, in forward order.
        residual_sums: names of the sums' modules in `module`.
        blocks: names of a transformer's blocks, the innermost residual scopes that hold heads, in forward order.
        input_shape: (C, H, W).
        heads: of each attention, by the name of the module in `module` that computes their outputs, in forward order.
        kinds: of all that could be components, by name in forward order: `filters` (neurons of dense layers too), and
            in transformers `heads` and `mlp`.
        choice: which of them are components.
    """

    module: fx.GraphModule
    layers: dict[str, Layer]
    classifier: str
    residual_scopes: tuple[str, ...]
    residual_sums: tuple[str, ...]
    blocks: tuple[str, ...]
    input_shape: tuple[int, int, int]
    heads: dict[str, Heads]
    kinds: dict[str, str]
    choice: Components = "all"
    n_outputs: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_outputs", self.layers[self.classifier].width)

    @property
    def components(self) -> dict[str, int]:
        """Number of components of each layer or attention that has any, in forward order.

        Of convolutional networks all layers but the classifier.
        """
        return {
            name: self.heads[name].n_heads if name in self.heads else self.layers[name].width
            for name, kind in self.kinds.items()
            if self.choice in ("all", kind)
        }

    @property
    def is_transformer(self) -> bool:
        """Whether it has attention."""
        return bool(self.heads)

    @property
    def prunable(self) -> dict[str, Layer | Heads]:
        """All that can hold components, by name."""
        return {**self.layers, **self.heads}

    def choosing(self, components: Components | None) -> CanonicalNetwork:
        """The same network with other components.

        Args:
            components: which; by default the neurons of a transformer's MLPs, and all of another network.

        Raises:
            UnsupportedNetworkError: the network has no such components.
        """
        known = get_args(Components)
        if components is not None and components not in known:
            raise UnsupportedNetworkError(f"Unknown components {components!r}.{did_you_mean(components, known)}")
        if components in ("heads", "mlp") and not self.is_transformer:
            raise UnsupportedNetworkError(
                f"`--components {components}` is for vision transformers; this network has no attention heads. Leave "
                "the option out."
            )
        return replace(self, choice=components or ("mlp" if self.is_transformer else "all"))


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value without the batch dimension."""
    return tuple(node.meta["shape"])


def channel_axis(shape: Sequence[int]) -> int:
    """The axis of channels, counted with the batch dimension, of a value of this shape without it.

    That is the last of tokens (T, C), the first of images (C, H, W) and of vectors (C,).
    """
    return 2 if len(shape) == 2 else 1


def n_channels(shape: Sequence[int]) -> int:
    """Number of channels of a value of this shape."""
    return shape[channel_axis(shape) - 1]


def canonize(network: nn.Module, input_shape: Sequence[int], classes: Sequence[int] | None = None) -> CanonicalNetwork:
    """Copies a classifier into canonical form.

    Args:
        network: in evaluation mode; it is not changed. The copy keeps its dtype and device.
        input_shape: (C, H, W) of one image.
        classes: outputs to keep, in this order; the other rows of the classifier are removed. All by default.

    Raises:
        UnsupportedNetworkError: the network holds a step that can't be attributed correctly; names the module.
    """
    channels, height, width = input_shape
    program = _capture(network, (channels, height, width))
    return _Builder(program, (channels, height, width)).build(classes)


def _capture(network: nn.Module, input_shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    reference = next((p for p in network.parameters() if p.is_floating_point()), None)
    if reference is None:
        raise UnsupportedNetworkError(f"The network {type(network).__name__} has no parameters: nothing can be pruned.")
    if network.training:
        raise UnsupportedNetworkError("The network is in training mode; call `.eval()` on it first.")
    example = torch.zeros(2, *input_shape, dtype=reference.dtype, device=reference.device)
    try:
        with torch.no_grad():
            program = torch.export.export(
                network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
            )
    except Exception as error:  # torch.export raises many kinds; all mean that the network can't be captured
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if reason.startswith("Constraints violated"):
            reason = "its forward pass fixes the batch size; write `x.shape[0]`, not `len(x)`."
        raise UnsupportedNetworkError(
            f"The network {type(network).__name__} can't be captured as a graph for images of shape {input_shape}: "
            f"{reason}"
        ) from error
    if not program.call_spec.out_spec.is_leaf():
        raise UnsupportedNetworkError(
            f"The network {type(network).__name__} returns more than one tensor of logits; wrap it to return one."
        )
    return program


class _Builder:
    """Rewrites one exported program into a `CanonicalNetwork`."""

    def __init__(self, program: torch.export.ExportedProgram, input_shape: tuple[int, int, int]) -> None:
        signature: ExportGraphSignature = program.graph_signature
        self.nodes = list(program.graph.nodes)
        self.input_shape = input_shape
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = getattr(signature, "inputs_to_lifted_tensor_constants", {})
        tensors = {**dict(program.named_parameters()), **dict(program.named_buffers()), **program.constants}
        self.parameter_names: dict[str, str] = {**names, **constants}
        self.tensors: dict[str, Tensor] = {
            placeholder: tensors[name].detach() for placeholder, name in self.parameter_names.items()
        }
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.environment: dict[fx.Node, fx.Node] = {}
        self.scopes: dict[fx.Node, str] = {}
        self.folded: dict[str, str] = {}
        self.from_images: set[fx.Node] = set()
        (self.n_images,) = (
            node.meta["val"].shape[0]
            for node in self.nodes
            if node.op == "placeholder" and node.name not in self.parameter_names
        )
        self.not_by_image: set[fx.Node] = set()
        self.positions = {node: position for position, node in enumerate(self.nodes)}
        attentions = list(find_self_attention(self.nodes))
        self.projections = {attention.projection: attention for attention in attentions}
        self.attentions = {node: attention for attention in attentions for node in attention.interior}
        self.heads: dict[str, Heads] = {}
        self.parts: dict[tuple[fx.Node, str], fx.Node] = {}

    def build(self, classes: Sequence[int] | None) -> CanonicalNetwork:
        for node in self.nodes:
            if node.op == "placeholder" and node.name not in self.parameter_names:
                self.from_images.add(node)
                self._record(node, self.graph.placeholder("images"))
            elif node.op == "call_function" and node.target not in _ASSERTIONS:
                if not self.from_images.isdisjoint(node.all_input_nodes):
                    self.from_images.add(node)
                self._rewrite(node)
            elif node.op == "output":
                (logits,) = node.args[0]
                if logits not in self.from_images:
                    raise UnsupportedNetworkError("The network's output doesn't depend on its images.")
                self.graph.output(self.environment[logits])
        module = fx.GraphModule(self.root, self.graph, "CanonicalNetwork")
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        return self._describe(module, classes)

    # Rewriting, node by node.

    def _rewrite(self, node: fx.Node) -> None:
        target = node.target
        self._check_aliases(node)
        if node not in self.from_images:  # made from parameters only, as a standardised weight is
            self._copy(node)
        elif node in self.attentions:
            if node is self.attentions[node].output:
                self._attention(self.attentions[node])
        elif node in self.projections:
            self._projection(self.projections[node])
        elif target is aten.layer_norm.default:
            self._layer_norm(node)
        elif target in _CONVOLUTIONS:
            self._convolution(node)
        elif target is aten.linear.default:
            self._linear(node)
        elif target is aten.batch_norm.default:
            self._batch_norm(node)
        elif target in _IDENTITIES or (target in _CONVERSIONS and _keeps_dtype(node)):
            self._identity(node)
        elif target in _ACTIVATIONS:
            self._operation(node, Activation, inputs=1)
        elif target in _AVERAGES:
            self._operation(node, AveragePool, inputs=1)
        elif target in _SUMS and self._operands_are_images(node):
            self._operation(node, ResidualSum, inputs=2)
        elif target in _SUMS and self._adds_constant(node):
            tokens, constant = _arguments(node)
            self._call(node, f"constantsum_{node.name}", ConstantSum(self._given(node, constant)), tokens)
        elif target is aten.cat.default and self._prepends_constants(node):
            *constants, tokens = _arguments(node)[0]
            parts = [self._given(node, _arguments(constant)[0]) for constant in constants]
            self._call(node, f"constanttokens_{node.name}", ConstantTokens(torch.cat(parts, dim=1)), tokens)
        elif target in _PRODUCTS and (gate := self._gate_operand(node)) is not None:
            self._gate(node, gate)
        elif target in _PRODUCTS and (layer := self._scaled_layer(node)) is not None:
            scale = self._given(node, _arguments(node)[1])
            bias = None if layer.bias is None else layer.bias.detach() * scale
            _set_parameters(layer, layer.weight.detach() * scale[:, None], bias)
            self.environment[node] = self.environment[_arguments(node)[0]]
        elif target is aten.slice.Tensor and _is_whole(node):
            self._identity(node)
        elif target is aten.div.Tensor and (joined := self._averaged_classifiers(node)) is not None:
            self._join(node, *joined)
        else:
            self._copy(node)

    def _record(self, old: fx.Node, new: fx.Node) -> None:
        self.environment[old] = new
        value = old.meta.get("val")
        if isinstance(value, Tensor):
            new.meta["shape"] = tuple(value.shape[1:])
            if value.ndim == 0 or not statically_known_true(value.shape[0] == self.n_images):
                self.not_by_image.add(new)
        self.scopes[new] = _scope(old)

    def _call(self, old: fx.Node, name: str, module: nn.Module, *inputs: fx.Node) -> None:
        _add_submodule(self.root, name, module)
        self._record(old, self.graph.call_module(name, tuple(self.environment[node] for node in inputs)))

    def _tensor(self, node: fx.Node, argument: fx.Node | None) -> Tensor | None:
        """The parameter or buffer that a step takes as an argument, if it takes one."""
        if argument is None:
            return None
        if argument.name not in self.tensors:
            raise UnsupportedNetworkError(
                f"A parameter of {_place(node)} is computed in the forward pass (weight standardisation or another "
                "reparametrisation); fold it into the parameter first."
            )
        return self.tensors[argument.name]

    def _weight(self, node: fx.Node) -> tuple[str, Tensor]:
        """Name of a layer, and its weight."""
        argument = _arguments(node)[1]
        weight = self._tensor(node, argument)
        assert weight is not None
        name = self.parameter_names[argument.name].removesuffix(".weight")
        if _has_submodule(self.root, name):
            raise UnsupportedNetworkError(
                f"The module {name!r} is called twice in one forward pass (shared weights), which relevance "
                "propagation doesn't support; give each call a module of its own."
            )
        return name, weight

    def _convolution(self, node: fx.Node) -> None:
        name, weight = self._weight(node)
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        arguments: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        groups = arguments.get("groups", 1)
        padding = arguments.get("padding", 0)
        convolution = nn.Conv2d(
            weight.shape[1] * groups,
            weight.shape[0],
            _pair(weight.shape[2:]),
            stride=_pair(arguments.get("stride", 1)),
            padding=padding if isinstance(padding, str) else _pair(padding),
            dilation=_pair(arguments.get("dilation", 1)),
            groups=groups,
            device="meta",
        )
        _set_parameters(convolution, weight, self._tensor(node, arguments.get("bias")))
        self._call(node, name, convolution, arguments["input"])

    def _linear(self, node: fx.Node) -> None:
        name, weight = self._weight(node)
        source, _, *bias = _arguments(node)
        linear = nn.Linear(1, 1, device="meta")
        _set_parameters(linear, weight, self._tensor(node, bias[0]) if bias else None)
        self._call(node, name, linear, source)

    def _projection(self, attention: SelfAttention) -> None:
        """A layer each for q, k and v; nothing else reads their joint one."""
        node = attention.projection
        name, weight = self._weight(node)
        source, _, *arguments = _arguments(node)
        bias = self._tensor(node, arguments[0]) if arguments else None
        for index, part in enumerate("qkv"):
            rows = slice(index * len(weight) // 3, (index + 1) * len(weight) // 3)
            linear = nn.Linear(1, 1, device="meta")
            _set_parameters(linear, weight[rows], None if bias is None else bias[rows])
            self._call(node, f"{name}.{part}", linear, source)
            self.environment[node].meta["shape"] = (*shape_of(self.environment[source])[:-1], len(weight) // 3)
            self.parts[node, part] = self.environment[node]

    def _attention(self, attention: SelfAttention) -> None:
        node, scope = attention.output, _scope(attention.operator)
        layer = self.parameter_names[_arguments(attention.projection)[1].name].removesuffix(".weight")
        query, key, value = (self.parts[attention.projection, part] for part in "qkv")
        shape = shape_of(value)
        if attention.query_norm is not None:
            query = self._norm(attention.query_norm, query)
        if attention.key_norm is not None:
            key = self._norm(attention.key_norm, key)
        weights, name = self._attention_names(layer)
        _add_submodule(self.root, weights, AttentionWeights(attention.n_heads, attention.scale))
        matrix = self.graph.call_module(weights, (query, key))
        matrix.meta["shape"] = (attention.n_heads, shape[0], shape[0])
        self.scopes[matrix] = scope
        _add_submodule(self.root, name, AttentionProduct(attention.n_heads))
        self._record(node, self.graph.call_module(name, (matrix, value)))
        self.heads[name] = Heads(
            name, attention.n_heads, attention.head_dim, f"{layer}.q", f"{layer}.k", f"{layer}.v", layer
        )

    def _attention_names(self, layer: str) -> tuple[str, str]:
        """Names of the modules of weights and heads: beside the layer of q, k and v, or in it where these are taken."""
        container = layer.rpartition(".")[0]
        beside = [f"{container}.{part}".removeprefix(".") for part in ("weights", "heads")]
        for name in beside:
            is_users = any(f"{own}.".startswith(f"{name}.") for own in self.parameter_names.values())
            if is_users or _has_submodule(self.root, name):
                return f"{layer}.weights", f"{layer}.heads"
        weights, heads = beside
        return weights, heads

    def _layer_norm(self, node: fx.Node) -> None:
        self.environment[node] = self._norm(node, self.environment[_arguments(node)[0]])

    def _norm(self, node: fx.Node, source: fx.Node) -> fx.Node:
        """A layer norm of `node`'s parameters behind `source`, which may hold several heads side by side."""
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        arguments: dict[str, Any] = {"eps": 1e-5, **dict(zip(names, node.args, strict=False)), **node.kwargs}
        shape = arguments["normalized_shape"]
        if len(shape) != 1:
            raise UnsupportedNetworkError(f"The layer norm in {_place(node)} isn't over channels alone.")
        norm = LayerNorm(shape[0], eps=arguments["eps"], device="meta")
        for key in ("weight", "bias"):
            tensor = self._tensor(node, arguments.get(key))
            setattr(norm, key, None if tensor is None else nn.Parameter(tensor.clone()))
        name = _scope(node)
        if _has_submodule(self.root, name):
            name = f"layernorm_{node.name}"
        _add_submodule(self.root, name, norm)
        new = self.graph.call_module(name, (source,))
        new.meta["shape"] = shape_of(source)
        self.scopes[new] = _scope(node)
        return new

    def _given(self, node: fx.Node, argument: fx.Node) -> Tensor:
        tensor = self._tensor(node, argument)
        assert tensor is not None
        return tensor

    def _adds_constant(self, node: fx.Node) -> bool:
        """Whether a step adds a parameter to tokens."""
        tokens, constant = _arguments(node)[:2]
        is_constant = isinstance(constant, fx.Node) and constant.name in self.tensors
        return (
            is_constant
            and tokens in self.from_images
            and len(shape_of(self.environment[tokens])) == 2
            and tuple(constant.meta["val"].shape[1:]) == shape_of(self.environment[tokens])
            and not node.kwargs
        )

    def _prepends_constants(self, node: fx.Node) -> bool:
        """Whether a step puts tokens that are parameters before those of the image."""
        operands, dimension = (*_arguments(node), 0)[:2]
        *constants, tokens = operands
        return (
            dimension in (1, -2)
            and bool(constants)
            and tokens in self.from_images
            and len(shape_of(self.environment[tokens])) == 2
            and all(c.target is aten.expand.default and _arguments(c)[0].name in self.tensors for c in constants)
            and all(c.meta["val"].ndim == 3 and len(_arguments(c)[0].meta["val"]) == 1 for c in constants)
        )

    def _scaled_layer(self, node: fx.Node) -> nn.Linear | None:
        """The layer whose outputs a step multiplies by a parameter, channel by channel (LayerScale)."""
        source, scale = _arguments(node)
        if source not in self.from_images or not isinstance(scale, fx.Node) or scale.name not in self.tensors:
            return None
        before = self.environment[source]
        layer = self.root.get_submodule(str(before.target)) if before.op == "call_module" else None
        if not isinstance(layer, nn.Linear) or self._is_shared(source):
            return None
        return layer if tuple(scale.meta["val"].shape) == (layer.out_features,) else None

    def _averaged_classifiers(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The two dense layers whose mean are the logits, of a distilled network."""
        total, divisor = _arguments(node)[:2]
        if divisor != 2 or total.target not in _SUMS or not all(user.op == "output" for user in node.users):
            return None
        layers = [self.environment.get(operand) for operand in _arguments(total)]
        for layer in layers:
            if layer is None or layer.op != "call_module":
                return None
            if not isinstance(self.root.get_submodule(str(layer.target)), nn.Linear):
                return None
        left, right = layers
        return left, right  # type: ignore[return-value] # both are nodes by now

    def _join(self, node: fx.Node, left: fx.Node, right: fx.Node) -> None:
        """One dense layer on both layers' inputs; it has the first one's name."""
        layers: list[Any] = [self.root.get_submodule(str(layer.target)) for layer in (left, right)]
        first, second = layers
        zeros = torch.zeros_like(first.weight[:, 0])
        biases = [zeros if layer.bias is None else layer.bias.detach() for layer in layers]
        both = self.graph.call_function(aten.cat.default, ([left.args[0], right.args[0]], 1))
        inputs: list[Any] = [left.args[0], right.args[0]]
        both.meta["shape"] = (sum(shape_of(source)[0] for source in inputs),)
        self.scopes[both] = _scope(node)
        joined = nn.Linear(1, 1, device="meta")
        weight = torch.cat([first.weight.detach(), second.weight.detach()], dim=1) / 2
        _set_parameters(joined, weight, (biases[0] + biases[1]) / 2)
        _add_submodule(self.root, str(left.target), joined)
        self._record(node, self.graph.call_module(str(left.target), (both,)))

    def _batch_norm(self, node: fx.Node) -> None:
        source, weight, bias, running_mean, running_variance, training, _, epsilon = _arguments(node)[:8]
        name = self.parameter_names.get(getattr(running_mean, "name", ""), _scope(node)).removesuffix(".running_mean")
        mean, variance = self._tensor(node, running_mean), self._tensor(node, running_variance)
        if training or mean is None or variance is None:
            raise UnsupportedNetworkError(
                f"The batch norm {name!r} uses the batch's own statistics; relevance needs running statistics."
            )
        before = self.environment[source]
        layer = self.root.get_submodule(str(before.target)) if before.op == "call_module" else None
        if not isinstance(layer, nn.Conv2d | nn.Linear) or self._is_shared(source) or before.target in self.folded:
            raise UnsupportedNetworkError(
                f"The batch norm {name!r} doesn't follow a convolution or dense layer that it could be folded into "
                "(pre-activation and densely connected networks), so its relevance can't be propagated correctly."
            )
        scale = (variance + epsilon).rsqrt()
        shift = -mean * scale
        if (gamma := self._tensor(node, weight)) is not None:
            scale, shift = scale * gamma, shift * gamma
        if (beta := self._tensor(node, bias)) is not None:
            shift = shift + beta
        old_bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach()
        _set_parameters(
            layer,
            layer.weight.detach() * scale.reshape(-1, *[1] * (layer.weight.ndim - 1)),
            old_bias * scale + shift,
        )
        self.folded[str(before.target)] = name
        self.environment[node] = before

    def _is_shared(self, node: fx.Node) -> bool:
        """Whether another step too reads a layer's output, here or before the identities in between."""
        while True:
            if sum(isinstance(user.meta.get("val"), Tensor) for user in node.users) > 1:
                return True
            if node.target not in _IDENTITIES | _CONVERSIONS:
                return False
            node = _arguments(node)[0]

    def _check_aliases(self, node: fx.Node) -> None:
        """Refuses a step that overwrites memory which a view still shows: the copy has no such views."""
        if not _overwrites(node):
            return
        root = _arguments(node)[0]
        while _is_alias(root):
            root = _arguments(root)[0]
        aliases: list[fx.Node] = [root]
        for alias in aliases:
            for user in alias.users:
                if user is node or user.target in _ASSERTIONS:
                    continue
                if self.positions[user] > self.positions[node] and isinstance(user.meta.get("val"), Tensor):
                    raise UnsupportedNetworkError(
                        f"The in-place step {_name(node)!r} in {_place(node)} overwrites values that {_name(user)!r} "
                        f"in {_place(user)} reads through a view; make it out of place."
                    )
                if _is_alias(user):
                    aliases.append(user)

    def _identity(self, node: fx.Node) -> None:
        if "dropout" in str(node.target) and node.args[2]:
            raise UnsupportedNetworkError(
                f"The dropout in {_place(node)} is active; call `.eval()` on the whole network first."
            )
        self.environment[node] = self.environment[_arguments(node)[0]]

    def _operation(self, node: fx.Node, kind: type[Operation], inputs: int) -> None:
        if node.kwargs.get("alpha", 1) != 1:
            raise UnsupportedNetworkError(f"The sum in {_place(node)} scales a summand; only plain sums are known.")
        target = _out_of_place(node)
        keywords = {key: value for key, value in node.kwargs.items() if key != "alpha"}
        arguments = _arguments(node)
        operation = kind(target, arguments[inputs:], keywords)
        if kind is Activation and bool(operation.apply_operator(torch.zeros(1)) != 0):
            raise UnsupportedNetworkError(
                f"The activation {_name(node)!r} in {_place(node)} isn't 0 at 0: a pruned filter wouldn't stay silent."
            )
        self._call(node, f"{kind.__name__.lower()}_{node.name}", operation, *arguments[:inputs])

    def _gate(self, node: fx.Node, gate: fx.Node) -> None:
        left, right = _arguments(node)
        features = left if right is gate else right
        self._call(node, f"constantgate_{node.name}", ConstantGate(aten.mul.Tensor), features, gate)

    def _copy(self, node: fx.Node) -> None:
        def convert(argument: fx.Node) -> fx.Node:
            if argument not in self.environment and argument.op == "placeholder":
                name = f"constant_{argument.name}"
                if not hasattr(self.root, name):
                    self.root.register_buffer(name, self.tensors[argument.name].clone())
                self.environment[argument] = self.graph.get_attr(name)
            return self.environment[argument]

        new = self.graph.node_copy(node, convert)
        new.target = _out_of_place(node)
        new.meta.clear()
        self._record(node, new)

    def _operands_are_images(self, node: fx.Node) -> bool:
        shapes = [
            tuple(argument.meta["val"].shape)
            for argument in _arguments(node)[:2]
            if argument in self.from_images and isinstance(argument.meta.get("val"), Tensor)
        ]
        return len(shapes) == 2 and shapes[0][1:] == shapes[1][1:]

    def _gate_operand(self, node: fx.Node) -> fx.Node | None:
        """The operand that a bounded activation made: the gate; the other one is features."""
        operands: tuple[fx.Node, ...] = _arguments(node)[:2]
        if not self.from_images.issuperset(operands):
            return None
        for operand in operands:
            source = operand
            while source.target in (_MOVES | _IDENTITIES | _EXPANSIONS) - {aten.cat.default}:
                source = _arguments(source)[0]
            if source.target in _GATE_ACTIVATIONS:
                return operand
        return None

    # Describing the result.

    def _describe(self, module: fx.GraphModule, classes: Sequence[int] | None) -> CanonicalNetwork:
        (output,) = (node for node in module.graph.nodes if node.op == "output")
        carrying = _relevance_path(module, output.args[0])
        for node in module.graph.nodes:
            if node in carrying:
                self._check(module, node)
        layers: dict[str, Layer] = {}
        for node in module.graph.nodes:
            if node in carrying and node.op == "call_module" and _is_layer(module, node):
                name = str(node.target)
                layers[name] = Layer(
                    name,
                    width=n_channels(shape_of(node)),
                    norm=self.folded.get(name),
                    input_shape=shape_of(node.all_input_nodes[0]),
                    output_shape=shape_of(node),
                    kernel=tuple(getattr(module.get_submodule(name), "kernel_size", (1, 1))),
                )
        if not layers:
            raise UnsupportedNetworkError("The network has no convolution or dense layer that relevance flows through.")
        classifier = self._classifier(module, output.args[0], layers)
        if classes is not None:
            layers[classifier] = _restrict(module, layers[classifier], classes)
        sums = [
            node
            for node in module.graph.nodes
            if node in carrying
            and node.op == "call_module"
            and isinstance(module.get_submodule(node.target), ResidualSum)
        ]
        scopes = tuple(dict.fromkeys(self.scopes[node] for node in sums))
        blocks = _blocks(scopes, self.heads)
        module.eval().requires_grad_(False)
        return CanonicalNetwork(
            module=module,
            layers=layers,
            classifier=classifier,
            residual_scopes=scopes,
            residual_sums=tuple(str(node.target) for node in sums),
            blocks=blocks,
            input_shape=self.input_shape,
            heads=self.heads,
            kinds=self._kinds(module, layers, classifier, blocks),
        )

    def _kinds(
        self, module: fx.GraphModule, layers: dict[str, Layer], classifier: str, blocks: Sequence[str]
    ) -> dict[str, str]:
        """Kind of all that could be components, by name in forward order."""
        if not self.heads:
            return {name: "filters" for name in layers if name != classifier}
        of_attention = {name for heads in self.heads.values() for name in (heads.query, heads.key, heads.value)}
        kinds = {}
        for node in module.graph.nodes:
            name = str(node.target)
            if name in self.heads:
                kinds[name] = "heads"
                continue
            if name not in layers or name in of_attention or layers[name].is_convolution:
                continue
            in_block = any(name.startswith(f"{block}.") for block in blocks)
            if in_block and not _reads_heads(module, node, self.heads):
                kinds[name] = "mlp"
        return kinds

    def _check(self, module: fx.GraphModule, node: fx.Node) -> None:
        known = node.op in ("placeholder", "output", "call_module") or node.target in _MOVES
        if known and node.target in (aten.constant_pad_nd.default, aten.pad.default):
            mode_and_value = (*_arguments(node)[2:], *node.kwargs.values())
            known = all(argument in (None, 0, "constant") for argument in mode_and_value)
        if known and node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), nn.Linear):
            known = len(shape_of(node)) <= (2 if self.heads else 1)
        if any(source.op == "get_attr" for source in node.all_input_nodes):
            known = False  # a parameter that takes part otherwise than as a weight would take relevance unseen
        scope = self.scopes.get(node)
        place = f"module {scope!r}" if scope else "the root module"
        if not known:
            raise UnsupportedNetworkError(
                f"The step {_name(node)!r} in {place} has no relevance "
                "rule here, so the network can't be attributed correctly."
            )
        if node in self.not_by_image:
            raise UnsupportedNetworkError(
                f"The step {_name(node)!r} in {place} gives values whose first dimension isn't the images' "
                "(MobileViT folds patches into it), so relevance can't be told apart by image."
            )

    def _classifier(self, module: fx.GraphModule, logits: fx.Node, layers: dict[str, Layer]) -> str:
        node = logits
        while not (node.op == "call_module" and node.target in layers):
            source = _arguments(node)[0] if node.target in _MOVES else None
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


def _blocks(residual_scopes: Sequence[str], heads: Collection[str]) -> tuple[str, ...]:
    """The innermost residual scope around each attention's heads, in forward order."""
    around = [[scope for scope in residual_scopes if scope and name.startswith(f"{scope}.")] for name in heads]
    return tuple(dict.fromkeys(max(scopes, key=len) for scopes in around if scopes))


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


def _is_whole(node: fx.Node) -> bool:
    """Whether a slice leaves nothing out."""
    return bool(node.meta["val"].shape == _arguments(node)[0].meta["val"].shape)


def _restrict(module: fx.GraphModule, layer: Layer, classes: Sequence[int]) -> Layer:
    classifier = module.get_submodule(layer.name)
    assert isinstance(classifier, nn.Linear | nn.Conv2d)
    out_of_range = [index for index in classes if not 0 <= index < layer.width]
    if out_of_range:
        raise UnsupportedNetworkError(f"The network has outputs 0 to {layer.width - 1}, but {classes=} were asked for.")
    rows = torch.as_tensor(list(classes), device=classifier.weight.device)
    bias = None if classifier.bias is None else classifier.bias.detach()[rows]
    _set_parameters(classifier, classifier.weight.detach()[rows], bias)
    # The steps between the classifier and the output only take its axes of size 1 away, some by the number of classes.
    (node,) = (node for node in module.graph.nodes if node.target == layer.name)
    node.meta["shape"] = (len(rows), *shape_of(node)[1:])
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    if output.args[0] is not node:
        with module.graph.inserting_before(output):
            logits = module.graph.call_function(aten.flatten.using_ints, (node, 1))
        logits.meta["shape"] = (len(rows),)
        output.args = (logits,)
        module.graph.eliminate_dead_code()
        module.recompile()
    return replace(layer, width=len(rows), output_shape=(len(rows), *layer.output_shape[1:]))


def _is_layer(module: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(module.get_submodule(str(node.target)), nn.Conv2d | nn.Linear)


def _set_parameters(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    if isinstance(layer, nn.Conv2d):
        layer.out_channels = weight.shape[0]
    else:
        layer.out_features, layer.in_features = weight.shape


def _has_submodule(root: nn.Module, name: str) -> bool:
    try:
        root.get_submodule(name)
    except AttributeError:
        return False
    return True


def _add_submodule(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        if not isinstance(getattr(root, parent, None), nn.Module):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(last, module)


def _keeps_dtype(node: fx.Node) -> bool:
    before, after = _arguments(node)[0].meta["val"], node.meta["val"]
    return bool(before.dtype == after.dtype)


def _scope(node: fx.Node) -> str:
    """Name of the innermost module whose forward made the node."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """A node's positional arguments, whose types its operator decides."""
    return node.args


def _place(node: fx.Node) -> str:
    scope = _scope(node)
    return f"module {scope!r}" if scope else "the root module"


def _name(node: fx.Node) -> str:
    return getattr(node.target, "_opname", None) or getattr(node.target, "__name__", None) or str(node.target)


def _overwrites(node: fx.Node) -> bool:
    """Whether an operator changes its first argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _out_of_place(node: fx.Node) -> Any:
    """The operator that computes what an in-place one writes: a backward pass or a second reader needs its input."""
    if not _overwrites(node):
        return node.target
    schema = node.target._schema  # type: ignore[union-attr]
    packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
    plain = getattr(packet, schema.overload_name or "default", None)
    if plain is None or plain._schema.is_mutable:
        raise UnsupportedNetworkError(f"The in-place step {_name(node)!r} in {_place(node)} has no form that isn't.")
    return plain


def _is_alias(node: fx.Node) -> bool:
    """Whether an operator's result shares memory with its first argument."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    return any(result.alias_info is not None for result in schema.returns) or "dropout" in schema.name


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else (value * 2 if len(value) == 1 else value)
    return int(first), int(second)
