"""The pruned network in the unpruned one's shape: what it computes, and what it is attributed."""

import pytest
import torch
from torch import nn

from objectives.attribution.criteria import ReferenceSamples, criterion_scores
from objectives.attribution.engine import ZennitAttribution
from objectives.attribution.shared import SharedAttribution
from objectives.canonization import canonize
from objectives.datasets import LabelledImages
from objectives.layer_groups import group_layers
from objectives.memory import Batches
from objectives.pruning.masking import masked
from objectives.pruning.ranking import of_kept
from objectives.pruning.slimming import slim
from objectives.pruning.zeroing import zeroed
from search_spaces.composites import CompositeSpec
from search_spaces.criteria import CRITERIA, CriterionSpec
from search_spaces.rules import RuleSpec

NETWORKS = ["vgg11_bn", "cifar_resnet20", "mobilenetv3_small_100", "inception"]
COMPOSITES = [
    CompositeSpec(*map(RuleSpec, rules), abs=True, normalize=normalize)
    for rules, normalize in (
        (("Epsilon", "ZPlus", "AlphaBeta", "Gamma"), "none"),
        (("Gamma", "Epsilon", "ZPlus", "Epsilon"), "l2"),
    )
]


def random_masks(canonical, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(n, generator=generator) >= share for name, n in canonical.components.items()}


def scores(engine, composite, masks):
    relevance = engine.attribute(composite)
    return relevance.scores(absolute=composite.abs, normalize=composite.normalize, masks=masks)


def check_engines(network, canonical, images, labels, composite, masks):
    """Both engines, on the zeroed network, against zennit on the user's network with its components masked."""
    references = LabelledImages(images, labels)
    pruned = zeroed(canonical, masks)
    groups = group_layers(canonical)
    with masked(network, canonical.prunable, masks):
        own = canonize(network, canonical.input_shape).choosing(canonical.choice)
    expected = scores(ZennitAttribution(own, groups, references, len(images)), composite, masks)
    assert list(expected) == [name for name, mask in masks.items() if mask.any()]
    for engine in (ZennitAttribution, SharedAttribution):
        given = scores(engine(pruned, groups, references, len(images)), composite, masks)
        assert list(given) == list(expected)
        for name, values in expected.items():
            assert len(values) == int(masks[name].sum())
            torch.testing.assert_close(given[name], values, rtol=0, atol=1e-10 * max(1e-9, float(values.abs().max())))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_zeroed_network_computes_what_the_slim_one_does(prunable, name):
    subject = prunable(name)
    before = {key: tensor.clone() for key, tensor in subject.canonical.module.state_dict().items()}
    for masks, _ in zip(subject.random_masks(), range(3), strict=False):
        torch.testing.assert_close(
            zeroed(subject.canonical, masks).module(subject.images),
            slim(subject.canonical, masks)(subject.images),
            rtol=1e-9,
            atol=1e-9,
        )
    after = subject.canonical.module.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    everything = {name: torch.ones(n, dtype=torch.bool) for name, n in subject.canonical.components.items()}
    assert zeroed(subject.canonical, everything) is subject.canonical


@pytest.mark.parametrize(
    ("name", "share"),
    [("cifar_resnet20", 0.2), ("cifar_resnet20", 0.9), ("mobilenetv3_small_100", 0.5), ("inception", 0.3)],
)
def test_engines_agree_under_masks(prunable, name, share):
    subject = prunable(name)
    masks = random_masks(subject.canonical, share)
    labels = torch.arange(len(subject.images))
    for composite in COMPOSITES:
        check_engines(subject.network, subject.canonical, subject.images, labels, composite, masks)


@pytest.mark.parametrize("components", ["all", "mlp"])
@pytest.mark.parametrize("attention", ["AttnLRP", "CP"])
def test_engines_agree_on_transformers_under_masks(build_transformer, components, attention):
    network = build_transformer("class-token")
    canonical = canonize(network, (3, 16, 16)).choosing(components)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    composite = CompositeSpec(*map(RuleSpec, ("Epsilon", "Gamma", "Epsilon", "Epsilon")), abs=True, attention=attention)
    masks = random_masks(canonical, 0.4)
    check_engines(network, canonical, images, torch.tensor([3, 7, 1]), composite, masks)
    torch.testing.assert_close(zeroed(canonical, masks).module(images), slim(canonical, masks)(images))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_are_those_of_the_slim_network(criterion):
    """Of a chain the slim network is canonical itself, so a criterion can be computed on it without any masks."""
    torch.manual_seed(0)
    chain = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 4)),
    )
    canonical = canonize(chain.double().eval().requires_grad_(False), (3, 8, 8))
    masks = random_masks(canonical, 0.5)
    slim_network = canonize(slim(canonical, masks), (3, 8, 8))
    references = LabelledImages(torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0]))
    spec = CriterionSpec(criterion, seed=3 if criterion == "random" else None)

    def samples(network):
        return ReferenceSamples(network, references, Batches("attribution", len(references)))

    given = criterion_scores(spec, samples(zeroed(canonical, masks)), masks)
    if criterion == "random":
        expected = of_kept(criterion_scores(spec, samples(canonical)), masks)
    else:
        expected = criterion_scores(spec, samples(slim_network))
    assert list(given) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(given[name], values, rtol=1e-9, atol=1e-15)


def test_weights_that_read_what_is_gone_are_gone():
    """Columns go only where nothing writes a channel any more: here two writers share channels by a residual sum."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch, self.reader = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
            self.fc = nn.Linear(2, 3)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.fc(torch.relu(self.reader(x + self.branch(x))).mean((2, 3)))

    canonical = canonize(Block().double().eval(), (3, 4, 4))
    masks = {name: torch.ones(n, dtype=torch.bool) for name, n in canonical.components.items()}
    masks["stem"][:2] = False
    masks["branch"][1:3] = False
    network = zeroed(canonical, masks).module
    assert not network.get_submodule("stem").weight[:2].any()
    assert not network.get_submodule("stem").bias[:2].any()
    lost = [not column.any() for column in network.get_submodule("branch").weight[[0, 3]].unbind(1)]
    assert lost == [True, True, False, False]
    assert [not column.any() for column in network.get_submodule("reader").weight.unbind(1)] == [
        False,
        True,
        False,
        False,
    ]
