"""Results of trials, and how they enter the tables of Optuna's RDB storage."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy import delete, insert, select, update

from storage.artifacts import ArtifactRecord, attach
from storage.errors import (
    TrialAlreadyFinishedError,
    TrialNotRunningError,
    TrialNotWaitingError,
    TrialResultError,
)
from storage.measurements import MeasurementRecord, remember

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

__all__ = [
    "FAILURE",
    "LOSSES",
    "Parameter",
    "TrialResult",
    "claim",
    "fail",
    "finish",
    "has_failed",
    "holds",
    "is_pruned",
    "is_released",
    "prune",
    "release",
    "running",
    "set_parameters",
    "to_json",
]

FAILURE = "failure"
"""The user attribute that says why a trial has failed."""

LOSSES = "losses"
"""The user attribute that counts how often a trial was lost with its worker."""

_VALUE = models.TrialValueModel
_CURVE = models.TrialIntermediateValueModel
_ATTRIBUTE = models.TrialUserAttributeModel
_PARAMETER = models.TrialParamModel


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What a completed trial has found.

    Attributes:
        value: The study's metric, finite.
        curve: Accuracy by pruning rate in percent; the dashboard draws these intermediate values.
        attributes: User attributes by name, as JSON values with finite numbers.
        artifacts: Records of files that have been written.
        measurements: What has been measured for it and may be of use to other trials and studies.

    Raises:
        TrialResultError: A number is not finite, a step is not an integer, or a value is not JSON.
    """

    value: float
    curve: Mapping[int, float]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    artifacts: tuple[ArtifactRecord, ...] = ()
    measurements: tuple[MeasurementRecord, ...] = ()

    def __post_init__(self) -> None:
        _check_finite("value", self.value)
        for step, accuracy in self.curve.items():
            if not isinstance(step, int) or isinstance(step, bool):
                raise TrialResultError(f"A step of `curve` must be an integer, a rate in percent, but got {step!r}.")
            _check_finite(f"curve[{step}]", accuracy)
        for name, value in self.attributes.items():
            to_json(f"attributes[{name!r}]", value)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A trial's parameter: its name, its value in Optuna's internal form, and where it comes from."""

    name: str
    value: float
    distribution: BaseDistribution


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise TrialResultError(f"`{name}` must be finite, but got {value}; look for what makes the trial diverge.")


def to_json(name: str, value: Any) -> str:
    """A value as JSON text that every parser reads.

    Raises:
        TrialResultError: It is not JSON, or a number in it is not finite; the message starts with the name.
    """
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TrialResultError(f"`{name}` must be JSON with finite numbers, but got {value!r:.80}: {error}.") from error


def set_parameters(
    connection: Connection,
    study_id: int,
    trial_id: int,
    parameters: Sequence[Parameter],
    known: dict[str, BaseDistribution],
) -> None:
    """Write parameters of a running trial.

    Args:
        connection: Inside a transaction.
        study_id: The trial's study.
        trial_id: As Optuna numbers it.
        parameters: Those that it doesn't have yet.
        known: Distributions that the study's parameters have; completed from the database.

    Raises:
        ValueError: A distribution isn't compatible with the one that the study has for this name.
        TrialNotRunningError: The trial is not running.
    """
    for parameter in parameters:
        if parameter.name not in known:
            of_study = select(_PARAMETER.distribution_json).join(models.TrialModel)
            of_study = of_study.where(models.TrialModel.study_id == study_id, _PARAMETER.param_name == parameter.name)
            stored = connection.scalar(of_study.limit(1))
            known[parameter.name] = parameter.distribution if stored is None else json_to_distribution(stored)
        check_distribution_compatibility(known[parameter.name], parameter.distribution)
    if _state(connection, trial_id) != TrialState.RUNNING:
        raise _not_running(connection, trial_id)
    rows = [
        {
            "trial_id": trial_id,
            "param_name": parameter.name,
            "param_value": parameter.value,
            "distribution_json": distribution_to_json(parameter.distribution),
        }
        for parameter in parameters
    ]
    connection.execute(insert(_PARAMETER), rows)


def finish(connection: Connection, trial_id: int, result: TrialResult) -> None:
    """Write a running trial's result and make it COMPLETE.

    Equal in content to Optuna's `report`, `set_user_attr`, `upload_artifact` and `tell`, which are a transaction per
    value. What an earlier attempt at this trial has reported is replaced.

    Raises:
        TrialNotRunningError: It is not running.
    """
    _move(connection, trial_id, TrialState.COMPLETE)
    connection.execute(delete(_VALUE).where(_VALUE.trial_id == trial_id))
    connection.execute(delete(_CURVE).where(_CURVE.trial_id == trial_id))
    value, value_type = _VALUE.value_to_stored_repr(float(result.value))
    connection.execute(insert(_VALUE).values(trial_id=trial_id, objective=0, value=value, value_type=value_type))
    if result.curve:
        connection.execute(insert(_CURVE), [_curve_row(trial_id, *point) for point in sorted(result.curve.items())])
    _set_attributes(connection, trial_id, result.attributes)
    attach(connection, {"trial_id": trial_id}, result.artifacts)
    remember(connection, result.measurements)


def fail(connection: Connection, trial_id: int, reason: str) -> None:
    """Make a running trial FAIL for a reason.

    Raises:
        TrialNotRunningError: It is not running.
    """
    _move(connection, trial_id, TrialState.FAIL)
    _set_attributes(connection, trial_id, {FAILURE: reason})


def prune(connection: Connection, trial_id: int, attributes: Mapping[str, Any]) -> None:
    """Make a running trial PRUNED, which has no value.

    Raises:
        TrialNotRunningError: It is not running.
    """
    _move(connection, trial_id, TrialState.PRUNED)
    # Samplers take the last point of an earlier attempt's curve for a value.
    connection.execute(delete(_CURVE).where(_CURVE.trial_id == trial_id))
    _set_attributes(connection, trial_id, attributes)


def release(connection: Connection, trial_id: int, losses: int | None = None) -> None:
    """Make a running trial WAITING: its number, parameters and attributes are kept for the next ask.

    Raises:
        TrialNotRunningError: It is not running.
    """
    _move(connection, trial_id, TrialState.WAITING)
    if losses is not None:
        _set_attributes(connection, trial_id, {LOSSES: losses})


def claim(connection: Connection, trial_id: int) -> None:
    """Make a waiting trial RUNNING.

    Raises:
        TrialNotWaitingError: It is not waiting.
    """
    trial = models.TrialModel
    waiting = (trial.trial_id == trial_id) & (trial.state == TrialState.WAITING)
    changes: dict[Any, Any] = {trial.state: TrialState.RUNNING, trial._datetime_start_utc: _now()}
    if connection.execute(update(trial).where(waiting).values(changes)).rowcount != 1:
        state = _state(connection, trial_id)
        raise TrialNotWaitingError(
            f"The trial with id {trial_id} is {'gone' if state is None else state.name}, not WAITING; ask for another."
        )


def running(connection: Connection, study_id: int) -> dict[int, int]:
    """Numbers of a study's running trials by their ids, in the order of their numbers."""
    trial = models.TrialModel
    found = select(trial.trial_id, trial.number).where(trial.study_id == study_id, trial.state == TrialState.RUNNING)
    return {row.trial_id: row.number for row in connection.execute(found.order_by(trial.number))}


