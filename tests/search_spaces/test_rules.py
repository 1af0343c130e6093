import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces import RULE_DEFAULTS, CompositeError, RuleSpec, UnknownRuleError

positive = st.floats(min_value=1e-12, max_value=1e12)
rules = st.one_of(
    st.builds(RuleSpec, st.just("Epsilon"), epsilon=positive),
    st.just(RuleSpec("ZPlus")),
    st.builds(lambda beta: RuleSpec("AlphaBeta", alpha=1 + beta, beta=beta), st.floats(min_value=0, max_value=100)),
    st.builds(RuleSpec, st.just("Gamma"), gamma=st.floats(min_value=0, max_value=1e12)),
)


@pytest.mark.parametrize(
    ("name", "text"),
    [("Epsilon", "Epsilon(1e-06)"), ("ZPlus", "ZPlus"), ("AlphaBeta", "AlphaBeta(2,1)"), ("Gamma", "Gamma(0.25)")],
)
def test_defaults(name: str, text: str) -> None:
    assert str(RuleSpec(name)) == text
    assert RuleSpec(name).parameters == RULE_DEFAULTS[name]
    assert RuleSpec.parse(name) == RuleSpec(name)


@given(rules)
def test_text_and_json_are_lossless(rule: RuleSpec) -> None:
    assert RuleSpec.parse(str(rule)) == rule
    assert RuleSpec.from_json(json.loads(json.dumps(rule.to_json()))) == rule


@given(rules, rules)
def test_equal_text_means_equal_rules(one: RuleSpec, other: RuleSpec) -> None:
    assert (str(one) == str(other)) == (one == other)
    assert one != other or hash(one) == hash(other)


@given(st.floats(min_value=0, max_value=1e6))
def test_alpha_minus_beta_is_exactly_one(beta: float) -> None:
    """Zennit compares exactly and would refuse 2.3 - 1.3."""
    rule = RuleSpec("AlphaBeta", alpha=beta + 1, beta=beta)
    assert rule.parameters["alpha"] - rule.parameters["beta"] == 1


def test_equal_values_of_other_types_are_one_rule() -> None:
    assert str(RuleSpec("AlphaBeta", alpha=2, beta=1)) == "AlphaBeta(2,1)"
    assert str(RuleSpec("Gamma", gamma=-0.0)) == "Gamma(0)"


def test_gamma_is_smaller_in_fully_connected_layers() -> None:
    assert RuleSpec.parse("Gamma", group="FCL") == RuleSpec("Gamma", gamma=0.05)
    assert RuleSpec.parse("Gamma", group="HLL") == RuleSpec("Gamma", gamma=0.25)
    assert RuleSpec.parse("Gamma(0.25)", group="FCL") == RuleSpec("Gamma", gamma=0.25)


def test_an_epsilon_that_is_written_out_holds() -> None:
    assert RuleSpec.parse("Epsilon", epsilon=0.1) == RuleSpec("Epsilon", epsilon=0.1)
    assert RuleSpec.parse(" Epsilon( 0.01 ) ", epsilon=0.1) == RuleSpec("Epsilon", epsilon=0.01)
    assert RuleSpec.parse("ZPlus", epsilon=0.1) == RuleSpec("ZPlus")


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("ZPlus", {"gamma": 0.1}, "Rule ZPlus has no parameter 'gamma' (got 0.1); it takes none."),
        ("Gamma", {"alpha": 2}, "Rule Gamma has no parameter 'alpha' (got 2); it takes gamma only."),
        ("Epsilon", {"epsilon": 0}, "Rule Epsilon needs epsilon > 0, but got 0.0."),
        ("Epsilon", {"epsilon": "x"}, "Rule Epsilon needs a finite number as epsilon, but got 'x'."),
        ("Epsilon", {"epsilon": True}, "Rule Epsilon needs a finite number as epsilon, but got True."),
        ("Gamma", {"gamma": math.nan}, "Rule Gamma needs a finite number as gamma, but got nan."),
        ("Gamma", {"gamma": math.inf}, "Rule Gamma needs a finite number as gamma, but got inf."),
        ("Gamma", {"gamma": -1}, "Rule Gamma needs gamma >= 0, but got -1.0."),
        (
            "AlphaBeta",
            {"alpha": 3},
            "Rule AlphaBeta needs alpha - beta = 1 and beta >= 0, but got alpha=3.0, beta=1.0.",
        ),
        (
            "AlphaBeta",
            {"alpha": 0.5, "beta": -0.5},
            "Rule AlphaBeta needs alpha - beta = 1 and beta >= 0, but got alpha=0.5, beta=-0.5.",
        ),
    ],
)
def test_bad_parameters(name: str, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(CompositeError) as caught:
        RuleSpec(name, **parameters)
    assert str(caught.value) == message


@pytest.mark.parametrize("text", ["epsilon", "Epsilon1", "", "Epsilon(", "Epsilonn(1)", "Gamma(1))"])
def test_unknown_rules(text: str) -> None:
    with pytest.raises(UnknownRuleError, match="Known: AlphaBeta, Epsilon, Gamma, ZPlus"):
        RuleSpec.parse(text)


def test_unknown_rule_suggests() -> None:
    with pytest.raises(UnknownRuleError) as caught:
        RuleSpec("Epsillon")
    assert str(caught.value) == (
        "Unknown rule 'Epsillon'. Did you mean 'Epsilon'? Known: AlphaBeta, Epsilon, Gamma, ZPlus."
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Gamma(1,2)", "Rule 'Gamma(1,2)' cannot be read; write Gamma(gamma)."),
        ("AlphaBeta(2)", "Rule 'AlphaBeta(2)' cannot be read; write AlphaBeta(alpha,beta)."),
        ("ZPlus(1)", "Rule 'ZPlus(1)' cannot be read; write ZPlus."),
        ("Gamma(x)", "Rule 'Gamma(x)' has a parameter that is no number."),
        ("Gamma()", "Rule 'Gamma()' has a parameter that is no number."),
        ("Gamma(nan)", "Rule Gamma needs a finite number as gamma, but got nan."),
    ],
)
def test_unreadable_parameters(text: str, message: str) -> None:
    with pytest.raises(CompositeError) as caught:
        RuleSpec.parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [{"name": "Gamma", "gama": 1}, {"gamma": 1}, "Gamma", None, {"name": "Nothing"}])
def test_json_that_is_no_rule(value: object) -> None:
    with pytest.raises(CompositeError):
        RuleSpec.from_json(value)  # type: ignore[arg-type]
