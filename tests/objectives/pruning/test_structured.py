import copy

import pytest
import torch
from torch import nn

from objectives.canonization import canonize
from objectives.errors import UnsupportedNetworkError
from objectives.pruning.masking import masked
from objectives.pruning.structured import prune_coupled

NETWORKS = [
    "mobilenetv3_small_100",
    "regnety_002",
    "resnet18",
    "resnet50",
    "seresnet18",
    "vgg11_bn",
]


def _scores(canonical, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(n, generator=generator) for name, n in canonical.components.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_widths_and_a_network_that_runs(prunable, name):
    subject = prunable(name)
    canonical = subject.canonical
    n_components = sum(canonical.components.values())
    for n_pruned in (n_components // 2, n_components):
        result = prune_coupled(subject.network, canonical, _scores(canonical), n_pruned)
        widths = {layer: result.network.get_submodule(layer).weight.shape[0] for layer in canonical.components}
        assert result.widths == widths
        assert result.n_removed == n_components - sum(widths.values())
        assert result.n_removed <= n_pruned
        assert min(widths.values()) >= 1
        assert type(result.network) is type(subject.network)
        logits = result.network(subject.images)
        assert logits.shape == (4, 10)
        assert logits.isfinite().all()
        # It is an ordinary network again: it can be put into canonical form, and that knows its sizes.
        if n_pruned == n_components // 2:
            assert canonize(result.network, canonical.input_shape).components == widths
            assert result.n_removed > 0.97 * n_pruned


@pytest.mark.parametrize("name", NETWORKS)
def test_the_users_network_is_untouched(prunable, name):
    subject = prunable(name)
    before = copy.deepcopy(subject.network.state_dict())
    identity = {key: id(parameter) for key, parameter in subject.network.named_parameters()}
    logits = subject.network(subject.images)
    prune_coupled(subject.network, subject.canonical, _scores(subject.canonical), 1000)
    after = subject.network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert {key: id(parameter) for key, parameter in subject.network.named_parameters()} == identity
    assert not any(parameter.requires_grad for parameter in subject.network.parameters())
    assert torch.equal(subject.network(subject.images), logits)


def test_nothing_pruned_is_the_network_itself(prunable):
    subject = prunable("resnet18")
    result = prune_coupled(subject.network, subject.canonical, _scores(subject.canonical), 0)
    assert (result.n_removed, result.widths) == (0, subject.canonical.components)
    assert torch.equal(result.network(subject.images), subject.network(subject.images))


def test_a_coupled_channel_has_the_mean_score_of_its_writers():
    """The two convolutions of the sum lose the same channel; the inner one its own."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.inner = nn.Conv2d(4, 3, 1)
            self.outer = nn.Conv2d(3, 4, 1)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.stem(x))
            x = x + self.outer(torch.relu(self.inner(x)))
            return self.fc(torch.relu(x).mean((2, 3)))

    torch.manual_seed(0)
    network = Block().double().eval()
    canonical = canonize(network, (3, 2, 2))
    scores = {
        "stem": torch.tensor([0.0, 0.9, 0.2, 0.9]),
        "inner": torch.tensor([0.5, 0.3, 0.9]),
        "outer": torch.tensor([1.0, 0.9, 0.3, 0.9]),  # means: 0.5, 0.9, 0.25, 0.9
    }
    images = torch.randn(2, 3, 2, 2, dtype=torch.float64)

    def widths(n_pruned):
        result = prune_coupled(network, canonical, scores, n_pruned)
        return result.n_removed, tuple(result.widths.values())

    # Channel 2 of the sum is first and costs two components; where one is left, the best inner channel takes it.
    assert [widths(n) for n in (0, 1, 2, 3)] == [(0, (4, 3, 4)), (1, (4, 2, 4)), (2, (3, 3, 3)), (3, (3, 2, 3))]
    # Channel 0 and inner channel 0 tie at 0.5: groups in torch-pruning's order; nothing exceeds the number asked for.
    assert all(widths(n)[0] <= n for n in range(12))
    # The last channel of each group stays.
    assert widths(11) == (8, (1, 1, 1))

    result = prune_coupled(network, canonical, scores, 3)
    masks = {
        "stem": torch.tensor([True, True, False, True]),
        "inner": torch.tensor([True, False, True]),
        "outer": torch.tensor([True, True, False, True]),
    }
    with masked(network, canonical.prunable, masks):
        torch.testing.assert_close(result.network(images), network(images), rtol=1e-12, atol=1e-12)


def test_ties_remove_no_more_than_asked_for(prunable):
    """LRP makes many zeros; torch-pruning's own threshold would remove them all."""
    subject = prunable("resnet18")
    zeros = {name: torch.zeros(n) for name, n in subject.canonical.components.items()}
    for n_pruned in (1, 480, 481):
        removed = prune_coupled(subject.network, subject.canonical, zeros, n_pruned).n_removed
        assert n_pruned - 20 < removed <= n_pruned


class _Branches(nn.Module):
    """Two convolutions side by side, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.left = nn.Conv2d(6, 4, 1)
        self.right = nn.Conv2d(6, 5, 3, padding=1)
        self.fc = nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.fc(torch.relu(torch.cat([self.left(x), self.right(x)], dim=1)).mean((2, 3)))


def test_concatenated_branches_are_followed():
    torch.manual_seed(0)
    network = _Branches().eval()
    canonical = canonize(network, (3, 4, 4))
    result = prune_coupled(network, canonical, _scores(canonical), 8)
    assert (result.n_removed, sum(result.widths.values())) == (8, 7)


def test_what_torch_pruning_fails_on_is_refused_in_one_line(prunable):
    """It loses count where a value is concatenated with itself."""
    subject = prunable("inception")
    with pytest.raises(UnsupportedNetworkError) as caught:
        prune_coupled(subject.network, subject.canonical, _scores(subject.canonical), 30)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("torch-pruning can't follow the network Inception (")
    assert message.endswith("prune without `--coupled`.")


def test_zero_padded_shortcuts_are_refused_in_one_line(prunable):
    """The channels that option A adds are no part of torch-pruning's graph."""
    subject = prunable("cifar_resnet20")
    before = copy.deepcopy(subject.network.state_dict())
    with pytest.raises(UnsupportedNetworkError) as caught:
        prune_coupled(subject.network, subject.canonical, _scores(subject.canonical), 344)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("torch-pruning doesn't follow every coupling of CifarResNet: the resized network doesn't")
    assert message.endswith("prune without `--coupled`.")
    after = subject.network.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_missed_coupling_that_runs_all_the_same_is_refused_too():
    """The shift by two channels is no part of torch-pruning's graph, but all sizes fit."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.fc = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.pad(torch.relu(self.conv(x)), (0, 0, 0, 0, 2, 0))
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    network = Shifted().eval()
    canonical = canonize(network, (3, 2, 2))
    with pytest.raises(UnsupportedNetworkError, match="the resized network computes something else"):
        prune_coupled(network, canonical, {"conv": torch.tensor([1.0, 2.0, 0.0, 3.0])}, 1)
