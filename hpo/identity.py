"""The identity of a study: what must be equal for two launches to be one search."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.config import LaunchConfiguration
    from hpo.problem import Problem
    from search_spaces.spaces import SearchSpace

__all__ = ["identity", "upgraded"]


def identity(configuration: "LaunchConfiguration", space: "SearchSpace", problem: "Problem") -> dict[str, Any]:
    """Everything that a trial's value or choice depends on; where and by how many it is computed is no part of it."""
    from objectives.repair.repairer import FORM
    from search_spaces.spaces import ContinuousSpace, DiscreteSpace

    repair = configuration.repair_spec()
    # Points of other spaces may have a repair of their own.
    is_repaired = bool(repair) or not isinstance(space, DiscreteSpace | ContinuousSpace)
    return {
        "repair": str(repair),
        **({"repair_form": FORM} if is_repaired else {}),
        "sampler": configuration.sampler,
        "metric": configuration.metric,
        "pruner": configuration.pruner or "none",
        "race_risk": configuration.race_risk if configuration.pruner == "race" else None,
        "seed": configuration.seed,
        "space": _content(space.to_json()),
        "objective": problem.identity(),
    }


def upgraded(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The identity that an earlier release has stored, in today's form.

    It had no repair and no races, named the space, and held the procedure once more beside the objective's.
    """
    kept = {key: value for key, value in stored.items() if key != "procedure"}
    return {"repair": "none", "pruner": "none", "race_risk": None, **kept, "space": _content(stored.get("space", {}))}


def _content(space: Mapping[str, Any]) -> dict[str, Any]:
    """A space's JSON form without its name: a file that is renamed holds the same space."""
    return {key: value for key, value in space.items() if key != "name"}
