"""The sparsity-accuracy curve and every figure made from it.

=====================  ===============================================================================================
figure                 definition
=====================  ===============================================================================================
auc                    area under accuracy over rate by the trapezoid rule, divided by the covered width
trapezoid              the same without the division
mean_accuracy          mean over the rates (A_PR of Hatefi et al. 2024)
top_rate               largest rate up to which every rate keeps 95 % of the unpruned accuracy
auc_lowest_class       minimum over classes of each class's own `auc`
auc_harmonic           `auc` of the harmonic mean of class accuracies (0 where one is 0)
auc_parameters         area under accuracy over the share of parameters that the exact slim network has lost
auc_flops              the same over multiply-adds
=====================  ===============================================================================================

The last two end at 1 with the measured accuracy of the network without any component, so their width is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Curve", "FIGURES", "KEPT_SHARE", "area", "harmonic_mean", "keeps", "weights"]

KEPT_SHARE = 0.95
# Less than one image of a million: 19/53 is 95 % of 20/53, but not in floating point.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Curve:
    """Accuracy, overall and by class, and the size of the exact slim network at every pruning rate.

    Attributes:
        rates: increasing from 0.
        accuracies: one a rate, in [0, 1].
        class_accuracies: one tuple a rate, one value a class that has images.
        parameters: of the slim network, one a rate.
        flops: multiply-adds of the slim network for one image, one a rate.
        collapsed_accuracy: of the network without any component.
    """

    rates: tuple[float, ...]
    accuracies: tuple[float, ...]
    class_accuracies: tuple[tuple[float, ...], ...]
    parameters: tuple[int, ...]
    flops: tuple[int, ...]
    collapsed_accuracy: float

    def __post_init__(self) -> None:
        lengths = {
            len(getattr(self, key)) for key in ("rates", "accuracies", "class_accuracies", "parameters", "flops")
        }
        if len(lengths) != 1:
            raise ValueError(f"A curve needs one value a rate in every field, but got lengths {sorted(lengths)}.")

    def figures(self) -> dict[str, float]:
        """Every figure, by name."""
        return {name: figure(self) for name, figure in FIGURES.items()}

    def to_json(self) -> dict[str, Any]:
        """The curve as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Curve:
        """The curve that `to_json` wrote."""
        return cls(
            rates=tuple(document["rates"]),
            accuracies=tuple(document["accuracies"]),
            class_accuracies=tuple(map(tuple, document["class_accuracies"])),
            parameters=tuple(document["parameters"]),
            flops=tuple(document["flops"]),
            collapsed_accuracy=document["collapsed_accuracy"],
        )


def area(x: Sequence[float], y: Sequence[float]) -> float:
    """Area under a polygon by the trapezoid rule."""
    return math.fsum((x[i + 1] - x[i]) * (y[i + 1] + y[i]) / 2 for i in range(len(x) - 1))


def harmonic_mean(accuracies: Sequence[float]) -> float:
    """Of class accuracies; 0 where one is 0."""
    return 0.0 if min(accuracies) == 0 else len(accuracies) / math.fsum(1 / accuracy for accuracy in accuracies)


def weights(figure: str, rates: Sequence[float]) -> tuple[float, ...] | None:
    """What the accuracy at each rate counts in a figure that is their weighted sum; None of any other figure."""
    if figure not in ("auc", "mean_accuracy", "trapezoid"):
        return None
    if figure == "mean_accuracy":
        return (1 / len(rates),) * len(rates)
    width = rates[-1] - rates[0] if figure == "auc" else 1.0
    places = range(len(rates))
    return tuple(area(rates, [float(place == other) for other in places]) / width for place in places)


def keeps(accuracy: float, share: float, unpruned: float) -> bool:
    """Whether an accuracy is at least a share of the unpruned one; exactly that share counts, whatever its rounding."""
    return accuracy >= share * unpruned - _ROUNDING


def _trapezoid(curve: Curve) -> float:
    return area(curve.rates, curve.accuracies)


def _normalised(rates: Sequence[float], accuracies: Sequence[float]) -> float:
    return area(rates, accuracies) / (rates[-1] - rates[0])


def _auc(curve: Curve) -> float:
    return _normalised(curve.rates, curve.accuracies)


def _mean_accuracy(curve: Curve) -> float:
    return math.fsum(curve.accuracies) / len(curve.accuracies)


def _top_rate(curve: Curve) -> float:
    top = 0.0
    for rate, accuracy in zip(curve.rates, curve.accuracies, strict=True):
        if not keeps(accuracy, KEPT_SHARE, curve.accuracies[0]):
            break
        top = rate
    return top


def _lowest_class(curve: Curve) -> float:
    return min(_normalised(curve.rates, accuracies) for accuracies in zip(*curve.class_accuracies, strict=True))


def _harmonic(curve: Curve) -> float:
    means = [harmonic_mean(accuracies) for accuracies in curve.class_accuracies]
    return _normalised(curve.rates, means)


def _over_lost(curve: Curve, sizes: Sequence[int]) -> float:
    lost = [1 - size / sizes[0] for size in sizes]
    return area([*lost, 1.0], [*curve.accuracies, curve.collapsed_accuracy])


FIGURES: dict[str, Callable[[Curve], float]] = {
    "auc": _auc,
    "mean_accuracy": _mean_accuracy,
    "trapezoid": _trapezoid,
    "top_rate": _top_rate,
    "auc_lowest_class": _lowest_class,
    "auc_harmonic": _harmonic,
    "auc_parameters": lambda curve: _over_lost(curve, curve.parameters),
    "auc_flops": lambda curve: _over_lost(curve, curve.flops),
}
