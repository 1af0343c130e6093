import pytest

from search_spaces import HEURISTICS, UnknownHeuristicError, heuristic, load_space

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


def test_unknown_heuristic() -> None:
    with pytest.raises(
        UnknownHeuristicError, match=r"^Unknown heuristic 'epsilon-pluss'. Did you mean 'epsilon-plus'\?"
    ):
        heuristic("epsilon-pluss")
