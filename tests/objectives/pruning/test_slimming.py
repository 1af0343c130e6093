import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from objectives.canonization import canonize
from objectives.pruning.masking import masked
from objectives.pruning.rates import DEFAULT_RATES, n_pruned, parse_rates
from objectives.pruning.slimming import Cost, cost, depends_on_images, slim

SMALL = ["cifar_resnet20", "inception", "mobilenetv3_small_100", "regnety_002", "resnet18", "seresnet18"]
LARGE = ["efficientnet_b0", "mobilenetv2_100", "resnet50", "vgg11_bn"]
RATES = parse_rates(DEFAULT_RATES)
TOLERANCE = 1e-9


def kept(canonical, pruned):
    """Masks of all layers; `pruned` maps a layer to what it loses: indices, a slice, or all."""
    masks = {name: torch.ones(n, dtype=torch.bool) for name, n in canonical.components.items()}
    for name, indices in pruned.items():
        masks[name][indices] = False
    return masks


def check_equal(subject, masks):
    """Slim logits equal masked logits, and so do predictions wherever the top two logits differ by more."""
    module = slim(subject.canonical, masks)
    logits = module(subject.images)
    with masked(subject.network, subject.canonical.prunable, masks) as network:
        expected = network(subject.images)
    bound = TOLERANCE * expected.abs().amax(dim=1, keepdim=True)
    assert ((logits - expected).abs() <= bound).all()
    top = expected.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 2 * bound[:, 0]
    assert torch.equal(logits.argmax(dim=1)[clear], expected.argmax(dim=1)[clear])
    assert module(subject.images[:1]).shape == (1, expected.shape[1])
    return module, logits


@pytest.mark.parametrize(
    ("name", "rates"),
    [(name, RATES) for name in SMALL] + [(name, (0.0, 0.05, 0.3, 0.6, 0.95)) for name in LARGE],
)
def test_slim_equals_masked_and_shrinks_at_every_rate(prunable, name, rates):
    subject = prunable(name)
    ranking = subject.ranking()
    costs, predictions = [], []
    for rate in rates:
        module, logits = check_equal(subject, ranking.masks(n_pruned(rate, len(ranking))))
        costs.append(cost(module))
        predictions.append(logits)
    assert costs[0] == cost(subject.canonical.module)
    for before, after in itertools.pairwise(costs):
        assert after.parameters < before.parameters
        assert after.flops < before.flops
    # The test would prove little on networks that say the same of all images or under all masks.
    assert (predictions[0].std(dim=0) > 1e-2 * predictions[0].abs().max()).all()
    assert not torch.allclose(predictions[0], predictions[1], rtol=1e-3)


@pytest.mark.parametrize("name", SMALL + LARGE)
def test_whole_layers_and_nothing_and_everything(prunable, name):
    subject = prunable(name)
    layers = list(subject.canonical.components)
    picked = dict.fromkeys([0, 1, 2, 3, len(layers) // 2, len(layers) // 2 + 1, len(layers) - 2, len(layers) - 1])
    for index in picked:
        check_equal(subject, kept(subject.canonical, {layers[index]: slice(None)}))
    check_equal(subject, {})
    check_equal(subject, kept(subject.canonical, {}))
    _, logits = check_equal(subject, kept(subject.canonical, dict.fromkeys(layers, slice(None))))
    assert (logits == logits[0]).all()


@pytest.mark.parametrize("name", SMALL + LARGE)
def test_streams_and_single_survivors(prunable, name):
    subject = prunable(name)
    layers = list(subject.canonical.components)
    patterns = {
        # A channel of a residual stream is gone where all its writers lost it.
        "first channels of all layers": dict.fromkeys(layers, slice(0, 5)),
        "every second channel of all layers": dict.fromkeys(layers, slice(0, None, 2)),
        "all but one channel": dict.fromkeys(layers, slice(1, None)),
        "all but the last channel": dict.fromkeys(layers, slice(0, -1)),
        "every second layer": dict.fromkeys(layers[::2], slice(None)),
        "every other layer": dict.fromkeys(layers[1::2], slice(None)),
        "all but the stem": dict.fromkeys(layers[1:], slice(None)),
        "disjoint halves": {
            layer: slice(0, None, 2) if index % 2 else slice(1, None, 2) for index, layer in enumerate(layers)
        },
    }
    for pruned in patterns.values():
        check_equal(subject, kept(subject.canonical, pruned))


@pytest.mark.parametrize("name", ["cifar_resnet20", "inception", "mobilenetv3_small_100", "regnety_002", "seresnet18"])
def test_random_shares_of_every_layer(prunable, name):
    """Some layers whole, some gone, the rest anywhere between."""
    subject = prunable(name)
    for masks in itertools.islice(subject.random_masks(), 8):
        check_equal(subject, masks)


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_flops_are_those_that_torch_counts(prunable, share):
    subject = prunable("cifar_resnet20")
    module = slim(subject.canonical, subject.ranking().masks(int(share * len(subject.ranking()))))
    with FlopCounterMode(display=False) as counter:
        module(subject.images)
    assert counter.get_total_flops() == 2 * len(subject.images) * cost(module).flops


def test_restricted_classes_lose_their_rows():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6)).double().eval()
    canonical = canonize(network, (3, 4, 4), classes=[4, 1])
    images = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    masks = {"0": torch.tensor([True, False, True, True])}
    module = slim(canonical, masks)
    with masked(network, canonical.prunable, masks):
        torch.testing.assert_close(module(images), network(images)[:, [4, 1]], rtol=1e-12, atol=1e-12)
    assert cost(module) == Cost(3 * 27 + 3 + 12 * 2 + 2, 4 * 3 * 27 + 12 * 2)


