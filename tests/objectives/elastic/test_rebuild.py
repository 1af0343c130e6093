import pytest
import torch

from objectives.datasets import LabelledImages
from objectives.elastic.model import ElasticModel
from objectives.elastic.rebuild import grown, rebuild
from objectives.training import TrainingOptions, train

OPTIONS = TrainingOptions(2, 20, 0.02, weight_decay=0.01, schedule="cosine")


class StoppedError(Exception):
    """Stands for a kill between two epochs."""


def labelled(n, seed=2):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 6, 6, dtype=torch.float64, generator=generator)
    return LabelledImages(images, images.mean((2, 3)).argmax(1))


def finetuned(elastic):
    """A model whose core has been trained."""
    subject = elastic("branches")
    model = ElasticModel(subject.canonical, subject.masks)
    train(model.at(3), labelled(60), OPTIONS)
    return subject, model


def test_smaller_levels_stay_bit_for_bit_while_larger_ones_grow(elastic):
    _, model = finetuned(elastic)
    images = labelled(60)
    logits = [model.at(level)(images.images) for level in range(4)]
    trained = []

    def look(level, epoch):
        trained.append((level, epoch.number))
        assert torch.equal(model.at(3)(images.images), logits[3])
        if level < 2:
            assert torch.equal(model.at(2)(images.images), logits[2])
        else:
            logits[2] = model.at(2)(images.images)

    results = rebuild(model, images, OPTIONS, on_epoch=look)
    assert trained == [(2, 1), (2, 2), (1, 1), (1, 2), (0, 1), (0, 2)]
    assert torch.equal(model.at(3)(images.images), logits[3])
    assert not torch.equal(model.at(0)(images.images), logits[0])
    assert [result.epochs[-1].loss < result.epochs[0].loss for result in results] == [True] * 3


def test_what_grows_is_all_that_the_smaller_level_does_without(elastic):
    _, model = finetuned(elastic)
    for level in range(3):
        masks, core = grown(model, level), model.weights(level + 1)
        for name, value in model.weights(level).items():
            n_used = core[name].numel() if name in core else 0
            assert int((~masks[name]).sum()) == n_used
            assert masks[name].shape == value.shape
    with pytest.raises(ValueError, match="`level` must be from 0 to 3, but got 4"):
        grown(model, 3)


def test_the_bias_of_a_layer_that_the_core_gives_no_inputs_is_the_cores(elastic):
    subject = elastic("branches")
    silent = {name: torch.ones(n, dtype=torch.bool) for name, n in subject.canonical.components.items()}
    silent["stem"] = torch.zeros(8, dtype=torch.bool)
    model = ElasticModel(subject.canonical, [{}, silent])
    images = labelled(40)
    before = model.at(1)(images.images)
    assert not grown(model, 0)["narrow.bias"].any()
    assert grown(model, 0)["narrow.weight"].all()
    rebuild(model, images, OPTIONS)
    assert torch.equal(model.at(1)(images.images), before)


def test_a_killed_rebuilding_ends_with_the_same_weights(elastic, tmp_path):
    _, whole = finetuned(elastic)
    rebuild(whole, labelled(60), OPTIONS)

    def kill(level, epoch):
        raise StoppedError

    for _ in range(6):
        _, killed = finetuned(elastic)
        with pytest.raises(StoppedError):
            rebuild(killed, labelled(60), OPTIONS, checkpoints=tmp_path, on_epoch=kill)
    _, after = finetuned(elastic)
    rebuild(after, labelled(60), OPTIONS, checkpoints=tmp_path, on_epoch=kill)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"level-{level}.safetensors" for level in range(3)]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
