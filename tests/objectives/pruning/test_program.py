import itertools

import pytest
import torch
from random_ranking import random_ranking

from objectives.datasets import LabelledImages
from objectives.memory import Batches
from objectives.pruning.evaluation import Evaluator
from objectives.pruning.fusion import fused
from objectives.pruning.masking import kept_outputs
from objectives.pruning.slimming import cost, draft, slim


def check_silenced(canonical, images, masks):
    """In float64, and in float32, where oneDNN has the weights in its own order."""
    exact = fused(draft(canonical, {}), moves=False)
    single = fused(draft(canonical, {}).float().to(memory_format=torch.channels_last), moves=False)
    narrow = images.float().contiguous(memory_format=torch.channels_last)
    before = exact(images), single(narrow)
    for each in masks:
        kept = kept_outputs(canonical.prunable, each)
        expected = slim(canonical, each)(images)
        scale = float(expected.abs().max())
        torch.testing.assert_close(exact.silenced(kept)(images), expected, rtol=0, atol=1e-11 * scale)
        in_float32 = slim(canonical, each).float()(images.float())
        rounding = 1e-5 * scale + 5 * float((in_float32 - expected).abs().max())
        torch.testing.assert_close(single.silenced(kept)(narrow).double(), expected, rtol=0, atol=rounding)
    assert torch.equal(exact(images), before[0])  # what is silenced shares nothing that it changes
    assert torch.equal(single(narrow), before[1])


@pytest.mark.parametrize("name", ["cifar_resnet20", "inception", "mobilenetv3_small_100", "regnety_002", "vgg11_bn"])
def test_silenced_networks_are_the_slim_ones(prunable, name):
    subject = prunable(name)
    ranking = subject.ranking()
    masks = [ranking.masks(int(share * len(ranking))) for share in (0, 0.3, 0.8, 1)]
    with torch.inference_mode():
        check_silenced(subject.canonical, subject.images, masks + list(itertools.islice(subject.random_masks(), 2)))


@pytest.mark.parametrize("components", ["all", "heads", "mlp"])
def test_silenced_transformers(transformer, components):
    canonical = transformer.canonical.choosing(components)
    ranking = random_ranking(canonical)
    with torch.inference_mode():
        masks = [ranking.masks(int(share * len(ranking))) for share in (0, 0.4, 0.9, 1)]
        check_silenced(canonical, transformer.images, masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_networks_on_few_images_are_not_made_slim(prunable, dtype, monkeypatch):
    """Whether they are or not, the same images are right, and their size is that of the slim network."""
    subject = prunable("cifar_resnet20")
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labelled = LabelledImages(images.to(dtype, memory_format=torch.channels_last), torch.arange(8))
    masks = [subject.ranking().masks(n) for n in (688, 400, 100, 0)]
    made = []
    draft_of = draft
    monkeypatch.setattr("objectives.pruning.evaluation.draft", lambda *given: made.append(given[1]) or draft_of(*given))
    found = {}
    for worth in (10**15, 0):
        monkeypatch.setattr("objectives.pruning.evaluation._WORTH_MAKING", {dtype: worth})
        del made[:]
        evaluator = Evaluator(subject.canonical, labelled, Batches("a test", 16), dtype)
        found[worth] = [evaluator.measure(each) for each in masks]
        # The unpruned network is made, as ever, and used for all others; that without components for its size.
        assert len(made) == (3 if worth else len(masks) + 1)
    for silenced, slimmed, each in zip(*found.values(), masks, strict=True):
        assert silenced.cost == slimmed.cost == cost(slim(subject.canonical, each))
        if dtype is torch.float32:
            assert torch.equal(silenced.correct, slimmed.correct)


def test_layers_whose_rows_have_moved_are_refused(prunable):
    subject = prunable("cifar_resnet20")
    program = fused(draft(subject.canonical, {}), moves=False)
    name = next(iter(subject.canonical.components))
    with pytest.raises(ValueError, match=f"^Layer '{name}' has 16 outputs, but got 3 to keep"):
        program.silenced({name: torch.tensor([True, False, True])})
