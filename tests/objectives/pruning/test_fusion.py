import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from objectives.canonization import canonize
from objectives.pruning.fusion import fused, largest_step
from objectives.pruning.slimming import draft, slim

aten = torch.ops.aten
MOVES = {aten.index_select.default, aten.index_add.default, aten.index_copy.default}
NETWORKS = [
    "cifar_resnet20",
    "inception",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "regnety_002",
    "seresnet18",
    "vgg11_bn",
]


def targets(module):
    return [node.target for node in module.graph.nodes]


def check_fused(canonical, masks, images):
    """In float64 up to its rounding (rows and kernels); in float32, where layers are fused too, up to that one's.

    Deep networks of random weights blow rounding up, so what the slim network itself loses in float32 is the measure.
    """
    exact = slim(canonical, masks)
    expected = exact(images)
    scale = float(expected.abs().max())
    module = fused(draft(canonical, masks))
    torch.testing.assert_close(module(images), expected, rtol=0, atol=1e-11 * scale)
    exact = exact.float()
    narrow = images.float().contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        single_precision = [exact(images.float()), exact.to(memory_format=torch.channels_last)(narrow)]
        # In both formats, as kernels of different processors lose differently much.
        rounding = 1e-5 * scale + 5 * max(float((logits - expected).abs().max()) for logits in single_precision)
        single = fused(draft(canonical, masks).float().to(memory_format=torch.channels_last))
        logits = single(narrow)
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=rounding)
        assert torch.equal(single(narrow), logits)  # it leaves its weights and the images alone
        assert single(narrow[:1]).shape == (1, logits.shape[1])
    return module, single


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fused_network_computes_what_the_slim_one_does(prunable, name):
    subject = prunable(name)
    ranking = subject.ranking()
    for share in (0, 0.02, 0.3, 0.6, 0.9, 1):
        check_fused(subject.canonical, ranking.masks(int(share * len(ranking))), subject.images)


@pytest.mark.parametrize("name", ["cifar_resnet20", "inception", "mobilenetv2_100", "seresnet18"])
def test_random_shares_of_every_layer(prunable, name):
    subject = prunable(name)
    for masks in itertools.islice(subject.random_masks(), 5):
        check_fused(subject.canonical, masks, subject.images)


def test_nothing_is_moved_between_the_layers_of_a_narrow_network(prunable):
    subject = prunable("cifar_resnet20")
    masks = subject.ranking().masks(200)
    assert MOVES & set(targets(slim(subject.canonical, masks)))
    module, single = check_fused(subject.canonical, masks, subject.images)
    assert not MOVES & {*targets(module), *targets(single)}
    # Every activation, and all sums but the three with a branch that no convolution ends.
    assert aten.relu.default not in targets(single)
    assert targets(single).count(aten.add.Tensor) <= 3


def test_kernels_take_over_padding_that_differs_between_sides():
    torch.manual_seed(0)
    padded = (nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4), nn.ReLU(), nn.Flatten())
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), *padded, nn.Linear(120, 5)).double().eval()
    canonical = canonize(network, (3, 9, 8))
    images = torch.randn(3, 3, 9, 8, dtype=torch.float64)
    module, single = check_fused(canonical, {}, images)
    for each in (module, single):
        assert aten.constant_pad_nd.default not in targets(each)


class Streams(nn.Module):
    """Values that are read again after a sum that could have been put into their memory."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.stem, self.left, self.right, self.last = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8, 8))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        if self.order == "read later by a sum":
            y = torch.relu(x + self.left(x))
            z = x + self.right(y)
        elif self.order == "read later by a layer":
            y = x + self.left(x)
            z = torch.relu(self.right(x)) + self.last(y)
        elif self.order == "seen through a slice":
            view = x[:, :, :4, :4]
            y = torch.relu(x + self.left(x))
            z = y + functional.pad(view, (0, 4, 0, 4))
        elif self.order == "a layer before the sum that is read behind it":
            late = self.right(x)
            y = x + self.left(x)
            z = torch.relu(late + self.last(y))
        else:
            y = self.left(x)
            z = y + y
        return self.fc(torch.cat([y, z], dim=1).mean((2, 3)))


@pytest.mark.parametrize(
    "order",
    [
        "read later by a sum",
        "read later by a layer",
        "a layer before the sum that is read behind it",
        "seen through a slice",
        "summed with itself",
    ],
)
def test_no_value_is_written_over_that_is_still_read(order):
    torch.manual_seed(0)
    network = Streams(order).double().eval()
    canonical = canonize(network, (3, 8, 8))
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    check_fused(canonical, {}, images)
    check_fused(canonical, {"left": torch.arange(8) > 2, "right": torch.arange(8) != 5}, images)


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.ELU()]
)
def test_activations(activation):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 7, 3), activation, nn.Conv2d(7, 4, 1), activation, nn.Flatten(), nn.Linear(16, 5)
    )
    canonical = canonize(network.double().eval(), (3, 4, 4))
    check_fused(canonical, {"0": torch.arange(7) != 2}, 4 * torch.randn(6, 3, 4, 4, dtype=torch.float64))


def test_bfloat16_agrees_within_its_precision(prunable):
    subject = prunable("cifar_resnet20")
    exact = slim(subject.canonical, subject.ranking().masks(100))
    expected = exact(subject.images)
    drawn = draft(subject.canonical, subject.ranking().masks(100))
    module = fused(drawn.bfloat16().to(memory_format=torch.channels_last))
    with torch.inference_mode():
        logits = module(subject.images.bfloat16())
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=0.1 * float(expected.abs().max()))


def test_the_canonical_network_stays_as_it_was(prunable):
    subject = prunable("seresnet18")
    state = {name: tensor.clone() for name, tensor in subject.canonical.module.state_dict().items()}
    for n in (0, 2000):
        fused(draft(subject.canonical, subject.ranking().masks(n)))(subject.images)
    after = subject.canonical.module.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_the_largest_step_reads_and_writes_most():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.Flatten(), nn.Linear(72, 5)
    )
    module = draft(canonize(network.eval(), (3, 6, 6)), {})
    assert largest_step(module.graph) == 2 * 8 * 36  # the ReLU
    assert largest_step(fused(module).graph) == (3 + 8) * 36  # the convolution that has taken it over
