"""Splits into T, P and F: what a TOML table may say, and which images of which labels come of it."""

from pathlib import Path

import pytest
import torch

from objectives.cifar_resnets import CIFAR10_CLASSES
from objectives.datasets import LabelledImages
from objectives.datasets.task_splits import Domains, TaskSplit, read_splits, split_data
from objectives.errors import DataError

SPLITS = Path(__file__).parents[3] / "benchmarks" / "task_relevant.toml"
NAMES = ("cat", "dog", "ship", "truck")
SUPERCLASSES = {"animal": ["cat", "dog"], "vehicle": ["ship", "truck"]}


def images_of(*labels):
    """Each image's only pixel is its position."""
    return LabelledImages(torch.arange(len(labels)).float().reshape(-1, 1, 1, 1), torch.tensor(labels))


def pixels(images):
    return images.images.flatten().int().tolist()


def toml(**changes):
    table = {"scenario": "new_classes", "T": ["cat"], "P": ["dog", "ship"], "F": ["truck"], **changes}
    return {key: value for key, value in table.items() if value is not None}


def test_the_papers_splits():
    splits = read_splits(SPLITS)
    assert {name: (len(each.T) + len(each.P), len(each.P)) for name, each in splits.items()} == {
        "CIFAR-9/3": (9, 3),
        "CIFAR-7/4": (7, 4),
    }
    for split in splits.values():
        assert sorted((*split.T, *split.P, *split.F)) == sorted(CIFAR10_CLASSES)
    assert splits["CIFAR-9/3"].outputs(CIFAR10_CLASSES) == CIFAR10_CLASSES
    assert splits["CIFAR-7/4"].outputs(CIFAR10_CLASSES) == ("vehicle", "animal")
    baseline = splits["CIFAR-7/4"].without_extra()
    assert baseline.T == ()
    assert baseline.P == splits["CIFAR-7/4"].P


def test_new_classes_keep_their_labels():
    split = TaskSplit.from_toml(toml())
    evaluation = images_of(3, 0, 1, 2, 1)
    data = split_data(split, images_of(*(0, 1, 2, 3) * 10), evaluation, NAMES, validation_share=0.15)
    assert data.outputs == NAMES
    assert data.is_replayed
    parts = [data.evaluation.extra, data.evaluation.task, data.evaluation.new]
    assert [(pixels(part), part.labels.tolist()) for part in parts] == [([1], [0]), ([2, 3, 4], [1, 2, 1]), ([0], [3])]
    assert pixels(data.adaptation(data.evaluation)) == [2, 3, 4, 0]
    assert pixels(data.pretraining(data.evaluation)) == [1, 2, 3, 4]
    # Held out of each class: 15 % of ten, rounded up.
    for of in ("extra", "task", "new"):
        trained, validated = getattr(data.training, of), getattr(data.validation, of)
        assert not {*pixels(trained)} & {*pixels(validated)}
        assert set(validated.labels.bincount().tolist()) <= {0, 2}
        assert set((trained.labels.bincount()).tolist()) <= {0, 8}
        assert all(pixel % 4 == label for pixel, label in zip(pixels(trained), trained.labels.tolist(), strict=True))
    again = split_data(split, images_of(*(0, 1, 2, 3) * 10), evaluation, NAMES, validation_share=0.15)
    other = split_data(split, images_of(*(0, 1, 2, 3) * 10), evaluation, NAMES, validation_share=0.15, seed=1)
    assert pixels(again.validation.task) == pixels(data.validation.task) != pixels(other.validation.task)


def test_new_subclasses_are_labelled_by_superclass():
    table = toml(scenario="new_subclasses", T=[], P=["dog", "ship"], F=["truck", "cat"], superclasses=SUPERCLASSES)
    data = split_data(TaskSplit.from_toml(table), images_of(*(0, 1, 2, 3) * 5), images_of(3, 0, 1, 2, 1), NAMES)
    assert data.outputs == ("animal", "vehicle")
    assert len(data.evaluation.extra) == 0
    assert data.evaluation.task.labels.tolist() == [0, 1, 0]
    assert data.evaluation.new.labels.tolist() == [1, 0]
    assert pixels(data.adaptation(data.evaluation)) == [0, 1]  # no replay


