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

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
from objectives.description import RewrittenGraph, describe
from objectives.errors import UnsupportedNetworkError
from objectives.network import CanonicalNetwork, Layer, shape_of
from objectives.self_attention import SelfAttention, find_self_attention
from objectives.steps import (
    ACTIVATIONS,
    ASSERTIONS,
    AVERAGES,
    CONVERSIONS,
    CONVOLUTIONS,
    EXPANSIONS,
    GATE_ACTIVATIONS,
    IDENTITIES,
    MOVES,
    PRODUCTS,
    SUMS,
    arguments_of,
    is_alias,
    is_whole,
    keeps_dtype,
    name_of,
    out_of_place,
    overwrites,
    place_of,
    scope_of,
)

__all__ = ["canonize"]

aten = torch.ops.aten


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
        self.scales: dict[str, tuple[str, ...]] = {}
        self.averaged: dict[str, str] = {}
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
            elif node.op == "call_function" and node.target not in ASSERTIONS:
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
        canonical = describe(
            RewrittenGraph(
                module,
                self.input_shape,
                self.heads,
                self.folded,
                self.scales,
                self.averaged,
                self.scopes,
                self.not_by_image,
            )
        )
        if classes is not None:
            layer = _restrict(module, canonical.layers[canonical.classifier], classes)
            canonical = replace(canonical, layers={**canonical.layers, layer.name: layer})
        module.eval().requires_grad_(False)
        return canonical

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
        elif target in CONVOLUTIONS:
            self._convolution(node)
        elif target is aten.linear.default:
            self._linear(node)
        elif target is aten.batch_norm.default:
            self._batch_norm(node)
        elif target in IDENTITIES or (target in CONVERSIONS and keeps_dtype(node)):
            self._identity(node)
        elif target in ACTIVATIONS:
            self._operation(node, Activation, inputs=1)
        elif target in AVERAGES:
            self._operation(node, AveragePool, inputs=1)
        elif target in SUMS and self._operands_are_images(node):
            self._operation(node, ResidualSum, inputs=2)
        elif target in SUMS and self._adds_constant(node):
            tokens, constant = arguments_of(node)
            self._call(node, f"constantsum_{node.name}", ConstantSum(self._given(node, constant)), tokens)
        elif target is aten.cat.default and self._prepends_constants(node):
            *constants, tokens = arguments_of(node)[0]
            parts = [self._given(node, arguments_of(constant)[0]) for constant in constants]
            self._call(node, f"constanttokens_{node.name}", ConstantTokens(torch.cat(parts, dim=1)), tokens)
        elif target in PRODUCTS and (gate := self._gate_operand(node)) is not None:
            self._gate(node, gate)
        elif target in PRODUCTS and (layer := self._scaled_layer(node)) is not None:
            source, parameter = arguments_of(node)
            scale, before = self._given(node, parameter), self.environment[source]
            bias = None if layer.bias is None else layer.bias.detach() * scale
            _set_parameters(layer, layer.weight.detach() * scale[:, None], bias)
            name = str(before.target)
            self.scales[name] = (*self.scales.get(name, ()), self.parameter_names[parameter.name])
            self.environment[node] = before
        elif target is aten.slice.Tensor and is_whole(node):
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
        self.scopes[new] = scope_of(old)

    def _call(self, old: fx.Node, name: str, module: nn.Module, *inputs: fx.Node) -> None:
        _add_submodule(self.root, name, module)
        self._record(old, self.graph.call_module(name, tuple(self.environment[node] for node in inputs)))

    def _tensor(self, node: fx.Node, argument: fx.Node | None) -> Tensor | None:
        """The parameter or buffer that a step takes as an argument, if it takes one."""
        if argument is None:
            return None
        if argument.name not in self.tensors:
            raise UnsupportedNetworkError(
                f"A parameter of {place_of(node)} is computed in the forward pass (weight standardisation or another "
                "reparametrisation); fold it into the parameter first."
            )
        return self.tensors[argument.name]

    def _weight(self, node: fx.Node) -> tuple[str, Tensor]:
        """Name of a layer, and its weight."""
        argument = arguments_of(node)[1]
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
        source, _, *bias = arguments_of(node)
        linear = nn.Linear(1, 1, device="meta")
        _set_parameters(linear, weight, self._tensor(node, bias[0]) if bias else None)
        self._call(node, name, linear, source)

    def _projection(self, attention: SelfAttention) -> None:
        """A layer each for q, k and v; nothing else reads their joint one."""
        node = attention.projection
        name, weight = self._weight(node)
        source, _, *arguments = arguments_of(node)
        bias = self._tensor(node, arguments[0]) if arguments else None
        for index, part in enumerate("qkv"):
            rows = slice(index * len(weight) // 3, (index + 1) * len(weight) // 3)
            linear = nn.Linear(1, 1, device="meta")
            _set_parameters(linear, weight[rows], None if bias is None else bias[rows])
            self._call(node, f"{name}.{part}", linear, source)
            self.environment[node].meta["shape"] = (*shape_of(self.environment[source])[:-1], len(weight) // 3)
            self.parts[node, part] = self.environment[node]

    def _attention(self, attention: SelfAttention) -> None:
        node, scope = attention.output, scope_of(attention.operator)
        layer = self.parameter_names[arguments_of(attention.projection)[1].name].removesuffix(".weight")
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
        self.environment[node] = self._norm(node, self.environment[arguments_of(node)[0]])

    def _norm(self, node: fx.Node, source: fx.Node) -> fx.Node:
        """A layer norm of `node`'s parameters behind `source`, which may hold several heads side by side."""
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        arguments: dict[str, Any] = {"eps": 1e-5, **dict(zip(names, node.args, strict=False)), **node.kwargs}
        shape = arguments["normalized_shape"]
        if len(shape) != 1:
            raise UnsupportedNetworkError(f"The layer norm in {place_of(node)} isn't over channels alone.")
        norm = LayerNorm(shape[0], eps=arguments["eps"], device="meta")
        for key in ("weight", "bias"):
            tensor = self._tensor(node, arguments.get(key))
            setattr(norm, key, None if tensor is None else nn.Parameter(tensor.clone()))
        name = scope_of(node)
        if _has_submodule(self.root, name):
            name = f"layernorm_{node.name}"
        _add_submodule(self.root, name, norm)
        new = self.graph.call_module(name, (source,))
        new.meta["shape"] = shape_of(source)
        self.scopes[new] = scope_of(node)
        return new

    def _given(self, node: fx.Node, argument: fx.Node) -> Tensor:
        tensor = self._tensor(node, argument)
        assert tensor is not None
        return tensor

    def _adds_constant(self, node: fx.Node) -> bool:
        """Whether a step adds a parameter to tokens."""
        tokens, constant = arguments_of(node)[:2]
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
        operands, dimension = (*arguments_of(node), 0)[:2]
        *constants, tokens = operands
        return (
            dimension in (1, -2)
            and bool(constants)
            and tokens in self.from_images
            and len(shape_of(self.environment[tokens])) == 2
            and all(c.target is aten.expand.default and arguments_of(c)[0].name in self.tensors for c in constants)
            and all(c.meta["val"].ndim == 3 and len(arguments_of(c)[0].meta["val"]) == 1 for c in constants)
        )

    def _scaled_layer(self, node: fx.Node) -> nn.Linear | None:
        """The layer whose outputs a step multiplies by a parameter, channel by channel (LayerScale)."""
        source, scale = arguments_of(node)
        if source not in self.from_images or not isinstance(scale, fx.Node) or scale.name not in self.tensors:
            return None
        before = self.environment[source]
        layer = self.root.get_submodule(str(before.target)) if before.op == "call_module" else None
        if not isinstance(layer, nn.Linear) or self._is_shared(source):
            return None
        return layer if tuple(scale.meta["val"].shape) == (layer.out_features,) else None

    def _averaged_classifiers(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The two dense layers whose mean are the logits, of a distilled network."""
        total, divisor = arguments_of(node)[:2]
        if divisor != 2 or total.target not in SUMS or not all(user.op == "output" for user in node.users):
            return None
        layers = [self.environment.get(operand) for operand in arguments_of(total)]
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
        self.scopes[both] = scope_of(node)
        joined = nn.Linear(1, 1, device="meta")
        weight = torch.cat([first.weight.detach(), second.weight.detach()], dim=1) / 2
        _set_parameters(joined, weight, (biases[0] + biases[1]) / 2)
        _add_submodule(self.root, str(left.target), joined)
        self.averaged[str(left.target)] = str(right.target)
        self._record(node, self.graph.call_module(str(left.target), (both,)))

    def _batch_norm(self, node: fx.Node) -> None:
        source, weight, bias, running_mean, running_variance, training, _, epsilon = arguments_of(node)[:8]
        name = self.parameter_names.get(getattr(running_mean, "name", ""), scope_of(node)).removesuffix(".running_mean")
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
            if node.target not in IDENTITIES | CONVERSIONS:
                return False
            node = arguments_of(node)[0]

    def _check_aliases(self, node: fx.Node) -> None:
        """Refuses a step that overwrites memory which a view still shows: the copy has no such views."""
        if not overwrites(node):
            return
        root = arguments_of(node)[0]
        while is_alias(root):
            root = arguments_of(root)[0]
        aliases: list[fx.Node] = [root]
        for alias in aliases:
            for user in alias.users:
                if user is node or user.target in ASSERTIONS:
                    continue
                if self.positions[user] > self.positions[node] and isinstance(user.meta.get("val"), Tensor):
                    raise UnsupportedNetworkError(
                        f"The in-place step {name_of(node)!r} in {place_of(node)} overwrites values that "
                        f"{name_of(user)!r} in {place_of(user)} reads through a view; make it out of place."
                    )
                if is_alias(user):
                    aliases.append(user)

    def _identity(self, node: fx.Node) -> None:
        if "dropout" in str(node.target) and node.args[2]:
            raise UnsupportedNetworkError(
                f"The dropout in {place_of(node)} is active; call `.eval()` on the whole network first."
            )
        self.environment[node] = self.environment[arguments_of(node)[0]]

    def _operation(self, node: fx.Node, kind: type[Operation], inputs: int) -> None:
        if node.kwargs.get("alpha", 1) != 1:
            raise UnsupportedNetworkError(f"The sum in {place_of(node)} scales a summand; only plain sums are known.")
        target = out_of_place(node)
        keywords = {key: value for key, value in node.kwargs.items() if key != "alpha"}
        arguments = arguments_of(node)
        operation = kind(target, arguments[inputs:], keywords)
        if kind is Activation and bool(operation.apply_operator(torch.zeros(1)) != 0):
            raise UnsupportedNetworkError(
                f"The activation {name_of(node)!r} in {place_of(node)} isn't 0 at 0: a pruned filter wouldn't stay "
                "silent."
            )
        self._call(node, f"{kind.__name__.lower()}_{node.name}", operation, *arguments[:inputs])

    def _gate(self, node: fx.Node, gate: fx.Node) -> None:
        left, right = arguments_of(node)
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
        new.target = out_of_place(node)
        new.meta.clear()
        self._record(node, new)

    def _operands_are_images(self, node: fx.Node) -> bool:
        shapes = [
            tuple(argument.meta["val"].shape)
            for argument in arguments_of(node)[:2]
            if argument in self.from_images and isinstance(argument.meta.get("val"), Tensor)
        ]
        return len(shapes) == 2 and shapes[0][1:] == shapes[1][1:]

    def _gate_operand(self, node: fx.Node) -> fx.Node | None:
        """The operand that a bounded activation made: the gate; the other one is features."""
        operands: tuple[fx.Node, ...] = arguments_of(node)[:2]
        if not self.from_images.issuperset(operands):
            return None
        for operand in operands:
            source = operand
            while source.target in (MOVES | IDENTITIES | EXPANSIONS) - {aten.cat.default}:
                source = arguments_of(source)[0]
            if source.target in GATE_ACTIVATIONS:
                return operand
        return None


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


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else (value * 2 if len(value) == 1 else value)
    return int(first), int(second)
