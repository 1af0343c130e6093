"""The split of a data set: which images are references, which are searched on, which confirm."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from objectives.errors import DataError
from search_spaces.choices import ReferenceSampling

__all__ = ["Split", "split_images"]

_MOST_SEARCHED = 1000


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Positions of the selected images.

    Attributes:
        references: In the training source: class by class, ascending inside a class.
        search: In the evaluation source, in stratified random order.
        confirmation: In the evaluation source, likewise.
    """

    references: NDArray[np.intp]
    search: NDArray[np.intp]
    confirmation: NDArray[np.intp]


def split_images(
    train_labels: NDArray[np.int64],
    evaluation_labels: NDArray[np.int64],
    classes: Mapping[int, str],
    *,
    every_class: bool,
    references_per_class: int,
    evaluation_images: int | None,
    confirmation_share: float,
    seed: int,
    sample: ReferenceSampling = "random",
    unevaluated: Collection[int] = (),
) -> Split:
    """Selects images by their labels and a seed.

    The evaluation images are shuffled, stratified; the first `confirmation_share` of them confirm, and of the rest the
    first `evaluation_images` are searched on.

    Args:
        train_labels: Output of each training image.
        evaluation_labels: Output of each evaluation image.
        classes: Outputs to take images of, and their names.
        every_class: Whether each of `classes` must have images on both sides. Otherwise those count that the training
            images have, and each class that is evaluated must be one of them.
        references_per_class: Drawn from the training images of each class.
        evaluation_images: How many to search on; None for all that is left, at most 1,000.
        confirmation_share: In [0, 1).
        seed: In 0 to 2**32 - 1.
        sample: "first" takes the first references of each class instead of a draw.
        unevaluated: Those of `classes` of which only references are taken.

    Raises:
        DataError: A number is out of range, or a class has too few images.
    """
    _check_numbers(references_per_class, evaluation_images, confirmation_share, seed)
    evaluated = [output for output in classes if output not in unevaluated]
    if every_class:
        _refuse_missing(np.setdiff1d(evaluated, evaluation_labels), "evaluation", classes)
        referenced = list(classes)
    else:
        _refuse_missing(np.setdiff1d(evaluation_labels, train_labels), "training", classes)
        referenced = np.unique(train_labels).tolist()
    references = _draw(train_labels, referenced, references_per_class, seed, sample, classes)
    candidates = np.flatnonzero(np.isin(evaluation_labels, evaluated))
    order = candidates[_stratified_order(evaluation_labels[candidates], seed)]
    n_confirmation = math.floor(confirmation_share * len(order))
    n_left = len(order) - n_confirmation
    if evaluation_images is not None and evaluation_images > n_left:
        raise DataError(
            f"--evaluation-images {evaluation_images} are more than the {n_left} that confirmation leaves of "
            f"{len(order)}; ask for fewer or lower --confirmation-share ({confirmation_share})."
        )
    n_searched = min(n_left, _MOST_SEARCHED) if evaluation_images is None else evaluation_images
    return Split(references, order[n_confirmation : n_confirmation + n_searched], order[:n_confirmation])


def _check_numbers(
    references_per_class: int, evaluation_images: int | None, confirmation_share: float, seed: int
) -> None:
    if references_per_class < 1:
        raise DataError(f"--references-per-class must be at least 1, not {references_per_class}.")
    if evaluation_images is not None and evaluation_images < 1:
        raise DataError(f"--evaluation-images must be at least 1, not {evaluation_images}.")
    if not 0 <= confirmation_share < 1:
        raise DataError(f"--confirmation-share must lie in [0, 1), not {confirmation_share}.")
    if not 0 <= seed < 2**32:
        raise DataError(f"--seed must lie in 0 to {2**32 - 1}, not {seed}.")


def _refuse_missing(lacking: NDArray[np.int64], side: str, names: Mapping[int, str]) -> None:
    if len(lacking):
        output = int(lacking[0])
        raise DataError(
            f"The class {names[output]!r} (output {output}) has no {side} images; "
            "add some or choose other classes by --classes."
        )


def _draw(
    labels: NDArray[np.int64],
    classes: Sequence[int],
    n_per_class: int,
    seed: int,
    sample: ReferenceSampling,
    names: Mapping[int, str],
) -> NDArray[np.intp]:
    """A class's draw depends on the seed and the class alone, so fewer classes leave the others' references."""
    chosen = []
    for output in classes:
        members = np.flatnonzero(labels == output)
        if len(members) < n_per_class:
            raise DataError(
                f"The class {names[output]!r} (output {output}) has {len(members)} training images, fewer than the "
                f"{n_per_class} references wanted; add images, lower --references-per-class or leave the class out by "
                "--classes."
            )
        if sample == "random":
            # RandomState's streams are frozen for good, those of default_rng are not.
            members = np.sort(np.random.RandomState([seed, output]).permutation(members)[:n_per_class])
        chosen.append(members[:n_per_class])
    return np.concatenate(chosen)


def _stratified_order(labels: NDArray[np.int64], seed: int) -> NDArray[np.intp]:
    """A random order in which every prefix has the classes in proportion, to within one image."""
    random = np.random.RandomState(seed)
    shuffled = random.permutation(len(labels))
    place = np.empty(len(labels))  # of an image inside its class, in (0, 1)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(place[shuffled], kind="stable")]
