from itertools import chain

import pytest

from search_spaces import (
    BASELINES,
    HEURISTICS,
    TRANSFORMER_BASELINES,
    TRANSFORMER_HEURISTICS,
    CompositeSpec,
    CriterionSpec,
    OutsideSpaceError,
    RuleSpec,
    UnknownHeuristicError,
    heuristic,
    heuristics_of,
    load_space,
)

RULES = {
    "epsilon": "LLR=Epsilon(1e-06),MLL=Epsilon(1e-06),HLL=Epsilon(1e-06),FCL=Epsilon(1e-06)",
    "zplus": "LLR=ZPlus,MLL=ZPlus,HLL=ZPlus,FCL=ZPlus",
    "epsilon-plus": "LLR=ZPlus,MLL=ZPlus,HLL=ZPlus,FCL=Epsilon(1e-06)",
    "epsilon-alpha2-beta1": "LLR=AlphaBeta(2,1),MLL=AlphaBeta(2,1),HLL=AlphaBeta(2,1),FCL=Epsilon(1e-06)",
    "epsilon-gamma": "LLR=Gamma(0.25),MLL=Gamma(0.25),HLL=Gamma(0.25),FCL=Epsilon(1e-06)",
}


def test_the_published_composites() -> None:
    expected = {
        **{name: f"{rules},abs=false" for name, rules in RULES.items()},
        **{f"{name}-abs": f"{rules},abs=true" for name, rules in RULES.items()},
    }
    assert {name: composite.key for name, composite in HEURISTICS.items()} == expected


@pytest.mark.parametrize("name", HEURISTICS)
def test_each_is_a_point_of_the_registered_spaces(name: str) -> None:
    assert heuristic(name) in load_space("cnn").grid()
    load_space("cnn-continuous").parameters(heuristic(name))


OF_TRANSFORMERS = {
    "epsilon-cp": ("Epsilon(1e-06)", "CP"),
    "epsilon-attnlrp": ("Epsilon(1e-06)", "AttnLRP"),
    "gamma-attnlrp": ("Gamma(0.05)", "AttnLRP"),
    "zplus-attention": ("ZPlus", "ZPlus"),
    "zplus-cp": ("ZPlus", "CP"),
}


def test_the_published_composites_of_transformers() -> None:
    expected = {}
    for name, (rule, attention) in OF_TRANSFORMERS.items():
        rules = ",".join(f"{group}={rule}" for group in ("LLR", "MLL", "HLL", "FCL"))
        for suffix, absolute in (("", "false"), ("-abs", "true")):
            expected[name + suffix] = f"{rules},attention={attention},abs={absolute}"
    assert {name: composite.key for name, composite in TRANSFORMER_HEURISTICS.items()} == expected
    assert heuristic("zplus-cp-abs") == TRANSFORMER_HEURISTICS["zplus-cp-abs"]


def test_each_space_has_the_heuristics_of_its_networks() -> None:
    assert heuristics_of(load_space("cnn").distributions()) == HEURISTICS
    assert heuristics_of(load_space("cnn-continuous").distributions()) == HEURISTICS
    assert heuristics_of(load_space("vit").distributions()) == TRANSFORMER_HEURISTICS


CRITERIA = {
    "weight": CriterionSpec("weight"),
    "weight-l1": CriterionSpec("weight-l1"),
    "gradient": CriterionSpec("gradient"),
    "taylor": CriterionSpec("taylor"),
    "hessian": CriterionSpec("hessian"),
    "activation": CriterionSpec("activation"),
    "integrated-gradients": CriterionSpec("integrated-gradients"),
    **{f"random-{seed}": CriterionSpec("random", seed=seed) for seed in range(5)},
}


def test_the_baselines() -> None:
    def alpha1_beta0(attention: str | None) -> list[CompositeSpec]:
        rules = ",".join(f"{group}=AlphaBeta(1,0)" for group in ("LLR", "MLL", "HLL", "FCL"))
        return [CompositeSpec.parse_rules(rules, abs=absolute, attention=attention) for absolute in (False, True)]

    signed, absolute = alpha1_beta0(None)
    assert RuleSpec("AlphaBeta", alpha=1, beta=0) == signed.LLR
    expected = {**CRITERIA, "alpha1-beta0": signed, "alpha1-beta0-abs": absolute}
    assert dict(BASELINES) == expected
    signed, absolute = alpha1_beta0("CP")
    expected = {**CRITERIA, "alpha1-beta0-cp": signed, "alpha1-beta0-cp-abs": absolute}
    assert dict(TRANSFORMER_BASELINES) == expected


def test_baselines_are_asked_for() -> None:
    for space, published, baselines in (
        ("cnn", HEURISTICS, BASELINES),
        ("vit", TRANSFORMER_HEURISTICS, TRANSFORMER_BASELINES),
    ):
        found = heuristics_of(load_space(space).distributions(), baselines=True)
        assert list(found.items()) == list(chain(published.items(), baselines.items()))


def test_a_name_means_one_thing() -> None:
    tables = HEURISTICS, BASELINES, TRANSFORMER_HEURISTICS, TRANSFORMER_BASELINES
    for table in tables:
        assert {name: heuristic(name) for name in table} == dict(table)


@pytest.mark.parametrize("name", ["alpha1-beta0", "alpha1-beta0-abs"])
def test_alpha1_beta0_is_in_no_registered_space(name: str) -> None:
    composite = BASELINES[name]
    assert isinstance(composite, CompositeSpec)
    with pytest.raises(OutsideSpaceError):
        load_space("cnn").parameters(composite)


def test_unknown_heuristic() -> None:
    with pytest.raises(
        UnknownHeuristicError, match=r"^Unknown heuristic 'epsilon-pluss'. Did you mean 'epsilon-plus'\?"
    ):
        heuristic("epsilon-pluss")