# What an attempt has left whose answer was lost


def holds(connection: Connection, trial_id: int, result: TrialResult) -> bool:
    """Whether a trial is COMPLETE with this very result."""
    if _state(connection, trial_id) != TrialState.COMPLETE:
        return False
    values = select(_VALUE.value).where(_VALUE.trial_id == trial_id)
    points = select(_CURVE.step, _CURVE.intermediate_value).where(_CURVE.trial_id == trial_id)
    return (
        connection.scalars(values).all() == [float(result.value)]
        and {row.step: row.intermediate_value for row in connection.execute(points)}
        == {step: float(accuracy) for step, accuracy in result.curve.items()}
        and _has_attributes(connection, trial_id, result.attributes)
    )


def has_failed(connection: Connection, trial_id: int, reason: str) -> bool:
    """Whether a trial is FAIL for this very reason."""
    failed = _state(connection, trial_id) == TrialState.FAIL
    return failed and _has_attributes(connection, trial_id, {FAILURE: reason})


def is_pruned(connection: Connection, trial_id: int, attributes: Mapping[str, Any]) -> bool:
    """Whether a trial is PRUNED with these very attributes."""
    pruned = _state(connection, trial_id) == TrialState.PRUNED
    return pruned and _has_attributes(connection, trial_id, attributes)


