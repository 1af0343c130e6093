"""Confirmation: how the best composite does on images that the search never saw."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from objectives.objective import Evaluation

__all__ = [
    "Confirmation",
    "Confirmed",
    "Difference",
    "compare",
    "confirmed_attribute",
    "paired_bootstrap",
    "read_confirmed",
]

N_RESAMPLES = 10_000
LEVEL = 0.95
_DRAWS_AT_ONCE = 4_000_000


@dataclass(frozen=True, slots=True)
class Confirmed:
    """One composite on the confirmation images, in fp32.

    Attributes:
        trial: Number of the trial whose composite it is.
        auc: Area under the curve, the mean of `image_auc`.
        rates: Pruning rates of the curve.
        accuracies: Accuracy at each rate.
        image_auc: Each image's own area, in the order of the images: what two composites are compared by.
    """

    trial: int
    auc: float
    rates: tuple[float, ...]
    accuracies: tuple[float, ...]
    image_auc: tuple[float, ...]

    @classmethod
    def of(cls, trial: int, evaluation: "Evaluation") -> "Confirmed":
        """What an evaluation on the confirmation images says; areas to 9 digits, which is shorter to store."""
        return cls(
            trial,
            evaluation.figures["auc"],
            evaluation.curve.rates,
            evaluation.curve.accuracies,
            tuple(round(area, 9) for area in evaluation.image_auc),
        )

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Confirmed":
        """Inverse of `to_json`."""
        return cls(
            value["trial"],
            value["auc"],
            *(tuple(value[name]) for name in ("rates", "accuracies", "image_auc")),
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """AUC of a composite minus that of a heuristic on the same images, with its 95 % bootstrap interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Confirmation:
    """A composite against the heuristics, on images that the search never saw.

    Attributes:
        trial: Number of the trial whose composite it is.
        auc: Its area under the curve.
        n_images: Number of confirmation images.
        rates: Pruning rates of the curve.
        accuracies: Accuracy at each rate.
        heuristics: Area under the curve of each heuristic.
        differences: Its area minus that of each heuristic.
    """

    trial: int
    auc: float
    n_images: int
    rates: tuple[float, ...]
    accuracies: tuple[float, ...]
    heuristics: Mapping[str, float]
    differences: Mapping[str, Difference]

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Confirmation":
        """Inverse of `to_json`."""
        differences = {name: Difference(**difference) for name, difference in value["differences"].items()}
        curve = {name: tuple(value[name]) for name in ("rates", "accuracies")}
        return cls(**{**value, **curve, "differences": differences})


def confirmed_attribute(trial: int) -> str:
    """The study's user attribute that holds a trial's `Confirmed`; a finished trial takes no more of its own."""
    return f"confirmed:{trial}"


def read_confirmed(attributes: Mapping[str, Any], trials: Iterable[int]) -> dict[int, Confirmed]:
    """Those of the trials that have been confirmed, from a study's user attributes."""
    return {
        trial: Confirmed.from_json(attributes[confirmed_attribute(trial)])
        for trial in trials
        if confirmed_attribute(trial) in attributes
    }


def compare(best: Confirmed, heuristics: Mapping[str, Confirmed], *, seed: int) -> Confirmation:
    """The composite against every heuristic, from their evaluations on the same images.

    Args:
        best: The composite to report on.
        heuristics: Each heuristic by name.
        seed: Seed of the bootstrap.
    """
    best_images = np.asarray(best.image_auc)
    gains = np.stack([best_images - np.asarray(other.image_auc) for other in heuristics.values()], axis=1)
    return Confirmation(
        trial=best.trial,
        auc=best.auc,
        n_images=len(best.image_auc),
        rates=best.rates,
        accuracies=best.accuracies,
        heuristics={name: other.auc for name, other in heuristics.items()},
        differences=dict(zip(heuristics, paired_bootstrap(gains, seed=seed), strict=True)),
    )


def paired_bootstrap(gains: NDArray[np.float64], *, seed: int, n_resamples: int = N_RESAMPLES) -> list[Difference]:
    """The mean gain over images with its percentile interval (Efron 1979), for several comparisons at once.

    Images are resampled, not composites: both composites of a pair are always seen on the same images, and all pairs
    on the same resamples.

    Args:
        gains: Difference of the two composites' AUC on each image, shape (images, pairs).
        seed: Seed of the resampling.
        n_resamples: Number of resamples.
    """
    n_images, n_pairs = gains.shape
    if not n_images:
        raise ValueError(f"`gains` must have images, but got shape {gains.shape}.")
    generator = np.random.default_rng(seed)
    means = np.empty((n_resamples, n_pairs))
    at_once = max(1, _DRAWS_AT_ONCE // n_images)
    for first in range(0, n_resamples, at_once):
        n_rows = min(at_once, n_resamples - first)
        drawn = generator.integers(n_images, size=(n_rows, n_images))
        # How often each image was drawn turns the means over resamples into one matrix product.
        drawn += n_images * np.arange(n_rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=n_rows * n_images).reshape(n_rows, n_images)
        means[first : first + n_rows] = counts @ gains / n_images
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(means, [tail, 100 - tail], axis=0)
    return [
        Difference(float(mean), float(below), float(above))
        for mean, below, above in zip(gains.mean(axis=0), low, high, strict=True)
    ]
