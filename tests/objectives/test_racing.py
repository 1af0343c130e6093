"""Races: what is certain is never wrong, what is a test errs as rarely as it says, what is left is measured wholly."""

import pickle

import numpy as np
import pytest

from objectives.racing import Correctness, GivenUp, Race

RATES = tuple(round(0.05 * index, 2) for index in range(20))
WEIGHTS = (1 / 20,) * 20


def curve(rng, n_images, drop):
    """Correctness of a network that fails an image for good at a rate of its own, on average around `drop`."""
    fails_at = rng.normal(drop, 0.15, n_images)
    return np.array([(fails_at > rate) | (rate == 0) for rate in RATES])


def run(candidate, rival, risk=0.05):
    """How the race ended, and the number of images times rates above 0 that were measured."""
    measured = np.zeros(len(RATES), dtype=int)

    def measure(index, n_images):
        assert n_images > measured[index]  # no image twice
        measured[index] = n_images
        return candidate[index, :n_images]

    return Race(7, Correctness.of(rival), RATES, WEIGHTS, risk).run(measure), int(measured.sum())


@pytest.mark.parametrize("risk", [0.0, 1.0, -0.1])
def test_a_risk_is_a_probability(risk):
    with pytest.raises(ValueError, match="risk"):
        Race(0, Correctness.of(np.ones((20, 9), dtype=bool)), RATES, WEIGHTS, risk)


def test_a_race_has_a_row_and_a_weight_a_rate():
    with pytest.raises(ValueError, match="19 rows for 20 rates"):
        Race(0, Correctness.of(np.ones((19, 9), dtype=bool)), RATES, WEIGHTS, 0.05)
    with pytest.raises(ValueError, match="1 weights"):
        Race(0, Correctness.of(np.ones((20, 9), dtype=bool)), RATES, (1.0,), 0.05)


@pytest.mark.parametrize("n_images", [1, 8, 41])
def test_correctness_survives_packing(n_images):
    correct = np.random.default_rng(0).random((3, n_images)) < 0.5
    packed = Correctness.of(correct)
    assert len(packed.bits) == 3 * -(-n_images // 8)
    for again in (packed, Correctness.from_json(packed.to_json()), pickle.loads(pickle.dumps(packed))):
        np.testing.assert_array_equal(again.array(), correct)


@pytest.mark.parametrize("n_images", [1, 49, 50, 51, 799, 800, 1000])
def test_a_better_composite_is_measured_wholly(n_images):
    rng = np.random.default_rng(n_images)
    rival, candidate = curve(rng, n_images, 0.4), curve(rng, n_images, 2.0)
    assert run(candidate, rival) == (None, candidate[1:].size)


def test_an_equal_composite_is_measured_wholly():
    candidate = curve(np.random.default_rng(0), 300, 0.4)
    assert run(candidate, candidate) == (None, candidate[1:].size)


def test_a_hopeless_composite_costs_little():
    rng = np.random.default_rng(0)
    verdict, n_measured = run(curve(rng, 1000, 0.2), curve(rng, 1000, 0.5))
    assert isinstance(verdict, GivenUp)
    assert not verdict.certain
    assert verdict.rival == 7
    assert verdict.n_images == 64
    assert verdict.bound < 0
    assert verdict.share == n_measured / 19_000
    assert n_measured < 64 * 19


def test_what_is_certain_is_true():
    """A verdict that calls itself exact follows from what was measured, whatever the rest would have been."""
    n_certain = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n_images = int(rng.integers(2, 120))
        rival, candidate = curve(rng, n_images, 0.5), curve(rng, n_images, 0.42)
        verdict, _ = run(candidate, rival, risk=1e-12)
        if verdict is not None and verdict.certain:
            n_certain += 1
            difference = (np.array(WEIGHTS) @ (candidate.astype(float) - rival)).mean()
            assert difference <= verdict.bound < 0
    assert n_certain > 10


def test_an_equally_good_composite_is_given_up_no_more_often_than_the_risk_says():
    """The hardest case: a composite that is a hair better than the rival on all images."""
    risk, n_wrong, n_races = 0.2, 0, 300
    for seed in range(n_races):
        rng = np.random.default_rng(seed)
        rival, candidate = curve(rng, 800, 0.45), curve(rng, 800, 0.45)
        if candidate.mean() < rival.mean():
            rival, candidate = candidate, rival
        n_wrong += run(candidate, rival, risk)[0] is not None
    assert n_wrong / n_races <= risk


def test_rates_to_come_are_known_from_the_images_before():
    """A loss of 2 points at every rate: all images are needed, but not all rates on them."""
    rng = np.random.default_rng(0)
    rival = curve(rng, 1000, 0.6)
    lost, won = rng.random((2, 1000)) < [[0.07], [0.05]]
    candidate = (rival & ~lost) | won
    candidate[0] = rival[0]
    verdict, _ = run(candidate, rival)
    assert verdict is not None
    assert (verdict.n_images, verdict.certain) == (1000, False)
    assert verdict.lowest_rate > 0.2
    assert verdict.bound > (candidate.mean(axis=1) - rival.mean(axis=1)) @ WEIGHTS


def test_a_composite_is_given_up_the_sooner_the_worse_it_is():
    measured = []
    for drop in (0.44, 0.4, 0.3, 0.2):
        rng = np.random.default_rng(1)
        verdict, n_measured = run(curve(rng, 1000, drop), curve(rng, 1000, 0.45))
        assert verdict is not None
        measured.append(n_measured)
    assert measured == sorted(measured, reverse=True)
    assert measured[0] > 5 * measured[-1]


def test_what_the_rival_gets_right_explains_a_difference(monkeypatch):
    """The candidate is wrong at a low rate and right at a high one: which images gain and which lose is known."""
    rng = np.random.default_rng(0)
    fails_at = rng.normal(0.5, 0.35, 1000)
    rival = np.array([(fails_at > rate) | (rate == 0) for rate in RATES])
    candidate = rival.copy()
    candidate[3], candidate[15] = False, True
    verdict, n_measured = run(candidate, rival)
    monkeypatch.setattr(Race, "_unexplained", lambda race, values, n_images: values)
    unexplained, n_unexplained = run(candidate, rival)
    assert verdict is not None
    assert unexplained is not None
    assert n_measured < n_unexplained / 2
