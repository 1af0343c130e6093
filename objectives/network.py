"""The canonical network: a functional copy of a classifier in which every step is known.

`torch.export` captures the network as one graph of ATen operators; from it a copy is built with batch norm folded into
the convolution before it (with its epsilon), residual sums, activations, average pooling and squeeze-and-excite gates
as modules of their own. Attribution, grouping and slimming all read this one graph, so no list of architectures is
needed. What the graph holds beyond the known steps is refused with the module's name: a wrong relevance is worse than
none.

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
        self.positions = {node: position for position, node in enumerate(self.nodes)}

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
        elif target in _PRODUCTS and (gate := self._gate_operand(node)) is not None:
            self._gate(node, gate)
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
        linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        _set_parameters(linear, weight, self._tensor(node, bias[0]) if bias else None)
        self._call(node, name, linear, source)

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
            mode_and_value = (*_arguments(node)[2:], *node.kwargs.values())
            known = all(argument in (None, 0, "constant") for argument in mode_and_value)
        if known and node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), nn.Linear):
            known = len(shape_of(node)) == 1
        if any(source.op == "get_attr" for source in node.all_input_nodes):
            known = False  # a parameter that takes part otherwise than as a weight would take relevance unseen
        if not known:
            scope = self.scopes.get(node)
            raise UnsupportedNetworkError(
                f"The step {_name(node)!r} in {f'module {scope!r}' if scope else 'the root module'} has no relevance "
                "rule here, so the network can't be attributed correctly."
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
