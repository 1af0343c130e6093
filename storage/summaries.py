"""Summaries of the studies in a store, by two queries whatever their number of trials."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy import and_, func, select

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from sqlalchemy.engine import Connection

__all__ = ["CREATED", "StudySummary", "summaries"]

CREATED = "created"
"""The user attribute of a study that says when it was created, as ISO 8601 in UTC."""


@dataclass(frozen=True, slots=True)
class StudySummary:
    """A study at a glance.

    Attributes:
        name: Its name.
        n_trials: Number of trials by state, of every state that occurs.
        best_value: The best value of a COMPLETE trial, None without one.
        created: When it was created, in UTC; None where another program has made it.
        last_completed: When its last trial has ended, in UTC; None before the first has.
    """

    name: str
    n_trials: Mapping[TrialState, int]
    best_value: float | None
    created: datetime | None
    last_completed: datetime | None


def summaries(connection: Connection) -> list[StudySummary]:
    """All studies, in the order of their creation."""
    study, direction, attribute = models.StudyModel, models.StudyDirectionModel, models.StudyUserAttributeModel
    trial, value = models.TrialModel, models.TrialValueModel
    of_study = select(study.study_id, study.study_name, direction.direction, attribute.value_json)
    of_study = of_study.outerjoin(direction, and_(direction.study_id == study.study_id, direction.objective == 0))
    of_study = of_study.outerjoin(attribute, and_(attribute.study_id == study.study_id, attribute.key == CREATED))
    studies = connection.execute(of_study.order_by(study.study_id)).all()
    of_trials = select(
        trial.study_id,
        trial.state,
        func.count().label("n_trials"),
        func.min(value.value).label("lowest"),
        func.max(value.value).label("highest"),
        func.max(trial._datetime_complete_utc).label("completed"),
    ).outerjoin(value, and_(value.trial_id == trial.trial_id, value.objective == 0))
    by_study: defaultdict[int, list[Any]] = defaultdict(list)
    for row in connection.execute(of_trials.group_by(trial.study_id, trial.state)):
        by_study[row.study_id].append(row)
    return [_summary(row, by_study[row.study_id]) for row in studies]


def _summary(study: Any, states: Sequence[Any]) -> StudySummary:
    lowest_is_best = study.direction == StudyDirection.MINIMIZE
    best = [row.lowest if lowest_is_best else row.highest for row in states if row.state == TrialState.COMPLETE]
    completed = [row.completed.replace(tzinfo=UTC) for row in states if row.completed is not None]
    return StudySummary(
        name=study.study_name,
        n_trials={row.state: row.n_trials for row in sorted(states, key=lambda row: int(row.state))},
        best_value=best[0] if best else None,
        created=datetime.fromisoformat(json.loads(study.value_json)) if study.value_json else None,
        last_completed=max(completed, default=None),
    )
