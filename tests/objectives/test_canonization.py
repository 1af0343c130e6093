import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from objectives.attribution.operations import Activation, AveragePool, ConstantGate, ResidualSum
from objectives.canonization import canonize
from objectives.errors import UnsupportedNetworkError


def relative_difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


class Tiny(nn.Module):
    """Two convolutions of four filters, a batch norm and a head; a test says how they are put together."""

    def __init__(self, compute, **modules):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.compute = compute
        for name, module in modules.items():
            setattr(self, name, module)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.compute(self, images)


@pytest.fixture
def tiny(lively):
    def tiny(compute, **modules) -> nn.Module:
        torch.manual_seed(0)
        return lively(Tiny(compute, **modules))

    return tiny


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


# The copy.


def test_copy_computes_the_same(classifier):
    with torch.no_grad():
        for batch in (classifier.images, classifier.images[:1], torch.cat([classifier.images] * 2)[:3]):
            assert relative_difference(classifier.canonical.module(batch), classifier.network(batch)) < 1e-10


def test_copy_is_a_copy(classifier):
    pointers = {tensor.data_ptr() for tensor in classifier.network.state_dict().values()}
    copy = classifier.canonical.module.state_dict()
    assert pointers.isdisjoint(tensor.data_ptr() for tensor in copy.values())
    assert not any(tensor.requires_grad for tensor in classifier.canonical.module.parameters())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in classifier.canonical.module.modules())


def test_components_are_filters_that_relevance_flows_through_and_hidden_neurons(classifier):
    network, canonical = classifier.network, classifier.canonical
    layers = {name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    in_gates = {name for name in layers if ".se." in name}
    assert set(canonical.layers) == layers - in_gates
    assert bool(in_gates) == (classifier.name in {"mobilenetv3_small_100", "efficientnet_b0", "regnety_002"})
    last = list(canonical.layers)[-1]
    assert canonical.classifier == last
    assert list(canonical.components) == list(canonical.layers)[:-1]
    for name, width in canonical.components.items():
        assert width == network.get_submodule(name).weight.shape[0]
    assert canonical.n_outputs == 10


def test_layers_say_what_was_folded_into_them_and_their_shapes(build):
    canonical = canonize(build("resnet18"), (3, 64, 64))
    downsampling = canonical.layers["layer2.0.downsample.0"]
    assert (downsampling.norm, downsampling.kernel, downsampling.is_convolution) == (
        "layer2.0.downsample.1",
        (1, 1),
        True,
    )
    assert (downsampling.input_shape, downsampling.output_shape) == ((64, 16, 16), (128, 8, 8))
    fc = canonical.layers["fc"]
    assert (fc.norm, fc.width, fc.is_convolution, fc.input_shape) == (None, 10, False, (512,))
    assert canonical.residual_scopes[:3] == ("layer1.0", "layer1.1", "layer2.0")
    kinds = [type(module) for module in canonical.module.modules()]
    assert kinds.count(ResidualSum) == len(canonical.residual_sums) == 8
    assert (kinds.count(AveragePool), kinds.count(ConstantGate)) == (1, 0)
    assert kinds.count(Activation) == 17


def test_hidden_dense_neurons_are_components(lively):
    torch.manual_seed(0)
    network = lively(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)
        )
    )
    images = torch.randn(3, 3, 8, 8).double()
    canonical = canonize(network, (3, 8, 8))
    assert canonical.components == {"0": 4, "2": 6}
    assert canonical.layers["2"].norm == "3"
    assert relative_difference(canonical.module(images), network(images)) < 1e-10


def test_copy_keeps_the_dtype(build):
    network = build("cifar_resnet20").float()
    images = torch.randn(2, 3, 32, 32)
    copy = canonize(network, (3, 32, 32)).module
    assert {tensor.dtype for tensor in copy.parameters()} == {torch.float32}
    assert relative_difference(copy(images), network(images)) < 1e-5


def test_users_network_is_what_it_was(classifier, snapshot):
    assert snapshot(classifier.network) == classifier.before


