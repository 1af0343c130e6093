"""Optuna's cache of finished trials, with patient reads and a trial's parameters written all at once."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from optuna.storages import _CachedStorage
from optuna.storages._rdb.storage import _create_scoped_session

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from optuna.distributions import BaseDistribution
    from optuna.storages import RDBStorage
    from optuna.study import StudyDirection
    from optuna.trial import FrozenTrial, TrialState

    from storage.patience import Outages

__all__ = ["StudyCache"]


class StudyCache(_CachedStorage):
    """Optuna's cache, of which every read waits out an outage.

    Thread-safe. Writes are as patient as their callers, who know what to do about an answer that was lost.
    """

    def __init__(self, backend: RDBStorage, outages: Outages) -> None:
        super().__init__(backend)
        self._outages = outages
        self._gathered = threading.local()

    @contextmanager
    def parameters_at_once(self) -> Iterator[None]:
        """Keep the parameters that are suggested inside, and write them in one transaction at its end.

        A process that is killed while it asks therefore leaves all parameters of a trial, or none, and never some that
        a sampler would then complete to another point.
        """
        parameters: list[tuple[int, str, float, BaseDistribution]] = []
        self._gathered.parameters = parameters
        try:
            yield
        finally:
            del self._gathered.parameters
        if not parameters:
            return
        with self._lock:
            study_id, _ = self._trial_id_to_study_id_and_number[parameters[0][0]]
            known = self._studies[study_id].param_distribution
            with _create_scoped_session(self._backend.scoped_session) as session:
                for trial_id, name, value, distribution in parameters:
                    self._backend._set_trial_param_without_commit(
                        session, trial_id, name, value, distribution, known.get(name)
                    )
            for _, name, _, distribution in parameters:
                known.setdefault(name, distribution)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """See `BaseStorage`."""
        parameters = getattr(self._gathered, "parameters", None)
        if parameters is None:
            super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        else:
            parameters.append((trial_id, param_name, param_value_internal, distribution))

    def forget(self, trial_id: int) -> None:
        """Read a trial anew, which Optuna takes for unchangeable once it is finished."""
        trial = self._outages.wait_out(lambda again: self._backend.get_trial(trial_id))
        with self._lock:
            if known := self._trial_id_to_study_id_and_number.get(trial_id):
                self._add_trials_to_cache(known[0], [trial])

    # Patient reads

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """See `BaseStorage`."""
        read = super().get_all_trials
        return self._outages.wait_out(lambda again: read(study_id, deepcopy, states))

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """See `BaseStorage`."""
        read = super().get_trial
        return self._outages.wait_out(lambda again: read(trial_id))

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """See `BaseStorage`."""
        read = super().get_study_user_attrs
        return self._outages.wait_out(lambda again: read(study_id))

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """See `BaseStorage`."""
        read = super().get_study_system_attrs
        return self._outages.wait_out(lambda again: read(study_id))

    def get_study_id_from_name(self, study_name: str) -> int:
        """See `BaseStorage`."""
        read = super().get_study_id_from_name
        return self._outages.wait_out(lambda again: read(study_name))

    def get_study_name_from_id(self, study_id: int) -> str:
        """See `BaseStorage`."""
        read = super().get_study_name_from_id
        return self._outages.wait_out(lambda again: read(study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """See `BaseStorage`."""
        read = super().get_study_directions
        return self._outages.wait_out(lambda again: read(study_id))

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """See `BaseStorage`."""
        read = super().get_best_trial
        return self._outages.wait_out(lambda again: read(study_id))
