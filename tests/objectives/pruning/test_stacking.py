import itertools

import pytest
import torch
from random_ranking import random_ranking

from objectives.datasets import LabelledImages
from objectives.memory import Batches
from objectives.pruning.evaluation import Evaluator
from objectives.pruning.slimming import cost, slim
from objectives.pruning.stacking import StackedNetwork


def check_stacked(canonical, images, masks):
    stacked = StackedNetwork(canonical, torch.float64)
    logits = stacked(images, stacked.factors(masks, images.device))
    expected = torch.stack([slim(canonical, each)(images) for each in masks])
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["cifar_resnet20", "inception", "mobilenetv3_small_100", "regnety_002", "vgg11_bn"])
def test_several_masks_at_once_are_the_slim_networks(prunable, name):
    subject = prunable(name)
    ranking = subject.ranking()
    masks = [ranking.masks(int(share * len(ranking))) for share in (0, 0.3, 0.8, 1)]
    check_stacked(subject.canonical, subject.images, masks + list(itertools.islice(subject.random_masks(), 2)))


@pytest.mark.parametrize("components", ["all", "heads", "mlp"])
def test_several_masks_of_a_transformer(transformer, components):
    canonical = transformer.canonical.choosing(components)
    ranking = random_ranking(canonical)
    masks = [ranking.masks(int(share * len(ranking))) for share in (0, 0.4, 0.9, 1)]
    check_stacked(canonical, transformer.images, masks)


@pytest.fixture
def evaluators(prunable):
    """Makes one by itself, or one that stacks; both in float64, where rounding flips no prediction."""
    subject = prunable("cifar_resnet20")
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(40, 3, 32, 32, generator=generator, dtype=torch.float64)
    labelled = LabelledImages(images, torch.randint(10, (40,), generator=generator))

    def make(stacks):
        return Evaluator(subject.canonical, labelled, Batches("a test", 16), torch.float64, stacks=stacks)

    return subject, make


@pytest.fixture
def passes(monkeypatch):
    """Images and masks of every pass of a stacked network."""
    seen = []
    call = StackedNetwork.__call__

    def watched(self, images, factors):
        seen.append((len(images), len(factors[0])))
        return call(self, images, factors)

    monkeypatch.setattr(StackedNetwork, "__call__", watched)
    return seen


def test_masks_ahead_are_measured_in_the_same_passes(evaluators, passes):
    subject, make = evaluators
    alone, stacks = make(False), make(True)
    ranking = subject.ranking()
    masks = [ranking.masks(n) for n in (688, 400, 200, 100, 0)]
    for index, each in enumerate(masks):
        expected, measured = alone.measure(each), stacks.measure(each, ahead=masks[index + 1 :])
        assert torch.equal(measured.correct, expected.correct)
        assert measured.cost == expected.cost == cost(slim(subject.canonical, each))
    assert passes == [(16, 5), (16, 5), (8, 5)]
    ours, theirs = stacks.news(), alone.news()
    assert (ours.n_masks, ours.n_known) == (theirs.n_masks, theirs.n_known) == (5, 0)
    assert {known.mask: known.correct for known in ours.measurements} == {
        known.mask: known.correct for known in theirs.measurements
    }
    again = make(True)
    again.learn(ours.measurements)
    assert torch.equal(again.measure(masks[1], ahead=masks).correct, alone.measure(masks[1]).correct)
    assert len(passes) == 3


def test_masks_in_parts(evaluators, passes):
    subject, make = evaluators
    alone, stacks = make(False), make(True)
    ranking = subject.ranking()
    masks = [ranking.masks(n) for n in (400, 200, 100)]
    stacks.measure(masks[2], 10)
    for n_images in (10, 40):
        for index, each in enumerate(masks):
            measured = stacks.measure(each, n_images, ahead=masks[index + 1 :])
            assert torch.equal(measured.correct, alone.measure(each, n_images).correct)
    assert passes == [(10, 1), (10, 2), (16, 3), (14, 3)]


def test_a_pass_has_room_for_so_many_masks(evaluators, passes, monkeypatch):
    subject, make = evaluators
    ranking = subject.ranking()
    masks = [ranking.masks(n) for n in range(0, 700, 100)]
    monkeypatch.setattr("objectives.pruning.evaluation._STACKED_IMAGES", 50)
    make(True).measure(masks[0], 16, ahead=masks[1:])
    monkeypatch.setattr("objectives.pruning.evaluation._STACKED_BYTES", 8 * 3 * 16 * 32 * 32 * 33)
    make(True).measure(masks[0], 16, ahead=masks[1:])
    assert passes == [(16, 3), (16, 2)]
    monkeypatch.setattr("objectives.pruning.evaluation._STACKED_FLOPS", 16 * cost(subject.canonical.module).flops - 1)
    large = make(True)
    large.measure(masks[0], 16, ahead=masks[1:])  # a slim one is cheaper
    assert len(passes) == 2
    large.measure(masks[0], 31)
    assert passes[2:] == [(15, 1)]


@pytest.mark.parametrize(("room", "n_together", "size"), [(40, 2, 16), (16, 1, 16), (4, 1, 4)])
def test_masks_and_then_images_are_halved_where_memory_runs_out(evaluators, monkeypatch, room, n_together, size):
    subject, make = evaluators
    masks = [subject.ranking().masks(n) for n in (100, 200, 300, 400)]
    expected = [make(False).measure(each).correct for each in masks]
    call = StackedNetwork.__call__

    def narrow(self, images, factors):
        if len(images) * len(factors[0]) > room:
            raise torch.OutOfMemoryError
        return call(self, images, factors)

    monkeypatch.setattr(StackedNetwork, "__call__", narrow)
    stacks = make(True)
    for each, correct in zip(masks, expected, strict=True):
        assert torch.equal(stacks.measure(each, ahead=masks).correct, correct)
    assert (stacks._masks_a_pass.size, stacks.batches.size) == (n_together, size)
    # Smaller batches round in another way.
    assert len(stacks.news().measurements) == (4 if size == 16 else 0)


def test_what_is_learnt_of_masks_ahead_pushes_none_out_that_is_being_measured(evaluators, monkeypatch):
    subject, make = evaluators
    stacks, alone = make(True), make(False)
    masks = [subject.ranking().masks(n) for n in (0, 100, 200, 300, 400)]
    alone.measure(masks[4])
    stacks.learn(alone.news().measurements)
    monkeypatch.setattr("objectives.pruning.evaluation._BYTES_KEPT", 4 * (40 + 1024))
    for each in masks[:4]:
        stacks.measure(each, 10)
    assert torch.equal(stacks.measure(masks[0], ahead=masks[4:]).correct, alone.measure(masks[0]).correct)