def test_own_hooks_and_counters_survive(tiny, images, snapshot):
    calls = []

    def compute(network: nn.Module, images: Tensor) -> Tensor:
        network.counter.add_(1)
        return network.head(network.conv1(images))

    network = tiny(compute)
    network.register_buffer("counter", torch.zeros((), dtype=torch.int64))
    network.conv1.register_forward_hook(lambda module, inputs, output: calls.append(1))
    network.conv2.weight.requires_grad_(False)
    before = snapshot(network)
    canonical = canonize(network, (3, 8, 8))
    assert snapshot(network) == before
    canonical.module(images)
    assert snapshot(network) == before


# Classes.


@pytest.mark.parametrize("name", ["cifar_resnet20", "regnety_002"])
def test_restricting_classes_removes_the_other_rows(build, name):
    network = build(name)
    images = torch.randn(2, 3, 32, 32).double()
    canonical = canonize(network, (3, 32, 32), classes=[7, 2, 5])
    assert relative_difference(canonical.module(images), network(images)[:, [7, 2, 5]]) < 1e-10
    layer = canonical.module.get_submodule(canonical.classifier)
    assert len(layer.weight) == len(layer.bias) == canonical.n_outputs == layer.out_features == 3
    assert canonical.layers[canonical.classifier].output_shape == (3,)


def test_restricting_classes_of_a_convolution_that_is_reshaped_by_their_number(tiny, images):
    network = tiny(lambda n, x: n.last(n.conv1(x).mean((2, 3), keepdim=True)).view(-1, 5), last=nn.Conv2d(4, 5, 1))
    canonical = canonize(network, (3, 8, 8), classes=[4, 0])
    assert relative_difference(canonical.module(images), network(images)[:, [4, 0]]) < 1e-10


@pytest.mark.parametrize("index", [-1, 10])
def test_classes_out_of_range_are_refused(build, index):
    with pytest.raises(UnsupportedNetworkError, match=rf"outputs 0 to 9, but classes=\[1, {index}\] were asked for"):
        canonize(build("cifar_resnet20"), (3, 32, 32), classes=[1, index])


# What users' own networks do.


def in_place(n, x):
    y = n.conv1(x)
    functional.relu_(y)
    return n.head(n.conv2(y) + y)


def reused(n, x):
    y = n.conv1(x)
    y += n.conv2(y.relu())
    return n.head(y)


def normalised_twice(n, x):
    return n.head(n.norm(n.conv2(n.norm(n.conv1(x)))))


def swish_by_hand(n, x):
    y = n.conv1(x)
    return n.head(y * torch.sigmoid(y))


def clone_changed_in_the_gate(n, x):
    y = n.conv1(x)
    gate = y.clone()
    gate.clamp_(0, 0.1)
    return n.head(y * torch.sigmoid(gate))


def concatenated(n, x):
    return n.head(torch.cat([n.conv1(x), n.conv2(n.conv1_b(x))], 1)[:, 2:6])


@pytest.mark.parametrize(
    "compute", [in_place, reused, normalised_twice, swish_by_hand, clone_changed_in_the_gate, concatenated]
)
def test_copy_of_a_network_of_ones_own_computes_the_same(tiny, images, compute):
    network = tiny(compute, conv1_b=nn.Conv2d(3, 4, 3, padding=1))
    assert relative_difference(canonize(network, (3, 8, 8)).module(images), network(images)) < 1e-10


# Refusals name the module and the reason.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnetv2_50", r"^The batch norm 'stages\.0\.blocks\.0\.norm1' doesn't follow a convolution"),
        ("convnext_atto", r"^The step 'permute' in module 'stem\.1' has no relevance rule here"),
        (
            "nf_regnet_b0",
            r"^A parameter of module 'stem\.conv' is computed in the forward pass \(weight standardisation",
        ),
        ("mixer_s32_224", r"in module 'blocks\.0\.mlp_tokens\.fc1' has no relevance rule here"),
        ("swin_tiny_patch4_window7_224", r"in module 'patch_embed' has no relevance rule here"),
    ],
)
def test_families_that_cannot_be_attributed_are_refused(build, name, message):
    side = 224 if name.endswith("_224") else 64
    shallow = {"depths": (1, 1, 1, 1)} if name.startswith("swin") else {}
    with pytest.raises(UnsupportedNetworkError, match=message):
        canonize(build(name, **shallow), (3, side, side))


