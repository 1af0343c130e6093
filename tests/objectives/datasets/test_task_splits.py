"""Data of splits into T, P and F: which images of which labels they have."""

import pytest
import torch

from objectives.datasets import LabelledImages
from objectives.datasets.task_splits import split_data
from objectives.errors import DataError
from search_spaces.task_splits import TaskSplit

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
