"""What stands beside every search: the published composites, and criteria that need no relevance."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from search_spaces.composites import CompositeSpec
from search_spaces.criteria import CRITERIA, CriterionSpec, Ranker
from search_spaces.errors import UnknownHeuristicError
from search_spaces.rules import RuleSpec
from search_spaces.suggestions import did_you_mean

__all__ = [
    "BASELINES",
    "HEURISTICS",
    "TRANSFORMER_BASELINES",
    "TRANSFORMER_HEURISTICS",
    "heuristic",
    "heuristics_of",
]

_PUBLISHED = (
    # name, rule of the convolutions, rule of the fully-connected layers
    ("epsilon", "Epsilon", "Epsilon"),
    ("zplus", "ZPlus", "ZPlus"),  # Yeom et al. 2021
    ("epsilon-plus", "ZPlus", "Epsilon"),
    ("epsilon-alpha2-beta1", "AlphaBeta", "Epsilon"),
    ("epsilon-gamma", "Gamma", "Epsilon"),
)
_PUBLISHED_OF_TRANSFORMERS = (
    # name, rule of all layers, rule of attention
    ("epsilon-cp", RuleSpec("Epsilon"), "CP"),  # CP-LRP, Ali et al. 2022
    ("epsilon-attnlrp", RuleSpec("Epsilon"), "AttnLRP"),  # Achtibat et al. 2024, Epsilon in all linear layers
    ("gamma-attnlrp", RuleSpec("Gamma", gamma=0.05), "AttnLRP"),  # the same with Gamma, as they advise for ViTs
    ("zplus-attention", RuleSpec("ZPlus"), "ZPlus"),  # z+ also through attention
    ("zplus-cp", RuleSpec("ZPlus"), "CP"),  # Yeom et al. 2021
)
_ALPHA1_BETA0 = RuleSpec("AlphaBeta", alpha=1, beta=0)
_N_SEEDS = 5


def _composite(convolutions: RuleSpec, fully_connected: RuleSpec, attention: str | None, *, abs: bool) -> CompositeSpec:
    return CompositeSpec(convolutions, convolutions, convolutions, fully_connected, abs=abs, attention=attention)


HEURISTICS: Mapping[str, CompositeSpec] = MappingProxyType(
    {
        name + suffix: _composite(RuleSpec(convolutions), RuleSpec(fully_connected), None, abs=suffix == "-abs")
        for name, convolutions, fully_connected in _PUBLISHED
        for suffix in ("", "-abs")
    }
)
"""Each composite for convolutional networks by name, signed; with the suffix `-abs` ranked by absolute relevance."""

TRANSFORMER_HEURISTICS: Mapping[str, CompositeSpec] = MappingProxyType(
    {
        name + suffix: _composite(rule, rule, attention, abs=suffix == "-abs")
        for name, rule, attention in _PUBLISHED_OF_TRANSFORMERS
        for suffix in ("", "-abs")
    }
)
"""Likewise for vision transformers."""


def _baselines(name: str, attention: str | None) -> Mapping[str, Ranker]:
    criteria = {criterion: CriterionSpec(criterion) for criterion in CRITERIA if criterion != "random"}
    seeds = {f"random-{seed}": CriterionSpec("random", seed=seed) for seed in range(_N_SEEDS)}
    composites = {
        name + suffix: _composite(_ALPHA1_BETA0, _ALPHA1_BETA0, attention, abs=suffix == "-abs")
        for suffix in ("", "-abs")
    }
    return MappingProxyType({**criteria, **seeds, **composites})


BASELINES: Mapping[str, Ranker] = _baselines("alpha1-beta0", None)
"""Baselines of convolutional networks (Yeom et al. 2021, Hatefi et al. 2024): criteria without relevance, `random` with
five seeds, and LRP-alpha1-beta0, which gives the relevance of z+. No registered space holds any of them."""

TRANSFORMER_BASELINES: Mapping[str, Ranker] = _baselines("alpha1-beta0-cp", "CP")
"""Likewise for vision transformers."""


def heuristics_of(parameters: Iterable[str], *, baselines: bool = False) -> Mapping[str, Ranker]:
    """The heuristics that stand beside a search, by name.

    Args:
        parameters: Names of the space's parameters: with `attention` among them, it is for transformers.
        baselines: The baselines too, after the published composites.
    """
    if "attention" in parameters:
        return {**TRANSFORMER_HEURISTICS, **(TRANSFORMER_BASELINES if baselines else {})}
    return {**HEURISTICS, **(BASELINES if baselines else {})}


def heuristic(name: str) -> Ranker:
    """The published composite or baseline of this name.

    Raises:
        UnknownHeuristicError: No heuristic has this name.
    """
    known: dict[str, Ranker] = {**HEURISTICS, **BASELINES, **TRANSFORMER_HEURISTICS, **TRANSFORMER_BASELINES}
    try:
        return known[name]
    except KeyError:
        raise UnknownHeuristicError(f"Unknown heuristic {name!r}.{did_you_mean(name, known)}") from None
