"""The published composites: the baselines of every study."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from search_spaces.composites import CompositeSpec
from search_spaces.errors import UnknownHeuristicError
from search_spaces.rules import RuleSpec
from search_spaces.suggestions import did_you_mean

__all__ = ["HEURISTICS", "TRANSFORMER_HEURISTICS", "heuristic", "heuristics_of"]

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


def heuristics_of(parameters: Iterable[str]) -> Mapping[str, CompositeSpec]:
    """The heuristics that stand beside a search, by name.

    Args:
        parameters: Names of the space's parameters: with `attention` among them, it is for transformers.
    """
    return TRANSFORMER_HEURISTICS if "attention" in parameters else HEURISTICS


def heuristic(name: str) -> CompositeSpec:
    """The published composite of this name.

    Raises:
        UnknownHeuristicError: No heuristic has this name.
    """
    known = {**HEURISTICS, **TRANSFORMER_HEURISTICS}
    try:
        return known[name]
    except KeyError:
        raise UnknownHeuristicError(f"Unknown heuristic {name!r}.{did_you_mean(name, known)}") from None