def is_released(connection: Connection, trial_id: int, losses: int | None) -> bool:
    """Whether a trial is WAITING after so many losses."""
    waiting = _state(connection, trial_id) == TrialState.WAITING
    return waiting and _has_attributes(connection, trial_id, {} if losses is None else {LOSSES: losses})


def _state(connection: Connection, trial_id: int) -> TrialState | None:
    return connection.scalar(select(models.TrialModel.state).where(models.TrialModel.trial_id == trial_id))


def _has_attributes(connection: Connection, trial_id: int, attributes: Mapping[str, Any]) -> bool:
    found = select(_ATTRIBUTE.key, _ATTRIBUTE.value_json).where(
        _ATTRIBUTE.trial_id == trial_id, _ATTRIBUTE.key.in_(attributes)
    )
    stored = {row.key: row.value_json for row in connection.execute(found)}
    return stored == {key: to_json(key, value) for key, value in attributes.items()}


def _move(connection: Connection, trial_id: int, state: TrialState) -> None:
    """Leave RUNNING, unless another has done so: checked in the statement that writes, which takes the row's lock."""
    trial = models.TrialModel
    changes: dict[Any, Any] = {trial.state: state}
    if state.is_finished():
        changes[trial._datetime_complete_utc] = _now()
    running = (trial.trial_id == trial_id) & (trial.state == TrialState.RUNNING)
    if connection.execute(update(trial).where(running).values(changes)).rowcount == 1:
        return
    raise _not_running(connection, trial_id)


def _not_running(connection: Connection, trial_id: int) -> TrialNotRunningError:
    trial = models.TrialModel
    found = connection.execute(select(trial.number, trial.state).where(trial.trial_id == trial_id)).one_or_none()
    if found is None:
        return TrialNotRunningError(f"The trial with id {trial_id} is gone; its study has been deleted meanwhile.")
    if found.state.is_finished():
        return TrialAlreadyFinishedError(
            f"Trial {found.number} is {found.state.name} already and stays as it is; ask for another one."
        )
    return TrialNotRunningError(f"Trial {found.number} is {found.state.name}, not RUNNING; ask for it first.")


def _now() -> datetime:
    """Optuna's tables hold UTC without a zone."""
    return datetime.now(UTC).replace(tzinfo=None)


def _curve_row(trial_id: int, step: int, accuracy: float) -> dict[str, Any]:
    value, value_type = _CURVE.intermediate_value_to_stored_repr(float(accuracy))
    return {"trial_id": trial_id, "step": step, "intermediate_value": value, "intermediate_value_type": value_type}


def _set_attributes(connection: Connection, trial_id: int, attributes: Mapping[str, Any]) -> None:
    if not attributes:
        return
    connection.execute(delete(_ATTRIBUTE).where(_ATTRIBUTE.trial_id == trial_id, _ATTRIBUTE.key.in_(attributes)))
    rows = [{"trial_id": trial_id, "key": key, "value_json": to_json(key, value)} for key, value in attributes.items()]
    connection.execute(insert(_ATTRIBUTE), rows)
