import copy
from dataclasses import replace

import pytest
import torch
from random_ranking import random_ranking
from torch import nn

from objectives.attribution.operations import plain_gradients
from objectives.datasets import LabelledImages
from objectives.errors import TrainingError
from objectives.fingerprints import state_fingerprint
from objectives.memory import Batches
from objectives.pruning.evaluation import Evaluator
from objectives.pruning.fine_tuning import fine_tuned
from objectives.pruning.slimming import slim
from objectives.pruning.trained import TrainedWeights
from objectives.pruning.zeroing import zeroed
from objectives.repair.repairer import Repairer, with_layers
from objectives.training import TrainingOptions
from search_spaces.repairs import RepairSpec

OPTIONS = TrainingOptions(n_epochs=2, batch_size=2, learning_rate=0.01)
LABELS = torch.tensor([0, 1, 2, 3])


def images_of(subject):
    return LabelledImages(subject.images, LABELS)


def masked_training(network, masks, images, options):
    """By definition: the masked network of the unpruned shape takes the same steps, and what is pruned none."""
    module = copy.deepcopy(zeroed(network, masks).module)
    frozen = {name: value == 0 for name, value in module.named_parameters()}
    module.requires_grad_(True)
    optimizer = torch.optim.SGD(module.parameters(), lr=options.learning_rate, momentum=options.momentum)
    generator = torch.Generator().manual_seed(options.seed)
    n_batches = len(images) // options.batch_size
    with plain_gradients(module):  # else its operations pass relevance
        for _ in range(options.n_epochs):
            for rows in torch.randperm(len(images), generator=generator).tensor_split(n_batches):
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(images.images[rows]), images.labels[rows]).backward()
                for name, parameter in module.named_parameters():
                    if parameter.grad is not None:
                        parameter.grad[frozen[name]] = 0
                optimizer.step()
    return module.requires_grad_(False)


