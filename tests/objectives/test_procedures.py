import pytest
import torch

from objectives.procedures import PROCEDURES
from objectives.pruning.ranking import rank

RATES = (0.0, 0.25, 0.5, 0.75)


@pytest.mark.parametrize("name", sorted(PROCEDURES))
def test_a_procedure_yields_masks_for_every_rate(name):
    scores = {"a": torch.tensor([0.5, 0.1, 0.3]), "b": torch.tensor([0.2, 0.4])}
    masks = list(PROCEDURES[name](lambda: rank(scores), RATES))
    assert len(masks) == len(RATES)
    assert sum(int(mask.sum()) for mask in masks[0].values()) == 5


def test_one_shot_ranks_once_and_prunes_by_it():
    n_ranked = 0

    def ranking():
        nonlocal n_ranked
        n_ranked += 1
        return rank({"a": torch.tensor([0.5, 0.1, 0.3]), "b": torch.tensor([0.2, 0.4])})

    masks = [
        {name: mask.tolist() for name, mask in masks.items()}
        for masks in PROCEDURES["one_shot"](ranking, (0.0, 0.2, 0.5, 0.8))
    ]
    assert n_ranked == 1
    assert masks == [
        {"a": [True, True, True], "b": [True, True]},
        {"a": [True, False, True], "b": [True, True]},
        {"a": [True, False, True], "b": [False, True]},
        {"a": [True, False, False], "b": [False, False]},
    ]
