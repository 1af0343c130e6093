import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces import (
    AGGREGATES,
    NORMALIZATIONS,
    CompositeError,
    CompositeSpec,
    RuleSpec,
    UnknownRuleError,
    load_space,
)

ALL_EPSILON = {"LLR": "Epsilon", "MLL": "Epsilon", "HLL": "Epsilon", "FCL": "Epsilon"}
ALL_ZPLUS = {group: {"name": "ZPlus"} for group in ALL_EPSILON}
rules = st.one_of(
    st.builds(RuleSpec, st.just("Epsilon"), epsilon=st.floats(min_value=1e-9, max_value=1)),
    st.sampled_from([RuleSpec("ZPlus"), RuleSpec("AlphaBeta")]),
    st.builds(RuleSpec, st.just("Gamma"), gamma=st.floats(min_value=0, max_value=100)),
)
composites = st.builds(
    CompositeSpec,
    rules,
    rules,
    rules,
    rules,
    st.booleans(),
    st.sampled_from([None, "CP", "AttnLRP", "ZPlus"]),
    st.sampled_from(AGGREGATES),
    st.sampled_from(NORMALIZATIONS),
)


def test_parameters_of_optuna() -> None:
    composite = CompositeSpec.from_parameters({**ALL_EPSILON, "HLL": "Gamma", "FCL": "Gamma", "abs": True})
    assert composite.key == "LLR=Epsilon(1e-06),MLL=Epsilon(1e-06),HLL=Gamma(0.25),FCL=Gamma(0.05),abs=true"
    assert str(composite) == composite.key
    assert composite.rules["HLL"] == composite.HLL == RuleSpec("Gamma")


def test_an_unused_parameter_makes_no_other_point() -> None:
    zplus = dict.fromkeys(ALL_EPSILON, "ZPlus")
    points = {
        CompositeSpec.from_parameters({**zplus, "abs": False, "epsilon": epsilon, "LLR_gamma": gamma})
        for epsilon in (1e-6, 0.1)
        for gamma in (0.1, 1.0)
    }
    assert len(points) == 1
    assert points.pop().epsilon is None


def test_used_parameters_reach_their_rules() -> None:
    parameters = {**ALL_EPSILON, "MLL": "Gamma", "abs": False, "epsilon": 0.01, "MLL_gamma": 3, "LLR_gamma": 5}
    composite = CompositeSpec.from_parameters(parameters)
    assert composite.attribution_key == "LLR=Epsilon(0.01),MLL=Gamma(3),HLL=Epsilon(0.01),FCL=Epsilon(0.01)"
    assert composite.epsilon == 0.01


def test_parse_rules() -> None:
    composite = CompositeSpec.parse_rules(
        " FCL=Epsilon, LLR = Gamma(0.1),MLL=AlphaBeta(3,2) ,HLL=Epsilon(0.5)", abs=True, epsilon=0.01
    )
    assert composite == CompositeSpec(
        LLR=RuleSpec("Gamma", gamma=0.1),
        MLL=RuleSpec("AlphaBeta", alpha=3, beta=2),
        HLL=RuleSpec("Epsilon", epsilon=0.5),
        FCL=RuleSpec("Epsilon", epsilon=0.01),
        abs=True,
    )
    assert composite.epsilon is None  # groups differ


@given(composites)
def test_json_round_trip(composite: CompositeSpec) -> None:
    assert CompositeSpec.from_json(json.loads(json.dumps(composite.to_json()))) == composite


@given(composites)
def test_the_attribution_key_can_be_typed(composite: CompositeSpec) -> None:
    rules, _, attention = composite.attribution_key.partition(",attention=")
    parsed = CompositeSpec.parse_rules(rules, abs=composite.abs)
    assert parsed.rules == composite.rules
    assert (attention or None) == composite.attention


@given(composites, composites)
def test_keys_are_canonical(one: CompositeSpec, other: CompositeSpec) -> None:
    assert (one.key == other.key) == (one == other)


@pytest.mark.parametrize("space", ["cnn", "cnn-extended"])
def test_labels_tell_the_points_of_a_space_apart(space: str) -> None:
    points = load_space(space).grid()
    assert len({point.label for point in points}) == len(points)


@pytest.mark.parametrize(
    ("rules", "epsilon", "label"),
    [
        ("LLR=Epsilon,MLL=ZPlus,HLL=Gamma,FCL=Gamma", None, "Epsilon/ZPlus/Gamma/Gamma abs"),
        ("LLR=Epsilon,MLL=ZPlus,HLL=Gamma(1),FCL=Epsilon", 0.1, "Epsilon/ZPlus/Gamma(1)/Epsilon epsilon=0.1 abs"),
        ("LLR=Epsilon,MLL=ZPlus,HLL=ZPlus,FCL=Epsilon(0.1)", None, "Epsilon/ZPlus/ZPlus/Epsilon(0.1) abs"),
    ],
)
def test_label(rules: str, epsilon: float | None, label: str) -> None:
    assert CompositeSpec.parse_rules(rules, abs=True, epsilon=epsilon).label == label


