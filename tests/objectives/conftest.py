"""Networks that attribution is proven on, and a tracer of the relevance at every step of a canonical one."""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import timm
import torch
from captured_once import captured_once
from timm.models import vgg
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, fx, nn

import objectives.cifar_resnets  # noqa: F401 (registers its networks with timm)
from objectives.canonization import canonize
from objectives.network import CanonicalNetwork


def _narrow_vgg(depth: str, **options: Any) -> dict[str, Any]:
    widths = [each if each == "M" else each // 4 for each in vgg.cfgs[depth]]
    return {"cfg": widths, "mlp_ratio": 1 / 32, **options}


NARROW: dict[str, dict[str, Any]] = {
    "vgg11_bn": _narrow_vgg("vgg11", norm_layer=nn.BatchNorm2d),
    "vgg16": _narrow_vgg("vgg16"),
    "vgg16_bn": _narrow_vgg("vgg16", norm_layer=nn.BatchNorm2d),
    "resnet18": {"channels": (16, 32, 64, 128)},
    "resnet50": {"channels": (16, 32, 64, 128)},
}
"""Options that give the networks with most weights a quarter of their channels.

What is proven of them follows from their layers and how these are joined. Those of torchvision in
`attribution/test_shared.py` have their full width.
"""
_ZOO: dict[str, tuple[int, dict[str, Any]]] = {
    "vgg11_bn": (32, NARROW["vgg11_bn"]),
    "vgg16": (32, NARROW["vgg16"]),
    "vgg16_bn": (32, NARROW["vgg16_bn"]),
    "resnet18": (64, NARROW["resnet18"]),
    "resnet50": (32, NARROW["resnet50"]),
    "mobilenetv2_100": (64, {}),
    "mobilenetv3_small_100": (64, {}),
    "efficientnet_b0": (64, {}),
    "regnety_002": (64, {}),
    "cifar_resnet20": (32, {}),
}
_TRANSFORMERS: dict[str, tuple[type[VisionTransformer], dict[str, Any]]] = {
    "class-token": (VisionTransformer, {}),
    "average": (VisionTransformer, {"global_pool": "avg", "fc_norm": True}),
    "no-class-token": (VisionTransformer, {"global_pool": "avg", "class_token": False, "qkv_bias": False}),
    "layer-scale": (VisionTransformer, {"init_values": 0.1, "qk_norm": True, "depth": 5}),
    "registers": (VisionTransformer, {"reg_tokens": 2, "no_embed_class": True, "pre_norm": True}),
    "distilled": (VisionTransformerDistilled, {}),
}


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """A network in float64 with random weights, its canonical copy, a few images and what it was before the copy."""

    name: str
    network: nn.Module
    before: list[Any]
    canonical: CanonicalNetwork
    images: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Values and relevances at one step of a forward pass; a relevance is None where none arrives."""

    node: fx.Node
    inputs: tuple[Tensor, ...]
    output: Tensor
    relevance_in: tuple[Tensor | None, ...]
    relevance_out: Tensor


def _lively(network: nn.Module, seed: int) -> nn.Module:
    """Gives batch norms and biases values that would be noticed if they were lost."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
                uniform(module.running_mean, -0.3, 0.3)
                uniform(module.running_var, 0.5, 2.0)
                uniform(module.weight, 0.5, 1.5)
                module.weight[::5] *= -1
                uniform(module.bias, -0.3, 0.3)
            elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                uniform(module.bias, -0.2, 0.2)
            elif isinstance(module, nn.LayerNorm):
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.3, 0.3)
        for name, parameter in network.named_parameters():
            if name.endswith(("pos_embed", "_token", ".gamma")):
                uniform(parameter, -0.5, 0.5)
    return network.double().eval()


def _captured(
    name: str, network: nn.Module, images: Tensor, labels: Tensor, snapshot: Callable[[nn.Module], list[Any]]
) -> Classifier:
    before = snapshot(network)
    return Classifier(name, network, before, canonize(network, tuple(images.shape[1:])), images, labels)


@pytest.fixture(scope="session", autouse=True)
def _captured_once() -> Iterator[None]:
    with captured_once():
        yield


@pytest.fixture(scope="session")
def lively() -> Callable[..., nn.Module]:
    """Puts a network of random weights into float64 and gives its batch norms and biases lively values."""
    return lambda network, seed=0: _lively(network, seed)


@pytest.fixture(scope="session")
def narrow() -> dict[str, dict[str, Any]]:
    """Options of `build` that give the networks with most weights a quarter of their channels."""
    return NARROW