def test_networks_that_fold_patches_into_the_batch_are_refused(build):
    message = r"^The step 'reshape' in module 'stages\.2\.1' gives values whose first dimension isn't the images'"
    with pytest.raises(UnsupportedNetworkError, match=message):
        canonize(build("mobilevit_xxs"), (3, 64, 64))


def softmax_attention(n, x):
    y = n.conv1(x).flatten(2)
    return n.head((y @ torch.softmax(y.transpose(1, 2) @ y, -1)).unflatten(2, (8, 8)))


def pre_activation(n, x):
    return n.head(n.norm(n.conv1(x).relu()))


def norm_beside_another_reader(n, x):
    y = n.conv1(x)
    return n.head(n.norm(functional.dropout(y, training=False)) + y)


def batch_statistics(n, x):
    return n.head(functional.batch_norm(n.conv1(x), None, None, training=True))


def overwritten_through_a_view(n, x):
    y = n.conv1(x)
    functional.relu_(y.view(y.shape[0], -1))
    return n.head(n.conv2(y))


def two_heads(n, x):
    y = n.conv1(x).mean((2, 3))
    return torch.cat([n.fc(y), n.fc(y)], 1)


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda n, x: n.head(n.conv2(n.conv2(n.conv1(x)))), r"^The module 'conv2' is called twice in one forward pass"),
        (two_heads, r"^The module 'fc' is called twice"),
        (lambda n, x: n.head(torch.sin(n.conv1(x))), r"^The step 'sin' in the root module has no relevance rule"),
        (softmax_attention, r"^The step '(transpose|matmul|softmax)' in the root module has no relevance rule"),
        (lambda n, x: n.head(n.conv1(x) * 2), r"^The step 'mul' in the root module has no relevance rule"),
        (lambda n, x: n.head(n.conv1(x) + n.constant), r"^The step 'add' in the root module has no relevance rule"),
        (
            lambda n, x: n.head(torch.cat([n.conv1(x)[:, :2], n.constant[:, 2:].expand(x.shape[0], -1, -1, -1)], 1)),
            r"^The step 'slice' in the root module",
        ),
        (lambda n, x: n.head(torch.add(n.conv1(x), n.conv1_b(x), alpha=2)), r"^The sum in the root module scales"),
        (lambda n, x: n.head(functional.pad(n.conv1(x), (1, 1, 1, 1), "reflect")), r"^The step 'pad'"),
        (lambda n, x: n.head(functional.pad(n.conv1(x), (1, 1, 1, 1), value=1.0)), r"^The step 'pad'"),
        (lambda n, x: n.head(functional.hardtanh(n.conv1(x), 0.5, 1.0)), r"^The activation 'hardtanh' .* isn't 0 at 0"),
        (pre_activation, r"^The batch norm 'norm' doesn't follow a convolution or dense layer"),
        (norm_beside_another_reader, r"^The batch norm 'norm' doesn't follow a convolution or dense layer"),
        (batch_statistics, r"^The batch norm '' uses the batch's own statistics"),
        (
            overwritten_through_a_view,
            r"^The in-place step 'relu_' in the root module overwrites values that 'conv2d' in",
        ),
        (
            lambda n, x: n.head(functional.dropout(n.conv1(x), 0.5, training=True)),
            r"^The dropout in the root module is",
        ),
        (
            lambda n, x: n.fc(functional.linear(n.conv1(x).mean((2, 3)), n.conv2.weight.mean((2, 3)))),
            r"^A parameter of the",
        ),
        (
            lambda n, x: n.head(functional.conv2d(n.conv1(x), n.conv2.weight, n.conv2.bias * 2)),
            r"^A parameter of the root module is computed in the forward pass",
        ),
        (
            lambda n, x: n.head(n.conv2(n.conv1(x).reshape(-1, 4, 4, 8)).reshape(-1, 4, 8, 8)),
            r"^The step 'reshape' in the root module gives values whose first dimension isn't the images'",
        ),
        (lambda n, x: n.head(n.conv1(x)).softmax(1), r"^The step 'softmax' in the root module"),
        (lambda n, x: n.head(n.conv1(x)).relu(), r"^The logits aren't the outputs of a dense layer: they come from"),
        (lambda n, x: n.conv2(n.conv1(x)).mean((2, 3)), r"^The logits aren't the outputs of a dense layer"),
        (lambda n, x: torch.cat([n.head(n.conv1(x)), n.fc_b(n.conv2(n.conv1_b(x)).mean((2, 3)))], 1), r"from 'cat'\.$"),
        (lambda n, x: n.head(n.conv1(x))[:, :3], r"^The last layer 'fc' doesn't give one value a class"),
        (lambda n, x: n.conv1(x).flatten(1), r"^The last layer 'conv1' doesn't give one value a class"),
        (lambda n, x: (n.head(n.conv1(x)), x), r"^The network Tiny returns more than one tensor of logits"),
        (lambda n, x: {"logits": n.head(n.conv1(x))}, r"^The network Tiny returns more than one tensor of logits"),
        (lambda n, x: n.fc(n.constant.mean((2, 3))), r"^The network's output doesn't depend on its images"),
        (lambda n, x: n.fc(x), r"^The network Tiny can't be captured as a graph for images of shape \(3, 8, 8\): \S+"),
        (lambda n, x: x.unsafe(), r"can't be captured as a graph .*'unsafe'"),
        (
            lambda n, x: n.head(n.conv1(x).view(len(x), 4, 8, 8)),
            r"fixes the batch size; write `x\.shape\[0\]`, not `len",
        ),
    ],
)
def test_step_that_cannot_be_attributed_is_refused(tiny, compute, message):
    network = tiny(compute, conv1_b=nn.Conv2d(3, 4, 3, padding=1), fc_b=nn.Linear(4, 2))
    network.register_buffer("constant", torch.randn(1, 4, 8, 8).double())
    with pytest.raises(UnsupportedNetworkError, match=message) as caught:
        canonize(network, (3, 8, 8))
    assert "\n" not in str(caught.value)


