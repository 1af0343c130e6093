"""The canonical network: a functional copy of a classifier in which every step is known.

`torch.export` captures the network as one graph of ATen operators; from it a copy is built with batch norm folded into
the convolution before it (with its epsilon), residual sums, activations, average pooling and squeeze-and-excite gates as
modules of their own. Attribution, grouping and slimming all read this one graph, so no list of architectures is needed.
What the graph holds beyond the known steps is refused with the module's name: a wrong relevance is worse than none.

The user's network is read, never changed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ExportGraphSignature

from objectives.attribution.operations import Activation, AveragePool, ConstantGate, Operation, ResidualSum
from objectives.errors import UnsupportedNetworkError

__all__ = ["CanonicalNetwork", "Layer", "canonize", "shape_of"]

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
    aten.constant_pad_nd.default,
    aten.pad.default,
    aten.cat.default,
}
# In-place operators must not overwrite what a backward pass or a second reader needs.
_OUT_OF_PLACE = {
    aten.relu_.default: aten.relu.default,
    aten.relu6_.default: aten.relu6.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.silu_.default: aten.silu.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.elu_.default: aten.elu.default,
    aten.mish_.default: aten.mish.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.hardsigmoid_.default: aten.hardsigmoid.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
}


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or dense layer that relevance flows through.

    Attributes:
        name: of the module in the user's network.
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
        input_shape: (C, H, W).
    """

    module: fx.GraphModule
    layers: dict[str, Layer]
    classifier: str
    residual_scopes: tuple[str, ...]
    residual_sums: tuple[str, ...]
    input_shape: tuple[int, int, int]
    n_outputs: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_outputs", self.layers[self.classifier].width)

    @property
    def components(self) -> dict[str, int]:
        """Width of every layer whose outputs are components: all but the classifier, in forward order."""
        return {name: layer.width for name, layer in self.layers.items() if name != self.classifier}


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value without the batch dimension."""
    return tuple(node.meta["shape"])


def canonize(
    network: nn.Module, input_shape: Sequence[int], classes: Sequence[int] | None = None
) -> CanonicalNetwork:
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
            return torch.export.export(
                network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
            )
    except Exception as error:  # torch.export raises many kinds; all mean that the network can't be captured
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedNetworkError(
            f"The network {type(network).__name__} can't be captured as a graph for images of shape {input_shape}: {reason}"
        ) from error


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
        self.input_nodes: dict[fx.Node, fx.Node] = {}

    def build(self, classes: Sequence[int] | None) -> CanonicalNetwork:
        for node in self.nodes:
            if node.op == "placeholder" and node.name not in self.parameter_names:
                self._record(node, self.graph.placeholder("images"))
            elif node.op == "call_function" and node.target not in _ASSERTIONS:
                self._rewrite(node)
            elif node.op == "output":
                (logits,) = node.args[0]
                self.graph.output(self.environment[logits])
        module = fx.GraphModule(self.root, self.graph, "CanonicalNetwork")
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        return self._describe(module, classes)

    # Rewriting, node by node.

    def _rewrite(self, node: fx.Node) -> None:
        target = node.target
        if target in _CONVOLUTIONS:
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
        elif target in _PRODUCTS and self._gate_operand(node) is not None:
            self._gate(node)
        else:
            self._copy(node)

    def _record(self, old: fx.Node, new: fx.Node) -> None:
        self.environment[old] = new
        value = old.meta.get("val")
        if isinstance(value, Tensor):
            new.meta["shape"] = tuple(value.shape[1:])
        self.scopes[new] = _scope(old)

    def _call(self, old: fx.Node, name: str, module: nn.Module, *inputs: fx.Node) -> None:
        _add_submodule(self.root, name, module)
        self._record(old, self.graph.call_module(name, tuple(self.environment[node] for node in inputs)))

    def _tensor(self, node: Any) -> Tensor | None:
        return self.tensors.get(node.name) if isinstance(node, fx.Node) else None

    def _layer_name(self, node: fx.Node) -> str:
        weight = node.args[1]
        if self._tensor(weight) is None:
            raise UnsupportedNetworkError(
                f"The weight of {_scope(node) or node.name!r} is computed in the forward pass (weight standardisation or "
                "another reparametrisation); fold it into the parameter first."
            )
        name = self.parameter_names[weight.name].removesuffix(".weight")
        if _has_submodule(self.root, name):
            raise UnsupportedNetworkError(
                f"The module {name!r} is called twice in one forward pass (shared weights), which relevance propagation "
                "doesn't support; give each call a module of its own."
            )
        return name

    def _convolution(self, node: fx.Node) -> None:
        name = self._layer_name(node)
        arguments = dict(
            zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), node.args, strict=False)
        )
        arguments.update(node.kwargs)
        weight = self._tensor(arguments["weight"])
        bias = self._tensor(arguments.get("bias"))
        assert weight is not None
        groups = arguments.get("groups", 1)
        padding = arguments.get("padding", 0)
        convolution = nn.Conv2d(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            stride=_pair(arguments.get("stride", 1)),
            padding=padding if isinstance(padding, str) else _pair(padding),
            dilation=_pair(arguments.get("dilation", 1)),
            groups=groups,
            device="meta",
        )
        _set_parameters(convolution, weight, bias)
        self._call(node, name, convolution, arguments["input"])

    def _linear(self, node: fx.Node) -> None:
        name = self._layer_name(node)
        weight = self._tensor(node.args[1])
        assert weight is not None
        linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        _set_parameters(linear, weight, self._tensor(node.args[2]) if len(node.args) > 2 else None)
        self._call(node, name, linear, node.args[0])

    def _batch_norm(self, node: fx.Node) -> None:
        source, weight, bias, mean, variance, training, _, epsilon = node.args[:8]
        name = self.parameter_names.get(getattr(mean, "name", ""), _scope(node)).removesuffix(".running_mean")
        before = self.environment[source]
        if training or self._tensor(mean) is None:
            raise UnsupportedNetworkError(
                f"The batch norm {name!r} uses the batch's own statistics; relevance needs running statistics."
            )
        layer = self.root.get_submodule(before.target) if before.op == "call_module" else None
        if not isinstance(layer, nn.Conv2d | nn.Linear) or len(source.users) > 1 or before.target in self.folded:
            raise UnsupportedNetworkError(
                f"The batch norm {name!r} doesn't follow a convolution or dense layer that it could be folded into "
                "(pre-activation and densely connected networks), so its relevance can't be propagated correctly."
            )
        mean, variance = self._tensor(mean), self._tensor(variance)
        assert mean is not None
        assert variance is not None
        scale = (variance + epsilon).rsqrt()
        shift = -mean * scale
        if (gamma := self._tensor(weight)) is not None:
            scale, shift = scale * gamma, shift * gamma
        if (beta := self._tensor(bias)) is not None:
            shift = shift + beta
        old_bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach()
        _set_parameters(
            layer,
            layer.weight.detach() * scale.reshape(-1, *[1] * (layer.weight.ndim - 1)),
            old_bias * scale + shift,
        )
        self.folded[str(before.target)] = name
        self.environment[node] = before

    def _identity(self, node: fx.Node) -> None:
        if "dropout" in str(node.target) and node.args[2]:
            raise UnsupportedNetworkError(f"The dropout in {_scope(node)!r} is active in evaluation mode.")
        self.environment[node] = self.environment[node.args[0]]

    def _operation(self, node: fx.Node, kind: type[Operation], inputs: int) -> None:
        if node.kwargs.get("alpha", 1) != 1:
            raise UnsupportedNetworkError(f"The sum in {_scope(node)!r} scales a summand; only plain sums are known.")
        target = _OUT_OF_PLACE.get(node.target, node.target)
        keywords = {key: value for key, value in node.kwargs.items() if key != "alpha"}
        operation = kind(target, node.args[inputs:], keywords)
        self._call(node, f"{kind.__name__.lower()}_{node.name}", operation, *node.args[:inputs])

    def _gate(self, node: fx.Node) -> None:
        gate = self._gate_operand(node)
        features = node.args[0] if node.args[1] is gate else node.args[1]
        assert gate is not None
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
        new.target = _OUT_OF_PLACE.get(node.target, node.target)
        new.meta.clear()
        self._record(node, new)

    def _operands_are_images(self, node: fx.Node) -> bool:
        shapes = [
            tuple(argument.meta["val"].shape)
            for argument in node.args[:2]
            if isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), Tensor)
        ]
        return len(shapes) == 2 and shapes[0][1:] == shapes[1][1:]

    def _gate_operand(self, node: fx.Node) -> fx.Node | None:
        """The operand that a bounded activation made: the gate."""
        for operand in node.args[:2]:
            source = operand
            while isinstance(source, fx.Node) and source.target in _MOVES | _IDENTITIES | _EXPANSIONS:
                source = source.args[0]
            if isinstance(source, fx.Node) and source.target in _GATE_ACTIVATIONS:
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
                    width=shape_of(node)[0],
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
        module.eval().requires_grad_(False)
        return CanonicalNetwork(
            module=module,
            layers=layers,
            classifier=classifier,
            residual_scopes=tuple(dict.fromkeys(self.scopes[node] for node in sums)),
            residual_sums=tuple(str(node.target) for node in sums),
            input_shape=self.input_shape,
        )

    def _check(self, module: fx.GraphModule, node: fx.Node) -> None:
        known = node.op in ("placeholder", "output", "call_module") or node.target in _MOVES
        if known and node.target in (aten.constant_pad_nd.default, aten.pad.default):
            fill = node.args[2] if len(node.args) > 2 else node.kwargs.get("value")
            known = (fill in (None, 0, 0.0) or fill == "constant") and (len(node.args) < 4 or not node.args[3])
        if known and node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), nn.Linear):
            known = len(shape_of(node)) == 1
        if not known:
            name = getattr(node.target, "_opname", None) or str(node.target)
            raise UnsupportedNetworkError(
                f"The step {name!r} in module {self.scopes.get(node) or 'the root'!r} has no relevance rule here, so the "
                "network can't be attributed correctly."
            )

    def _classifier(self, module: fx.GraphModule, logits: fx.Node, layers: dict[str, Layer]) -> str:
        node = logits
        while not (node.op == "call_module" and node.target in layers):
            if node.target not in _MOVES:
                raise UnsupportedNetworkError(
                    f"The logits aren't the outputs of a dense layer: they come from {node.name!r}."
                )
            node = node.args[0]  # type: ignore[assignment]
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


def _restrict(module: fx.GraphModule, layer: Layer, classes: Sequence[int]) -> Layer:
    classifier = module.get_submodule(layer.name)
    assert isinstance(classifier, nn.Linear | nn.Conv2d)
    out_of_range = [index for index in classes if not 0 <= index < layer.width]
    if out_of_range:
        raise UnsupportedNetworkError(f"The network has outputs 0 to {layer.width - 1}, but {classes=} were asked for.")
    rows = torch.as_tensor(list(classes), device=classifier.weight.device)
    bias = None if classifier.bias is None else classifier.bias.detach()[rows]
    _set_parameters(classifier, classifier.weight.detach()[rows], bias)
    behind = {next(node for node in module.graph.nodes if node.target == layer.name)}
    for node in module.graph.nodes:
        if "shape" in node.meta and (node in behind or not behind.isdisjoint(node.all_input_nodes)):
            behind.add(node)
            node.meta["shape"] = (len(rows), *shape_of(node)[1:])
    return replace(layer, width=len(rows), output_shape=(len(rows), *layer.output_shape[1:]))


def _is_layer(module: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(module.get_submodule(str(node.target)), nn.Conv2d | nn.Linear)


def _set_parameters(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    if isinstance(layer, nn.Conv2d):
        layer.out_channels = weight.shape[0]
    else:
        layer.out_features = weight.shape[0]


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
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return bool(before.dtype == after.dtype)


def _scope(node: fx.Node) -> str:
    """Name of the innermost module whose forward made the node."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else (value * 2 if len(value) == 1 else value)
    return int(first), int(second)