def test_domains_keep_the_classes():
    split = TaskSplit.from_toml(toml(scenario="new_subclasses", by="domain", T=["real"], P=["clipart"], F=["painting"]))
    names = ("clipart", "painting", "real")
    domains = Domains(names, torch.tensor([0, 0, 1, 1, 2, 2] * 4), torch.tensor([2, 1, 0]))
    training = images_of(*[0, 1] * 12)
    data = split_data(split, training, images_of(0, 1, 0), ("cat", "dog"), domains=domains)
    assert data.outputs == ("cat", "dog")
    assert [pixels(part) for part in (data.evaluation.extra, data.evaluation.task, data.evaluation.new)] == [
        [0],
        [2],
        [1],
    ]
    assert data.validation.task.labels.tolist() == [0, 1] or data.validation.task.labels.tolist() == [1, 0]
    with pytest.raises(DataError, match=r"A split by domain needs `domains`"):
        split_data(split, training, images_of(0, 1, 0), ("cat", "dog"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenario": "new_clases"}, "Unknown scenario of a split 'new_clases'. Did you mean 'new_classes'?"),
        ({"by": "style"}, "Unknown by of a split 'style'."),
        ({"F": ["truck", "cat"]}, "The class 'cat' is in both T and F of a split; leave it in one place."),
        ({"P": ["dog", "dog"]}, "The class 'dog' is twice in P of a split; leave it in one place."),
        ({"P": []}, "P of a split is empty; name at least one class."),
        ({"F": []}, "F of a split is empty; name at least one class."),
        ({"F": None}, "A split needs 'F'; add it."),
        ({"F": "truck"}, "F of a split is a list of names, but got 'truck'."),
        ({"R": ["cat"]}, "A split takes no 'R'."),
        ({"superclasses": SUPERCLASSES}, "A split by class of scenario 'new_classes' takes no `superclasses`"),
        ({"superclasses": ["cat"]}, "`superclasses` of a split are a table of lists of classes, but got ['cat']."),
        ({"by": "domain"}, "A split by domain has no new classes"),
        ({"scenario": "new_subclasses"}, "The class 'cat' of a split has no superclass; put it into one of"),
        (
            {"scenario": "new_subclasses", "superclasses": {**SUPERCLASSES, "all": ["cat"]}},
            "The class 'cat' of a split is in the superclasses 'animal' and 'all'; leave it in one.",
        ),
        (
            {"scenario": "new_subclasses", "P": ["dog"], "T": [], "superclasses": SUPERCLASSES},
            "The class 'truck' in F of a split is of superclass 'vehicle', of which P has no class; put one into P",
        ),
    ],
)
def test_a_split_that_cannot_be_is_refused_in_one_line(changes, message):
    with pytest.raises(DataError) as error:
        TaskSplit.from_toml(toml(**changes))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "labels", "message"),
    [
        ({"F": ["trcuk"]}, (0, 1, 2, 3), "Unknown class 'trcuk' in F of a split. Did you mean 'truck'?"),
        ({}, (0, 1, 2), "The class 'truck' in F of a split has no training images; leave it out or add some."),
        ({}, (0, 1, 2, 3), "The class 'cat' in T of a split has 1 training images, too few to train on"),
        ({}, (0, 1, 2, 3, 0, 1, 2, 3), "The class 'truck' in F of a split has no evaluation images;"),
    ],
)
def test_a_split_that_the_images_do_not_fit_is_refused_in_one_line(changes, labels, message):
    with pytest.raises(DataError) as error:
        split_data(TaskSplit.from_toml(toml(**changes)), images_of(*labels), images_of(0, 1, 2), NAMES)
    assert str(error.value).startswith(message)


def test_a_share_held_out_of_all_or_nothing_is_refused():
    with pytest.raises(DataError, match=r"must lie in \(0, 1\), but got 1"):
        split_data(TaskSplit.from_toml(toml()), images_of(0, 1), images_of(0, 1), NAMES, validation_share=1)


def test_a_file_of_splits_names_the_split(tmp_path):
    path = tmp_path / "splits.toml"
    path.write_text('[mine]\nscenario = "new_classes"\nP = []\nF = ["cat"]\n')
    with pytest.raises(DataError, match=r"Split 'mine' of .*: P of a split is empty"):
        read_splits(path)
    path.write_text("P = 1\n")
    with pytest.raises(DataError, match=r"'P' in .* is no table"):
        read_splits(path)
    path.write_text("P = \n")
    with pytest.raises(DataError, match="aren't TOML"):
        read_splits(path)
    with pytest.raises(DataError, match="can't be read"):
        read_splits(tmp_path / "none.toml")