@pytest.fixture(scope="session")
def build() -> Callable[..., nn.Module]:
    """Builds a network by timm's name, with random weights, in float64; options may be of `NARROW`."""

    def build(name: str, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        options = {"num_classes": 10, **options}
        # A VGG of other widths has no name.
        network = vgg.VGG(**options) if "cfg" in options else timm.create_model(name, **options)
        return _lively(network, seed=0)

    return build


@pytest.fixture(scope="session")
def _classifier(
    build: Callable[..., nn.Module], snapshot: Callable[[nn.Module], list[Any]]
) -> Callable[[str], Classifier]:
    """Makes the network of a name once, for all files of a process."""

    @functools.cache
    def make(name: str) -> Classifier:
        size, options = _ZOO[name]
        network = build(name, **options)
        images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return _captured(name, network, images, torch.tensor([3, 7]), snapshot)

    return make


@pytest.fixture(scope="session", params=list(_ZOO))
def classifier(request: pytest.FixtureRequest, _classifier: Callable[[str], Classifier]) -> Classifier:
    """Every network that the product promises to attribute correctly."""
    return _classifier(request.param)


@pytest.fixture(scope="session")
def build_transformer() -> Callable[..., nn.Module]:
    """Builds a small vision transformer by the name of its variant, with random weights, in float64."""

    def build(variant: str, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        kind, own = _TRANSFORMERS[variant]
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 2}
        network = _lively(kind(**{**sizes, "num_classes": 10, **own, **options}), seed=0)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "qkv.weight" in name:  # timm's own weights attend to all tokens nearly alike
                    parameter *= 10
        return network

    return build


@pytest.fixture(scope="session")
def transformer_of(
    build_transformer: Callable[..., nn.Module], snapshot: Callable[[nn.Module], list[Any]]
) -> Callable[[str], Classifier]:
    """Makes the transformer of a variant once, for all files of a process."""

    @functools.cache
    def make(variant: str) -> Classifier:
        network = build_transformer(variant)
        images = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return _captured(variant, network, images, torch.tensor([3, 7, 1]), snapshot)

    return make


@pytest.fixture(scope="session", params=list(_TRANSFORMERS))
def transformer(request: pytest.FixtureRequest, transformer_of: Callable[[str], Classifier]) -> Classifier:
    """Every kind of vision transformer that the product promises to attribute correctly; its network may be masked."""
    made = transformer_of(request.param)
    return replace(made, network=copy.deepcopy(made.network))


@pytest.fixture(scope="session")
def snapshot() -> Callable[[nn.Module], list[Any]]:
    """All that attribution must leave as it was: values bit for bit, identities, hooks, modes, attributes."""
    plain = (bool, int, float, str, tuple, list)  # torch.export puts equal copies in place of containers

    def tensors(named: dict[str, Tensor | None]) -> list[Any]:
        return [
            (
                name,
                id(tensor),
                tensor.data_ptr(),
                tensor._version,
                tensor.requires_grad,
                tensor.numpy(force=True).tobytes(),
            )
            for name, tensor in named.items()
            if tensor is not None
        ]

    def attributes(module: nn.Module) -> list[tuple[str, Any]]:
        return [(key, value) for key, value in vars(module).items() if not isinstance(value, dict | set)]

    def snapshot(network: nn.Module) -> list[Any]:
        return [
            (
                name,
                type(module),
                {key: value if isinstance(value, plain) else id(value) for key, value in attributes(module)},
                [(key, list(value)) for key, value in vars(module).items() if key.endswith("_hooks")],
                [(key, id(child)) for key, child in module._modules.items()],
                list(module._parameters),
                tensors(module._parameters),
                tensors(module._buffers),
            )
            for name, module in network.named_modules()
        ]

    return snapshot


class _Tracer(fx.Interpreter):
    """Runs a graph so that each step's inputs are views of their own, whose gradient is what the step gives them."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.steps: list[tuple[fx.Node, list[Tensor], Tensor]] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_module", "call_function"):
            return super().run_node(n)
        views: list[Tensor] = []

        def part(value: Any) -> Any:
            if isinstance(value, Tensor) and value.requires_grad:
                value = value.view_as(value)
                views.append(value)
            return value

        arguments, keywords = self.fetch_args_kwargs_from_env(n)
        output = getattr(self, n.op)(n.target, fx.node.map_aggregate(arguments, part), keywords)
        if views and isinstance(output, Tensor):
            self.steps.append((n, views, output))
        return output


@pytest.fixture(scope="session")
def trace() -> Callable[..., dict[str, Step]]:
    """Values and relevances at every step that relevance reaches, by the name of the step's node.

    Called with a canonical graph module, a zennit composite, images (N, C, H, W) and labels (N,).
    """

    def trace(module: fx.GraphModule, rules: Any, images: Tensor, labels: Tensor) -> dict[str, Step]:
        tracer = _Tracer(module)
        with rules.context(module):
            logits = tracer.run(images.clone().requires_grad_())
            start = nn.functional.one_hot(labels, logits.shape[1]).to(logits)
            wanted = [tensor for _, views, output in tracer.steps for tensor in (*views, output)]
            relevances = iter(torch.autograd.grad(logits, wanted, start, allow_unused=True))
        steps = {}
        for node, views, output in tracer.steps:
            arriving = tuple(next(relevances) for _ in views)
            relevance = next(relevances)
            if relevance is not None:
                inputs = tuple(view.detach() for view in views)
                steps[node.name] = Step(node, inputs, output.detach(), arriving, relevance)
        return steps

    return trace