class _Doubled(nn.Module):
    """One value read twice by a sum and by a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x))
        x = x + x
        return self.fc(torch.cat([x, x], dim=1).mean((2, 3)))


def test_a_value_may_be_read_twice_by_one_step():
    torch.manual_seed(0)
    network = _Doubled().double().eval()
    canonical = canonize(network, (3, 4, 4))
    images = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    masks = {"conv": torch.tensor([False, True, False, True])}
    with masked(network, canonical.prunable, masks):
        torch.testing.assert_close(slim(canonical, masks)(images), network(images), rtol=1e-12, atol=1e-12)


def test_slimming_leaves_the_canonical_network_alone(prunable):
    subject = prunable("seresnet18")
    state = {name: tensor.clone() for name, tensor in subject.canonical.module.state_dict().items()}
    code = subject.canonical.module.code
    module = slim(subject.canonical, subject.ranking().masks(2000)).to(torch.bfloat16)
    assert subject.canonical.module.code == code
    after = subject.canonical.module.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert all(tensor.dtype == torch.float64 for tensor in after.values())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.training


class _Chain(nn.Sequential):
    """8 x 8 images, two convolutions, two dense layers: small enough to count by hand."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 7),
            nn.ReLU(),
            nn.Linear(7, 5),
        )


@pytest.mark.parametrize(
    ("pruned", "expected"),
    [
        # Batch norm is folded: 4 biases of the first convolution. 64 positions, then 16.
        ({}, Cost((108 + 4) + (216 + 6) + (168 + 7) + (35 + 5), 108 * 64 + 216 * 16 + 168 + 35)),
        # One filter of four: its row here, its column there.
        ({"0": [2]}, Cost((81 + 3) + (162 + 6) + (168 + 7) + (35 + 5), 81 * 64 + 162 * 16 + 168 + 35)),
        # A filter before the flattening takes four columns along.
        ({"3": [0, 5]}, Cost((108 + 4) + (144 + 4) + (112 + 7) + (35 + 5), 108 * 64 + 144 * 16 + 112 + 35)),
        # A hidden neuron.
        ({"7": [1]}, Cost((108 + 4) + (216 + 6) + (144 + 6) + (30 + 5), 108 * 64 + 216 * 16 + 144 + 30)),
        # No input left: the layer behind is its bias, and computes nothing.
        ({"0": slice(None)}, Cost(6 + (168 + 7) + (35 + 5), 168 + 35)),
        ({"0": slice(None), "3": [0, 1, 2]}, Cost(3 + (84 + 7) + (35 + 5), 84 + 35)),
        ({"3": slice(None)}, Cost(7 + (35 + 5), 35)),
        ({"7": slice(None)}, Cost(5, 0)),
        ({"0": slice(None), "3": slice(None), "7": slice(None)}, Cost(5, 0)),
    ],
)
def test_cost_by_hand(pruned, expected):
    canonical = canonize(_Chain().eval(), (3, 8, 8))
    assert cost(slim(canonical, kept(canonical, pruned))) == expected


def _grouped(in_channels, width, groups, bias):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, in_channels, 1),
        nn.ReLU(),
        nn.Conv2d(in_channels, width, 3, padding=1, groups=groups, bias=bias),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 2),
    )
    return network.double().eval()