def test_batch_norm_without_running_statistics_is_refused(tiny):
    network = tiny(lambda n, x: n.head(n.norm(n.conv1(x))), norm=nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(UnsupportedNetworkError, match=r"^The batch norm 'norm' uses the batch's own statistics"):
        canonize(network, (3, 8, 8))


def test_training_mode_is_refused(tiny):
    network = tiny(lambda n, x: n.head(n.norm(n.conv1(x))))
    with pytest.raises(
        UnsupportedNetworkError, match=r"^The network is in training mode; call `\.eval\(\)` on it first"
    ):
        canonize(network.train(), (3, 8, 8))
    network.eval().norm.train()
    with pytest.raises(UnsupportedNetworkError, match=r"^The batch norm 'norm' uses the batch's own statistics"):
        canonize(network, (3, 8, 8))


def test_active_dropout_module_is_refused_by_name(tiny):
    network = tiny(lambda n, x: n.head(n.drop(n.conv1(x))), drop=nn.Dropout())
    network.drop.train()
    with pytest.raises(UnsupportedNetworkError, match=r"^The dropout in module 'drop' is active; call `\.eval\(\)`"):
        canonize(network, (3, 8, 8))


def test_network_without_parameters_is_refused():
    with pytest.raises(UnsupportedNetworkError, match=r"^The network Flatten has no parameters: nothing can be pruned"):
        canonize(nn.Flatten().eval(), (3, 8, 8))


@pytest.mark.parametrize(
    "parametrisation", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal]
)
def test_reparametrised_weights_are_refused(tiny, parametrisation):
    network = tiny(lambda n, x: n.head(n.conv2(n.conv1(x))))
    parametrisation(network.conv2)
    with pytest.raises(
        UnsupportedNetworkError, match=r"^A parameter of module 'conv2' is computed in the forward pass"
    ):
        canonize(network, (3, 8, 8))
