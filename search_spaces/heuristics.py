"""The published composites: the baselines of every study."""

from collections.abc import Mapping
from types import MappingProxyType

from search_spaces.composites import CompositeSpec
from search_spaces.errors import UnknownHeuristicError
from search_spaces.rules import RuleSpec
from search_spaces.suggestions import did_you_mean

__all__ = ["HEURISTICS", "heuristic"]

_PUBLISHED = (
    # name, rule of the convolutions, rule of the fully-connected layers
    ("epsilon", "Epsilon", "Epsilon"),
    ("zplus", "ZPlus", "ZPlus"),  # Yeom et al. 2021
    ("epsilon-plus", "ZPlus", "Epsilon"),
    ("epsilon-alpha2-beta1", "AlphaBeta", "Epsilon"),
    ("epsilon-gamma", "Gamma", "Epsilon"),
)


def _composite(convolutions: str, fully_connected: str, *, abs: bool) -> CompositeSpec:
    rule = RuleSpec(convolutions)
    return CompositeSpec(LLR=rule, MLL=rule, HLL=rule, FCL=RuleSpec(fully_connected), abs=abs)


HEURISTICS: Mapping[str, CompositeSpec] = MappingProxyType(
    {
        name + suffix: _composite(convolutions, fully_connected, abs=suffix == "-abs")
        for name, convolutions, fully_connected in _PUBLISHED
        for suffix in ("", "-abs")
    }
)
"""Each composite by name, signed; with the suffix `-abs` ranked by absolute relevance."""


def heuristic(name: str) -> CompositeSpec:
    """The published composite of this name.

    Raises:
        UnknownHeuristicError: No heuristic has this name.
    """
    try:
        return HEURISTICS[name]
    except KeyError:
        raise UnknownHeuristicError(f"Unknown heuristic {name!r}.{did_you_mean(name, HEURISTICS)}") from None
