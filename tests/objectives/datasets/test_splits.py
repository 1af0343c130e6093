import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from objectives.datasets.splits import Split, split_images
from objectives.errors import DataError

NAMES = {output: f"class {output}" for output in range(4)}
TRAIN = np.random.RandomState(0).permutation(np.repeat(np.arange(4), 20))
EVALUATION = np.random.RandomState(1).permutation(np.repeat(np.arange(4), (40, 80, 20, 60)))


def split(train=TRAIN, evaluation=EVALUATION, classes=NAMES, **changes) -> Split:
    arguments = {
        "every_class": False,
        "references_per_class": 5,
        "evaluation_images": None,
        "confirmation_share": 0.5,
        "seed": 0,
    }
    return split_images(train, evaluation, classes, **(arguments | changes))


def test_each_class_gives_its_references_class_by_class():
    references = split().references
    np.testing.assert_array_equal(TRAIN[references], np.repeat(np.arange(4), 5))
    assert len(set(references.tolist())) == 20
    assert all(np.all(np.diff(part) > 0) for part in references.reshape(4, 5))


def test_first_takes_each_class_in_the_sources_order():
    references = split(sample="first", references_per_class=3).references
    expected = [np.flatnonzero(output == TRAIN)[:3] for output in range(4)]
    np.testing.assert_array_equal(references, np.concatenate(expected))


def test_a_seed_determines_the_split():
    first, second, other = split(seed=3), split(seed=3), split(seed=4)
    for part in ("references", "search", "confirmation"):
        assert np.array_equal(getattr(first, part), getattr(second, part))
        assert not np.array_equal(getattr(first, part), getattr(other, part))


def test_the_split_is_frozen():
    # A study that is resumed with another version must see the same images.
    parts = split(references_per_class=2)
    assert parts.references.tolist() == [47, 62, 34, 64, 14, 40, 23, 30]
    assert parts.search[:8].tolist() == [95, 158, 64, 41, 59, 94, 69, 85]
    assert parts.confirmation[:8].tolist() == [177, 107, 170, 146, 18, 98, 152, 12]


def test_fewer_classes_leave_the_others_references():
    everything = split().references.reshape(4, 5)
    some = split(classes={1: "one", 3: "three"}, every_class=True).references.reshape(2, 5)
    assert np.array_equal(some, everything[[1, 3]])


def test_restricted_classes_have_their_images_only():
    parts = split(classes={1: "one", 3: "three"}, every_class=True)
    assert set(EVALUATION[np.concatenate([parts.search, parts.confirmation])]) == {1, 3}
    assert len(parts.search) == len(parts.confirmation) == 70


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    share=st.floats(0, 0.95),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_prefix_is_stratified_and_no_image_is_used_twice(counts, share, seed):
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), counts))
    parts = split(
        labels,
        labels,
        dict.fromkeys(range(len(counts)), "x"),
        references_per_class=1,
        confirmation_share=share,
        seed=seed,
    )
    order = np.concatenate([parts.confirmation, parts.search])
    assert sorted(order.tolist()) == list(range(len(labels)))
    assert len(parts.confirmation) == int(share * len(labels))
    for length in range(1, len(order) + 1):
        taken = np.bincount(labels[order[:length]], minlength=len(counts))
        assert np.all(np.abs(taken - np.array(counts) * length / len(labels)) < len(counts))


def test_at_most_1000_are_searched_on_by_default():
    labels = np.tile(np.arange(4), 1000)
    parts = split(labels, labels)
    assert (len(parts.search), len(parts.confirmation)) == (1000, 2000)
    assert np.bincount(labels[parts.search]).tolist() == [250] * 4
    assert len(split(labels, labels, evaluation_images=2000).search) == 2000


def test_without_confirmation_all_are_searched_on():
    parts = split(confirmation_share=0)
    assert (len(parts.search), len(parts.confirmation)) == (200, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"references_per_class": 0}, "--references-per-class must be at least 1, not 0"),
        ({"evaluation_images": 0}, "--evaluation-images must be at least 1, not 0"),
        ({"confirmation_share": 1.0}, r"--confirmation-share must lie in \[0, 1\), not 1\.0"),
        ({"confirmation_share": float("nan")}, "--confirmation-share must lie"),
        ({"seed": -1}, "--seed must lie in 0 to 4294967295, not -1"),
        (
            {"evaluation_images": 101},
            r"--evaluation-images 101 are more than the 100 that confirmation leaves of 200; ask for fewer or lower "
            r"--confirmation-share \(0\.5\)",
        ),
        (
            {"references_per_class": 21},
            r"The class 'class 0' \(output 0\) has 20 training images, fewer than the 21 references wanted; "
            "add images, lower --references-per-class or leave the class out by --classes",
        ),
        ({"train": TRAIN[TRAIN != 2]}, r"The class 'class 2' \(output 2\) has no training images"),
        (
            {"evaluation": EVALUATION[EVALUATION != 3], "every_class": True},
            r"The class 'class 3' \(output 3\) has no evaluation images; .*--classes",
        ),
        ({"train": TRAIN[TRAIN != 2], "every_class": True}, r"'class 2' \(output 2\) has 0 training images"),
    ],
)
def test_what_cannot_be_split_is_named(changes, message):
    with pytest.raises(DataError, match=message):
        split(**changes)


def test_classes_without_evaluation_images_are_still_referenced():
    parts = split(evaluation=EVALUATION[EVALUATION != 3])
    assert set(TRAIN[parts.references]) == {0, 1, 2, 3}