@pytest.mark.parametrize(
    ("pruned", "groups", "shape", "n_dead_rows"),
    [
        ([], 2, (8, 2, 3, 3), 0),
        ([1], 2, (8, 2, 3, 3), 1),  # its group lives: a row of zeros
        ([0, 1, 2, 3], 1, (4, 2, 3, 3), 0),  # its group is dead
        ([0, 1, 2, 3, 6], 1, (4, 2, 3, 3), 1),
        ([4, 5, 6], 2, (8, 2, 3, 3), 3),
    ],
)
def test_grouped_convolutions_lose_dead_groups_only(pruned, groups, shape, n_dead_rows):
    network = _grouped(4, 8, 2, bias=True)
    canonical = canonize(network, (3, 4, 4))
    masks = kept(canonical, {"2": pruned})
    module = slim(canonical, masks)
    layer = module.get_submodule("2")
    assert (layer.groups, tuple(layer.weight.shape)) == (groups, shape)
    assert int(((layer.weight.flatten(1) == 0).all(dim=1) & (layer.bias == 0)).sum()) == n_dead_rows
    assert layer.in_channels == 2 * groups
    # The filters before a dead group are alive, so they are computed all the same.
    rows = shape[0]
    assert cost(module) == Cost((12 + 4) + rows * 19 + (rows * 2 + 2), 12 * 16 + rows * 18 * 16 + rows * 2)
    images = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    with masked(network, canonical.prunable, masks):
        torch.testing.assert_close(module(images), network(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_convolutions(bias, multiplier):
    width = 4 * multiplier
    network = _grouped(4, width, 4, bias=bias)
    canonical = canonize(network, (3, 4, 4))
    images = torch.randn(3, 3, 4, 4, dtype=torch.float64)

    def check(pruned):
        masks = kept(canonical, pruned)
        module = slim(canonical, masks)
        with masked(network, canonical.prunable, masks):
            torch.testing.assert_close(module(images), network(images), rtol=1e-12, atol=1e-12)
        return module

    # All filters of a channel: the group is gone.
    assert check({"2": slice(0, multiplier)}).get_submodule("2").groups == 3
    # Its input pruned, itself alive: it still emits its bias.
    assert check({"0": [1, 3]}).get_submodule("2").groups == 4
    check({"0": [1, 3], "2": slice(0, multiplier)})
    check({"0": slice(None)})
    check({"0": slice(None), "2": [0]})
    assert cost(check({"2": slice(None)})) == Cost(2, 0)


def test_gates_are_no_components_and_compute_only_what_their_features_need(prunable):
    subject = prunable("efficientnet_b0")
    canonical = subject.canonical
    assert not [name for name in canonical.components if ".se." in name]
    layer = "blocks.1.0.conv_dw"
    width = canonical.components[layer]
    masks = kept(canonical, {layer: slice(0, 40)})
    module, _ = check_equal(subject, masks)
    reduce, expand = (module.get_submodule(f"blocks.1.0.se.conv_{part}") for part in ("reduce", "expand"))
    n_squeezed = reduce.out_channels
    assert (width, reduce.in_channels, expand.out_channels) == (96, 56, 56)
    full, slimmer = cost(canonical.module), cost(module)
    project = canonical.components["blocks.1.0.conv_pwl"]
    # A depthwise row (9 weights, bias), a column of `reduce`, a row (and bias) of `expand`, a column of the projection.
    assert full.parameters - slimmer.parameters == 40 * (10 + n_squeezed + (n_squeezed + 1) + project)


def test_slim_is_never_larger_than_the_layers_allow(prunable):
    """With one filter of each layer left, every convolution is 1 x 1 channels."""
    subject = prunable("vgg11_bn")
    layers = list(subject.canonical.components)
    module, _ = check_equal(subject, kept(subject.canonical, dict.fromkeys(layers, slice(1, None))))
    widths = {name: tuple(module.get_submodule(name).weight.shape[:2]) for name in layers}
    assert set(widths.values()) == {(1, 1), (1, 3)}


def test_whether_images_still_count(prunable):
    """A layer behind a dead one goes on computing from its bias alone."""
    subject = prunable("cifar_resnet20")
    canonical, layers = subject.canonical, list(subject.canonical.components)
    for pruned, expected in (
        ({}, True),
        (dict.fromkeys(layers[1:], slice(None)), True),  # by way of the shortcuts
        ({"conv1": slice(0, 15)}, True),
        ({"conv1": slice(None)}, False),
        (dict.fromkeys(layers, slice(None)), False),
    ):
        module = slim(canonical, kept(canonical, pruned))
        assert depends_on_images(module) == expected
        logits = module(subject.images)
        assert torch.allclose(logits, logits[:1], rtol=1e-12, atol=1e-12) != expected
