import pytest
import torch

from objectives.procedures import PROCEDURES
from objectives.pruning.evaluation import Measurement
from objectives.pruning.slimming import Cost

RATES = (0.0, 0.25, 0.5, 0.75)


@pytest.mark.parametrize("name", sorted(PROCEDURES))
def test_a_procedure_yields_one_measurement_a_rate(name):
    def measure(masks):
        return Measurement(torch.ones(3, dtype=torch.bool), Cost(int(sum(mask.sum() for mask in masks.values())), 0))

    scores = {"a": torch.tensor([0.5, 0.1, 0.3]), "b": torch.tensor([0.2, 0.4])}
    measurements = list(PROCEDURES[name](lambda: scores, measure, RATES))
    assert len(measurements) == len(RATES)
    assert measurements[0].cost.parameters == 5


def test_one_shot_ranks_once_and_prunes_by_it():
    n_scored = 0
    seen = []

    def score():
        nonlocal n_scored
        n_scored += 1
        return {"a": torch.tensor([0.5, 0.1, 0.3]), "b": torch.tensor([0.2, 0.4])}

    def measure(masks):
        seen.append({name: mask.tolist() for name, mask in masks.items()})
        return Measurement(torch.ones(1, dtype=torch.bool), Cost(0, 0))

    measurements = PROCEDURES["one_shot"](score, measure, (0.0, 0.2, 0.5, 0.8))
    next(measurements)
    assert len(seen) == 1  # a rate is measured when it is asked for
    assert len(list(measurements)) == 3
    assert n_scored == 1
    assert seen == [
        {"a": [True, True, True], "b": [True, True]},
        {"a": [True, False, True], "b": [True, True]},
        {"a": [True, False, True], "b": [False, True]},
        {"a": [True, False, False], "b": [False, False]},
    ]
