import json
from typing import Any

import pytest

from search_spaces.composites import CompositeSpec
from search_spaces.criteria import CRITERIA, CriterionSpec, ranker_from_json
from search_spaces.errors import CompositeError, CriterionError
from search_spaces.heuristics import BASELINES, HEURISTICS, TRANSFORMER_BASELINES, TRANSFORMER_HEURISTICS

EVERY = {**HEURISTICS, **BASELINES, **TRANSFORMER_HEURISTICS, **TRANSFORMER_BASELINES}


@pytest.mark.parametrize("name", EVERY)
def test_json_keeps_what_ranks(name: str) -> None:
    spec = EVERY[name]
    assert ranker_from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_keys_tell_all_rankers_apart() -> None:
    assert len({spec.key for spec in EVERY.values()}) == len(EVERY)
    assert CriterionSpec("taylor").key != CriterionSpec("taylor", normalize="none").key


def test_what_a_criterion_is_called() -> None:
    assert str(CriterionSpec("taylor")) == "criterion=taylor,normalize=l2"
    assert CriterionSpec("random", seed=3).key == "criterion=random,normalize=none,seed=3"
    assert CriterionSpec("random", seed=3).label == "random seed=3"
    assert CriterionSpec("weight", normalize="mean").label == "weight normalize=mean"


def test_scores_are_divided_by_their_norm_but_for_random_ones() -> None:
    usual = {name: CriterionSpec(name, seed=0 if name == "random" else None).normalize for name in CRITERIA}
    assert usual.pop("random") == "none"
    assert set(usual.values()) == {"l2"}


def test_a_criterion_leaves_repair_to_the_study() -> None:
    assert CriterionSpec("weight").repair is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"criterion": "tailor"}, "Unknown criterion 'tailor'. Did you mean 'taylor'?"),
        ({"criterion": "weight", "normalize": "l1"}, "Unknown value 'l1' of `normalize`."),
        ({"criterion": "weight", "seed": 0}, "Criterion weight takes no seed, but got 0; leave it out."),
        ({"criterion": "random"}, "Criterion random needs a seed of at least 0, but got None."),
        ({"criterion": "random", "seed": -1}, "Criterion random needs a seed of at least 0, but got -1."),
        ({"criterion": "random", "seed": True}, "Criterion random needs a seed of at least 0, but got True."),
        ({"criterion": "weight", "abs": True}, "Unknown criterion key 'abs'."),
        ({"criterion": None}, "Unknown criterion None."),
    ],
)
def test_what_is_no_criterion(value: dict[str, Any], message: str) -> None:
    with pytest.raises(CriterionError) as caught:
        ranker_from_json(value)
    assert str(caught.value).startswith(message)


def test_what_is_neither_criterion_nor_composite() -> None:
    with pytest.raises(CriterionError, match="A criterion is an object with 'criterion'"):
        CriterionSpec.from_json({"rules": {}})
    for value in ({}, None, {"abs": True}):
        with pytest.raises(CompositeError, match="A composite is an object with 'rules'"):
            ranker_from_json(value)  # type: ignore[arg-type]
    assert isinstance(ranker_from_json(HEURISTICS["zplus"].to_json()), CompositeSpec)
