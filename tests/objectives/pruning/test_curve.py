import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from objectives.pruning.curve import FIGURES, Curve, area, keeps

RATES = tuple(percent / 100 for percent in range(0, 100, 5))
SHARES = st.integers(0, 40).map(lambda n: n / 40)


@st.composite
def curves(draw, n_classes=3):
    inner = draw(st.lists(st.integers(1, 99), min_size=1, max_size=8, unique=True).map(sorted))
    rates = (0.0, *(percent / 100 for percent in inner))
    by_class = tuple(tuple(draw(SHARES) for _ in range(n_classes)) for _ in rates)
    sizes = st.lists(st.integers(1, 10**12), min_size=len(rates), max_size=len(rates))
    return Curve(
        rates=rates,
        accuracies=tuple(float(np.mean(accuracies)) for accuracies in by_class),
        class_accuracies=by_class,
        parameters=tuple(sorted(draw(sizes), reverse=True)),
        flops=tuple(sorted(draw(sizes), reverse=True)),
        collapsed_accuracy=draw(SHARES),
    )


def flat(accuracy, rates=RATES, **changed):
    n = len(rates)
    curve = Curve(rates, (accuracy,) * n, ((accuracy,) * 2,) * n, (100,) * n, (100,) * n, accuracy)
    return replace(curve, **changed)


@given(curves())
def test_figures_by_independent_computation(curve):
    figures = curve.figures()
    rates, accuracies = np.array(curve.rates), np.array(curve.accuracies)
    by_class = np.array(curve.class_accuracies)
    width = rates[-1] - rates[0]
    assert figures["trapezoid"] == pytest.approx(np.trapezoid(accuracies, rates))
    assert figures["auc"] == pytest.approx(np.trapezoid(accuracies, rates) / width)
    assert figures["mean_accuracy"] == pytest.approx(accuracies.mean())
    assert figures["auc_lowest_class"] == pytest.approx((np.trapezoid(by_class, rates, axis=0) / width).min())
    with np.errstate(divide="ignore"):
        harmonic = by_class.shape[1] / (1 / by_class).sum(axis=1)
    assert figures["auc_harmonic"] == pytest.approx(np.trapezoid(harmonic, rates) / width)
    for name in ("parameters", "flops"):
        sizes = np.array(getattr(curve, name), dtype=float)
        lost = np.append(1 - sizes / sizes[0], 1.0)
        expected = np.trapezoid(np.append(accuracies, curve.collapsed_accuracy), lost)
        assert figures[f"auc_{name}"] == pytest.approx(expected)
    lost = [i for i, accuracy in enumerate(curve.accuracies) if accuracy < 0.95 * curve.accuracies[0] - 1e-9]
    assert figures["top_rate"] == (curve.rates[lost[0] - 1] if lost else curve.rates[-1])


@given(curves())
def test_figures_lie_in_the_unit_interval(curve):
    figures = curve.figures()
    assert figures.keys() == FIGURES.keys()
    assert all(-1e-12 <= value <= 1 + 1e-12 for value in figures.values())
    assert figures["auc_harmonic"] <= figures["auc"] + 1e-12


@given(SHARES, st.lists(st.integers(1, 99), min_size=1, max_size=8, unique=True).map(sorted))
def test_a_flat_curves_area_is_its_accuracy(accuracy, percents):
    rates = (0.0, *(percent / 100 for percent in percents))
    figures = flat(accuracy, rates).figures()
    width = figures.pop("trapezoid") / accuracy if accuracy else rates[-1]
    assert width == pytest.approx(rates[-1])
    assert figures.pop("top_rate") == rates[-1]
    assert figures == pytest.approx(dict.fromkeys(figures, accuracy))


@given(curves())
def test_a_curve_survives_json(curve):
    document = json.loads(json.dumps(curve.to_json(), allow_nan=False))
    restored = Curve.from_json(document)
    assert restored == curve
    assert isinstance(restored.class_accuracies[0], tuple)
    assert restored.figures() == curve.figures()


def test_areas_over_size_end_at_one_with_the_collapsed_accuracy():
    curve = flat(0.8, (0.0, 0.5), parameters=(100, 50), flops=(100, 20), collapsed_accuracy=0.2)
    figures = curve.figures()
    assert figures["auc_parameters"] == pytest.approx(0.5 * 0.8 + 0.5 * (0.8 + 0.2) / 2)
    assert figures["auc_flops"] == pytest.approx(0.8 * 0.8 + 0.2 * (0.8 + 0.2) / 2)


def test_nothing_lost_at_all_leaves_the_fall_to_the_collapse():
    assert flat(0.9, (0.0, 0.5), collapsed_accuracy=0.1).figures()["auc_parameters"] == pytest.approx(0.5)


def test_a_class_at_zero_makes_that_rates_harmonic_mean_zero():
    curve = flat(0.5, (0.0, 0.5), class_accuracies=((0.5, 1.0), (0.0, 1.0)))
    assert curve.figures()["auc_harmonic"] == pytest.approx((2 / 3) / 2)
    assert curve.figures()["auc_lowest_class"] == pytest.approx(0.25)


def test_the_lowest_class_has_the_lowest_area_not_the_lowest_points():
    curve = flat(0.5, (0.0, 0.1, 0.9), class_accuracies=((0.0, 0.6), (0.6, 0.5), (0.6, 0.5)))
    assert curve.figures()["auc_lowest_class"] == pytest.approx((0.05 * 1.1 + 0.8 * 0.5) / 0.9)


@pytest.mark.parametrize(
    ("accuracies", "top"),
    [
        ((0.8, 0.8, 0.76, 0.5), 0.2),
        ((0.8, 0.75, 0.8, 0.8), 0.0),  # a later recovery doesn't count
        ((0.8, 0.9, 0.95, 0.76), 0.3),
        ((0.0, 0.0, 0.0, 0.0), 0.3),
        ((20 / 53, 19 / 53, 18 / 53, 20 / 53), 0.1),  # exactly 95 %, but 19 / 53 < 0.95 * (20 / 53) in floating point
    ],
)
def test_top_rate(accuracies, top):
    assert flat(0.5, (0.0, 0.1, 0.2, 0.3), accuracies=accuracies).figures()["top_rate"] == top


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n))))
def test_keeping_a_share_is_exact(counts):
    n_images, unpruned, pruned = counts
    for share in ("0.95", "0.9", "1.0", "0.333"):
        expected = Fraction(pruned, n_images) >= Fraction(share) * Fraction(unpruned, n_images)
        assert keeps(pruned / n_images, float(share), unpruned / n_images) == expected


def test_area_is_the_integral_of_straight_lines():
    assert area([0, 1, 3], [0, 1, 1]) == 2.5
    assert area([0.5], [1.0]) == 0


def test_a_curve_of_uneven_lengths_is_refused():
    with pytest.raises(ValueError, match=r"one value a rate in every field, but got lengths \[1, 2\]"):
        flat(0.5, (0.0, 0.5), parameters=(1,))