@pytest.mark.parametrize("name", ["cifar_resnet20", "inception"])
def test_training_the_slim_network_is_training_the_masked_one(prunable, name):
    subject = prunable(name)
    before = state_fingerprint(subject.canonical.module.state_dict())
    masks = subject.ranking().masks(sum(subject.canonical.components.values()) // 2)
    weights = fine_tuned(subject.canonical, masks, images_of(subject), OPTIONS)
    trained = slim(weights.on(subject.canonical), masks)(subject.images)
    assert state_fingerprint(subject.canonical.module.state_dict()) == before
    assert (trained - slim(subject.canonical, masks)(subject.images)).abs().max() > 1e-3
    expected = masked_training(subject.canonical, masks, images_of(subject), OPTIONS)
    torch.testing.assert_close(trained, expected(subject.images), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["inception", "regnety_002"])
def test_trained_weights_return_to_their_places(prunable, name):
    subject = prunable(name)
    ranking = subject.ranking()
    for rate in (0.1, 0.6):
        masks = ranking.masks(ranking.n_pruned(rate))
        trained = slim(subject.canonical, masks)
        generator = torch.Generator().manual_seed(0)
        for parameter in trained.parameters():
            parameter.data = parameter + 0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        weights = TrainedWeights.of(trained, masks)
        again = slim(weights.on(subject.canonical), masks)
        # Rows that are dead in a group that isn't are zeros of the exact network, whatever they were trained to.
        plain = {name: p for name, p in again.named_parameters() if bool((p != 0).all())}
        assert plain
        for key, parameter in plain.items():
            assert torch.equal(parameter, trained.get_parameter(key))


def test_a_transformers_weights_are_trained_and_return(transformer):
    canonical = transformer.canonical.choosing("all")
    ranking = random_ranking(canonical)
    masks = ranking.masks(len(ranking) // 2)
    images = LabelledImages(transformer.images, transformer.labels)
    weights = fine_tuned(canonical, masks, images, TrainingOptions(n_epochs=1, learning_rate=1e-4))
    before, after = slim(canonical, masks), slim(weights.on(canonical), masks)
    assert after.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(parameter, weights.state[name]) for name, parameter in after.named_parameters())
    assert sum(not torch.equal(p, before.get_parameter(name)) for name, p in after.named_parameters()) > 20


@pytest.mark.parametrize("name", ["cifar_resnet20", "inception", "regnety_002"])
def test_what_grows_around_a_core_leaves_it_as_it_is(prunable, name):
    subject = prunable(name)
    ranking, images = subject.ranking(), images_of(subject)
    larger, smaller = (ranking.masks(ranking.n_pruned(rate)) for rate in (0.2, 0.6))
    gentle = replace(OPTIONS, learning_rate=1e-6 if name == "regnety_002" else 0.01)
    core = fine_tuned(subject.canonical, smaller, images, gentle)
    start = core.on(subject.canonical)
    weights = fine_tuned(start, larger, images, gentle, frozen=core)
    grown = weights.on(subject.canonical)
    assert torch.equal(slim(grown, smaller)(subject.images), slim(start, smaller)(subject.images))
    assert not torch.equal(slim(grown, larger)(subject.images), slim(start, larger)(subject.images))
    places = core.within(subject.canonical, larger)
    n_frozen = sum(int(place.sum()) for place in places.values())
    assert n_frozen == sum(value.numel() for value in core.state.values())
    for key, value in slim(start, larger).named_parameters():
        assert key in places
        assert weights.state[key].shape == value.shape
    # A layer to which the core gives no inputs emits its bias.
    silent = {**larger, next(iter(larger)): torch.zeros_like(next(iter(larger.values())))}
    core = fine_tuned(subject.canonical, silent, images, gentle)
    if core is not None:
        start = core.on(subject.canonical)
        grown = fine_tuned(start, larger, images, gentle, frozen=core).on(subject.canonical)
        assert torch.equal(slim(grown, silent)(subject.images), slim(start, silent)(subject.images))


def test_what_grows_around_a_transformers_core_leaves_it_as_it_is(transformer):
    canonical = transformer.canonical.choosing("all")
    ranking = random_ranking(canonical)
    larger, smaller = (ranking.masks(ranking.n_pruned(rate)) for rate in (0.2, 0.5))
    images, gentle = LabelledImages(transformer.images, transformer.labels), replace(OPTIONS, learning_rate=1e-4)
    core = fine_tuned(canonical, smaller, images, gentle)
    start = core.on(canonical)
    grown = fine_tuned(start, larger, images, gentle, frozen=core).on(canonical)
    assert torch.equal(slim(grown, smaller)(images.images), slim(start, smaller)(images.images))
    assert not torch.equal(slim(grown, larger)(images.images), slim(start, larger)(images.images))


def test_weights_of_one_network_are_never_taken_for_anothers(prunable):
    subject = prunable("inception")
    images = LabelledImages(subject.images, LABELS)
    evaluator = Evaluator(subject.canonical, images, Batches("a test", 4), torch.float64)
    masks = subject.ranking().masks(10)
    plain = evaluator.measure(masks)
    one, two = (
        fine_tuned(subject.canonical, masks, images, TrainingOptions(n_epochs=n, batch_size=4, learning_rate=0.03))
        for n in (1, 60)
    )
    assert one.fingerprint != two.fingerprint
    trained = evaluator.measure(masks, weights=two)
    assert int(trained.correct.sum()) > int(plain.correct.sum())
    assert evaluator.measure(masks) is plain
    assert evaluator.measure(masks, weights=two) is trained
    assert evaluator.measure(masks, weights=one) is not trained
    assert trained.cost == plain.cost
    assert evaluator.loss(masks, weights=two) < evaluator.loss(masks, weights=one) < evaluator.loss(masks)
    assert len({each.mask for each in evaluator.news().measurements}) == 3
    # They were repaired before they were trained.
    assert evaluator.measure(masks, repair=RepairSpec("refit"), weights=two) is trained


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_bias_without_inputs_returns_to_its_place(prunable, with_bias):
    """A repair changes what a layer emits that hears nothing, or gives it a bias."""
    subject = prunable("cifar_resnet20")
    masks = dict(subject.ranking().masks(100))
    masks["layer2.1.conv1"] = torch.zeros_like(masks["layer2.1.conv1"])
    network, name = subject.canonical, "layer2.1.conv2"
    if not with_bias:
        layer = copy.copy(network.module.get_submodule(name))
        layer._parameters = {"weight": layer.weight, "bias": None}
        network = with_layers(network, {name: layer})
    repairer = Repairer(network, subject.images, Batches("a test", 4))
    repaired = slim(repairer.repaired(masks, RepairSpec("refit", 0.1)), masks)
    weights = TrainedWeights.of(repaired, masks)
    assert f"{name}.bias" in weights.state
    assert f"{name}.weight" not in weights.state
    again = slim(weights.on(network), masks)
    torch.testing.assert_close(again(subject.images), repaired(subject.images), rtol=1e-12, atol=1e-12)
    larger = dict(subject.ranking().masks(50))
    images = images_of(subject)
    core = fine_tuned(repairer.repaired(masks, RepairSpec("refit", 0.1)), masks, images, OPTIONS)
    start = core.on(network)
    grown = fine_tuned(start, larger, images, OPTIONS, frozen=core).on(network)
    assert torch.equal(slim(grown, masks)(subject.images), slim(start, masks)(subject.images))


def test_a_bias_that_a_repair_has_added_returns_to_its_place(prunable):
    """Of a layer without one, and in the core of a larger network."""
    subject = prunable("cifar_resnet20")
    name = "layer1.0.conv2"
    layer = copy.copy(subject.canonical.module.get_submodule(name))
    layer._parameters = {"weight": layer.weight, "bias": None}
    unbiased = with_layers(subject.canonical, {name: layer})
    larger, smaller = (subject.ranking().masks(n) for n in (50, 150))
    images = images_of(subject)
    repairer = Repairer(unbiased, subject.images, Batches("a test", 4))
    core = fine_tuned(repairer.repaired(smaller, RepairSpec("refit", 0.1)), smaller, images, OPTIONS)
    assert f"{name}.bias" in core.state
    start = core.on(unbiased)
    assert unbiased.module.get_submodule(name).bias is None
    assert dict(slim(start, smaller).named_parameters()).keys() == core.state.keys()
    weights = fine_tuned(start, larger, images, OPTIONS, frozen=core)
    assert torch.equal(slim(weights.on(unbiased), smaller)(subject.images), slim(start, smaller)(subject.images))


def test_a_network_that_no_image_gets_through_is_not_trained(prunable):
    subject = prunable("inception")
    nothing = subject.ranking().masks(sum(subject.canonical.components.values()))
    assert fine_tuned(subject.canonical, nothing, images_of(subject), OPTIONS) is None


def test_a_rate_that_is_too_large_ends_in_one_line(prunable):
    subject = prunable("inception")
    wild = TrainingOptions(n_epochs=5, batch_size=2, learning_rate=1e300)
    with pytest.raises(TrainingError, match=r"^The training diverged in epoch \d of 5 .* use a smaller one\.$"):
        fine_tuned(subject.canonical, subject.ranking().masks(5), images_of(subject), wild)
