"""The handwritten digits inside scikit-learn: `--data digits`."""

import functools
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from objectives.datasets.labels import LabelSet
from objectives.datasets.sources import ArraySource, SourcePair, register_source
from objectives.errors import DataError

__all__ = ["DigitsData", "digits_data", "open_digits"]


class DigitsData(NamedTuple):
    """The digits, split for good: the network is trained on `train_*` only.

    Attributes:
        train_images: uint8 (1000, 8, 8), 100 of each digit.
        train_labels: int64 (1000,).
        evaluation_images: uint8 (797, 8, 8).
        evaluation_labels: int64 (797,).
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    evaluation_images: NDArray[np.uint8]
    evaluation_labels: NDArray[np.int64]


@functools.cache
def digits_data() -> DigitsData:
    """The 1,797 images, scaled from 0..16 to 0..255, split by a fixed seed."""
    table = np.loadtxt(_digits_file(), delimiter=",")
    images = np.round(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = table[:, -1].astype(np.int64)
    order = np.random.RandomState(0).permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)  # of an image inside its class, in that order
    for label in range(10):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    is_train = rank < 100
    return DigitsData(images[is_train], labels[is_train], images[~is_train], labels[~is_train])


def _digits_file() -> Path:
    """The table that `sklearn.datasets.load_digits` reads; importing scikit-learn takes a tenth of a short launch."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("The digits ship inside scikit-learn, which isn't installed.", name="sklearn")
    return Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"


@register_source("digits")
def open_digits(argument: str, labels: LabelSet) -> SourcePair:
    """The 1,000 training and 797 evaluation images of `digits_data`."""
    if argument:
        raise DataError(f"The data `digits` takes no argument, but got {argument!r}; write --data digits.")
    data = digits_data()
    return SourcePair(
        ArraySource(data.train_images, data.train_labels, "digits/train"),
        ArraySource(data.evaluation_images, data.evaluation_labels, "digits/evaluation"),
        {digit: str(digit) for digit in range(10)},
    )
