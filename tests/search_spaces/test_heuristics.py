import pytest

from search_spaces import (
    HEURISTICS,
    TRANSFORMER_HEURISTICS,
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


def test_unknown_heuristic() -> None:
    with pytest.raises(
        UnknownHeuristicError, match=r"^Unknown heuristic 'epsilon-pluss'. Did you mean 'epsilon-plus'\?"
    ):
        heuristic("epsilon-pluss")
