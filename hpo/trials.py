"""What the trials of a study say: role, composite, figures and curve, as user attributes."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from optuna.trial import FrozenTrial, TrialState

from objectives.pruning.curve import FIGURES, Curve
from objectives.pruning.records import StepRecord
from search_spaces.composites import CompositeSpec
from search_spaces.criteria import Ranker, ranker_from_json
from search_spaces.errors import SearchSpaceError
from storage.trials import LOSSES, TrialResult

if TYPE_CHECKING:
    from objectives.objective import Evaluation

__all__ = [
    "FINISHED",
    "MASKS",
    "OWN",
    "RACE",
    "Role",
    "STEPS",
    "attributes",
    "best",
    "composite_of",
    "curve_from",
    "curve_of",
    "figures_of",
    "finished",
    "heuristics",
    "result_of",
    "role",
    "steps",
    "steps_of",
]

Role = Literal["heuristic", "search"]

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
"""States in which a trial stays."""

MASKS = "masks"
"""The user attribute that counts the masks that a trial had measured (`n`), and those that were known (`n_known`)."""

OWN = ("role", "heuristic", "reused_from", "seconds", MASKS, LOSSES)
"""User attributes that a trial of the same composite does not share."""


RACE = "race"
"""The user attribute that says how a trial lost its race."""


STEPS = "steps"
"""The user attribute that holds the records of a procedure's steps."""


def role(trial: FrozenTrial) -> Role:
    """Why a trial exists. One without a role was being asked for when its driver died, so it is part of the search."""
    return "heuristic" if trial.user_attrs.get("role") == "heuristic" else "search"


def composite_of(trial: FrozenTrial) -> Ranker | None:
    """The trial's composite, or criterion; None for one that failed or waits in a space of the user's own."""
    try:
        if "composite" in trial.user_attrs:
            return ranker_from_json(trial.user_attrs["composite"])
        return CompositeSpec.from_parameters(trial.params)
    except SearchSpaceError:
        return None


def figures_of(trial: FrozenTrial) -> dict[str, float]:
    """The figures of a complete trial by name, in the order of `FIGURES`."""
    return {name: trial.user_attrs[name] for name in FIGURES if name in trial.user_attrs}


def curve_of(trial: FrozenTrial) -> Curve:
    """The curve of a complete trial."""
    return curve_from(trial.user_attrs)


def curve_from(attributes: Mapping[str, Any]) -> Curve:
    """The curve among the user attributes of a complete trial."""
    return Curve.from_json(attributes["curve"])


def steps_of(attributes: Mapping[str, Any]) -> tuple[StepRecord, ...]:
    """The records of a procedure's steps among the user attributes of a complete trial; none of one shot."""
    return tuple(map(StepRecord.from_json, attributes.get(STEPS, ())))


def attributes(evaluation: "Evaluation") -> dict[str, Any]:
    """User attributes that keep an evaluation: curve, every figure by its name, what it took, and remarks on it."""
    masks = {"n": evaluation.n_masks, "n_known": evaluation.n_known}
    return {
        "curve": evaluation.curve.to_json(),
        **evaluation.figures,
        "seconds": dict(evaluation.seconds),
        **({MASKS: masks} if evaluation.n_masks else {}),
        **({"remarks": list(evaluation.remarks)} if evaluation.remarks else {}),
        **({STEPS: [step.to_json() for step in evaluation.steps]} if evaluation.steps else {}),
    }


def result_of(trial: FrozenTrial) -> TrialResult:
    """What a complete trial has found, without its artifacts."""
    return TrialResult(trial.values[0], trial.intermediate_values, trial.user_attrs)


def steps(rates: Iterable[float], accuracies: Iterable[float]) -> dict[int, float]:
    """Intermediate values: rate in percent -> accuracy, so that the dashboard draws the curve.

    Rates finer than a percent share a step and the lowest of them is shown; the whole curve is a user attribute.
    """
    values: dict[int, float] = {}
    for rate, accuracy in zip(rates, accuracies, strict=True):
        values.setdefault(round(100 * rate), accuracy)
    return values


def finished(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The search trials that count towards the number of trials."""
    return [trial for trial in trials if role(trial) == "search" and trial.state in FINISHED]


def heuristics(trials: Iterable[FrozenTrial]) -> dict[str, FrozenTrial]:
    """The complete trial of each heuristic by name."""
    return {
        trial.user_attrs["heuristic"]: trial
        for trial in trials
        if role(trial) == "heuristic" and trial.state == TrialState.COMPLETE
    }


def best(trials: Iterable[FrozenTrial], count: int = 1) -> list[FrozenTrial]:
    """The best complete trials with distinct composites, best first; among equals the earliest.

    A heuristic outside the search space has no parameters and is no candidate: the user ruled it out.
    """
    candidates = [
        trial
        for trial in trials
        if trial.state == TrialState.COMPLETE and trial.params and "reused_from" not in trial.user_attrs
    ]
    return sorted(candidates, key=lambda trial: (-_value(trial), trial.number))[:count]


def _value(trial: FrozenTrial) -> float:
    return float("-inf") if trial.value is None else trial.value