def test_ways_to_rank() -> None:
    zplus = ",".join(f"{group}=ZPlus" for group in ALL_EPSILON)
    usual = CompositeSpec.parse_rules(zplus)
    other = CompositeSpec.parse_rules(zplus, aggregate="rms", normalize="l2")
    assert other.attribution_key == usual.attribution_key
    assert other.key == f"{zplus},abs=true,aggregate=rms,normalize=l2"
    assert other.label == "ZPlus/ZPlus/ZPlus/ZPlus rms normalize=l2"
    assert other.to_json() == {**usual.to_json(), "abs": True, "aggregate": "rms", "normalize": "l2"}
    assert CompositeSpec.parse_rules(zplus, abs=True, normalize="mean").label.endswith(" abs normalize=mean")


def test_root_mean_squares_know_no_sign() -> None:
    signed, absolute = (
        CompositeSpec.from_parameters({**ALL_EPSILON, "abs": value, "aggregate": "rms"}) for value in (False, True)
    )
    assert signed == absolute
    assert signed.key == absolute.key


def test_usual_ways_to_rank_leave_no_trace() -> None:
    """Stored studies and documents hold keys and JSON of composites from before there was a choice."""
    usual = CompositeSpec.from_parameters({**ALL_EPSILON, "abs": True, "aggregate": "mean", "normalize": "none"})
    assert usual == CompositeSpec.from_parameters({**ALL_EPSILON, "abs": True})
    assert usual.key == "LLR=Epsilon(1e-06),MLL=Epsilon(1e-06),HLL=Epsilon(1e-06),FCL=Epsilon(1e-06),abs=true"
    assert usual.to_json().keys() == {"rules", "abs"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("LLR=Epsilon,MLL=Epsilon,HLL=Epsilon", "Layer group FCL has no rule; give one of Epsilon, ZPlus, "),
        ("LLR=ZPlus,LLR=ZPlus", "Group 'LLR' is given twice in rules 'LLR=ZPlus,LLR=ZPlus'."),
        ("LLr=ZPlus", "Unknown layer group 'LLr'. Did you mean 'LLR'? Known: FCL, HLL, LLR, MLL."),
        ("ZPlus", "Cannot read 'ZPlus' in rules 'ZPlus'; write LLR=RULE,...,FCL=RULE."),
        ("", "Cannot read '' in rules ''; write"),
        ("LLR=ZPlus,MLL=ZPlus,HLL=ZPlus,FCL=Epsilom", "Unknown rule 'Epsilom'. Did you mean 'Epsilon'?"),
    ],
)
def test_rules_that_cannot_be_read(rules: str, message: str) -> None:
    with pytest.raises(CompositeError) as caught:
        CompositeSpec.parse_rules(rules)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"abs": 1}, "`abs` must be true or false, but got 1."),
        ({"attention": "CPP"}, "Unknown attention rule 'CPP'. Did you mean 'CP'? Known: AttnLRP, CP, ZPlus."),
        ({"aggregate": "median"}, "Unknown value 'median' of `aggregate`. Did you mean 'mean'? Known: mean, rms."),
        ({"normalize": "L2"}, "Unknown value 'L2' of `normalize`. Did you mean 'l2'?"),
        ({"epsilonn": 1}, "Unknown parameter 'epsilonn'. Did you mean 'epsilon'?"),
        ({"epsilon": -1}, "Rule Epsilon needs epsilon > 0, but got -1.0."),
    ],
)
def test_parameters_that_make_no_composite(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CompositeError) as caught:
        CompositeSpec.from_parameters({**ALL_EPSILON, "abs": True, **changes})
    assert str(caught.value).startswith(message)


def test_parameters_that_are_missing() -> None:
    with pytest.raises(CompositeError, match="'abs' is missing"):
        CompositeSpec.from_parameters(ALL_EPSILON)
    with pytest.raises(CompositeError, match="Layer group LLR has no rule"):
        CompositeSpec.from_parameters({"abs": True})


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"rules": []},
        {"rules": {}, "abs": True},
        {"rules": ALL_ZPLUS},
        {"rules": ALL_ZPLUS, "abs": True, "x": 1},
        {"rules": {**ALL_ZPLUS, "X": 1}, "abs": True},
        {"rules": dict.fromkeys(ALL_EPSILON, "ZPlus"), "abs": True},
    ],
)
def test_json_that_is_no_composite(value: object) -> None:
    with pytest.raises(CompositeError):
        CompositeSpec.from_json(value)  # type: ignore[arg-type]


def test_a_rule_must_be_a_rule() -> None:
    with pytest.raises(CompositeError, match="Group MLL needs a RuleSpec, but got 'ZPlus'"):
        CompositeSpec(RuleSpec("ZPlus"), "ZPlus", RuleSpec("ZPlus"), RuleSpec("ZPlus"), abs=True)  # type: ignore[arg-type]
    with pytest.raises(UnknownRuleError):
        CompositeSpec.from_parameters({**ALL_EPSILON, "LLR": 3, "abs": True})
