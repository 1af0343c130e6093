"""The catalogue: every name that a launch may use."""

from typing import TYPE_CHECKING, Any

from hpo.report import LEGEND, plain_table
from hpo.samplers import SAMPLERS
from objectives.pruning.curve import FIGURES
from search_spaces.heuristics import BASELINES, HEURISTICS, TRANSFORMER_BASELINES, TRANSFORMER_HEURISTICS
from search_spaces.repairs import REPAIRS
from search_spaces.spaces import REPAIR_SUFFIXES, SPACES, load_space

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["catalogue", "catalogue_tables"]

_HEURISTICS = {**HEURISTICS, **TRANSFORMER_HEURISTICS}
_BASELINES = {**BASELINES, **TRANSFORMER_BASELINES}


def catalogue() -> dict[str, Any]:
    """Spaces with their content, heuristics and baselines with what they rank by, samplers and metrics, as JSON."""
    return {
        "spaces": [
            {**load_space(name).to_json(), "size": load_space(name).size(), "description": _description(name)}
            for name in SPACES
        ],
        "heuristics": {name: composite.to_json() for name, composite in _HEURISTICS.items()},
        "baselines": {name: ranker.to_json() for name, ranker in _BASELINES.items()},
        "samplers": list(SAMPLERS),
        "metrics": list(FIGURES),
    }


def catalogue_tables() -> list["Table | str"]:
    """The same as tables."""
    spaces = plain_table("space", "points", "content")
    for name in SPACES:
        size = load_space(name).size()
        spaces.add_row(name, "continuous" if size is None else f"{size:,}", _description(name))
    heuristics = plain_table("heuristic", "composite")
    for name, composite in _HEURISTICS.items():
        heuristics.add_row(name, composite.label)
    baselines = plain_table("baseline", "criterion")
    for name, ranker in _BASELINES.items():
        baselines.add_row(name, ranker.label)
    repaired, with_strength = REPAIR_SUFFIXES
    strengths = ", ".join(str(strength) for strength in REPAIR_SUFFIXES[with_strength])
    repairs = (
        f"With {repaired} behind a space's name the repair of pruned networks is searched, too ({', '.join(REPAIRS)}), "
        f"with {with_strength} its strength as well ({strengths})."
    )
    return [
        spaces,
        repairs,
        heuristics,
        baselines,
        LEGEND,
        f"Samplers: {', '.join(SAMPLERS)}",
        f"Metrics: {', '.join(FIGURES)}",
    ]


def _description(name: str) -> str:
    """First line of the docstring of the space's maker."""
    return (SPACES[name].__doc__ or "").strip().partition("\n")[0]
