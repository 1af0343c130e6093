import json

import numpy as np
import pytest

from hpo.confirmation import Confirmation, Confirmed, compare, confirmed_attribute, paired_bootstrap, read_confirmed


def confirmed(trial, image_auc):
    return Confirmed(trial, float(np.mean(image_auc)), (0.0, 0.5), (1.0, 0.5), tuple(image_auc))


def test_the_interval_is_that_of_a_slow_bootstrap():
    gains = np.random.default_rng(1).normal(0.1, 0.5, size=(60, 2))
    first, second = paired_bootstrap(gains, seed=0, n_resamples=4000)
    generator = np.random.default_rng(2)
    means = [generator.choice(gains[:, 1], size=60).mean() for _ in range(4000)]
    low, high = np.percentile(means, [2.5, 97.5])
    assert second.difference == pytest.approx(gains[:, 1].mean())
    assert (second.low, second.high) == pytest.approx((low, high), abs=0.01)
    assert first != second


def test_the_interval_shrinks_with_the_root_of_the_images():
    gains = np.tile(np.array([[0.0], [1.0]]), (200, 1))
    few, many = (paired_bootstrap(gains[:count], seed=0)[0] for count in (100, 400))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(2, rel=0.1)


def test_resamples_in_parts_are_those_of_one_piece(monkeypatch):
    gains = np.random.default_rng(0).normal(size=(50, 1))
    whole = paired_bootstrap(gains, seed=3, n_resamples=500)
    monkeypatch.setattr("hpo.confirmation._DRAWS_AT_ONCE", 50 * 7)
    (parts,) = paired_bootstrap(gains, seed=3, n_resamples=500)
    assert (parts.low, parts.high) == pytest.approx((whole[0].low, whole[0].high))


def test_the_bootstrap_repeats_a_seed():
    gains = np.random.default_rng(0).normal(size=(50, 1))
    assert paired_bootstrap(gains, seed=1) == paired_bootstrap(gains, seed=1) != paired_bootstrap(gains, seed=2)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match=r"must have images, but got shape \(0, 1\)"):
        paired_bootstrap(np.empty((0, 1)), seed=0)


def test_images_are_paired():
    """A gain of 0.01 on every image is certain, though the images differ by far more."""
    images = np.random.default_rng(0).uniform(size=200)
    result = compare(confirmed(7, images + 0.01), {"epsilon": confirmed(0, images)}, seed=0)
    difference = result.differences["epsilon"]
    assert (difference.difference, difference.low, difference.high) == pytest.approx((0.01, 0.01, 0.01))
    assert (result.trial, result.n_images, result.heuristics) == (7, 200, {"epsilon": pytest.approx(images.mean())})


def test_json_forms_are_reversible():
    best = confirmed(7, [0.25, 0.5])
    attributes = json.loads(json.dumps({confirmed_attribute(7): best.to_json()}))
    assert read_confirmed(attributes, [6, 7]) == {7: best}
    result = compare(best, {"zplus": confirmed(0, [0.0, 0.5])}, seed=0)
    assert Confirmation.from_json(json.loads(json.dumps(result.to_json()))) == result
