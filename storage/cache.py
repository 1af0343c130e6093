"""Optuna's cache of finished trials, with patient reads and a trial's parameters written all at once."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from optuna.storages._cached_storage import _CachedStorage, _StudyInfo
from optuna.trial import TrialState

from storage.trials import Parameter, set_parameters

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from optuna.distributions import BaseDistribution
    from optuna.storages import RDBStorage
    from optuna.study import StudyDirection
    from optuna.trial import FrozenTrial

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
        gathered: dict[int, list[Parameter]] = {}
        self._gathered.parameters = gathered
        try:
            yield
        finally:
            del self._gathered.parameters
        for trial_id, parameters in gathered.items():
            with self._lock:
                study_id, _ = self._trial_id_to_study_id_and_number[trial_id]
                known = self._studies[study_id].param_distribution
            with self._backend.engine.begin() as connection:
                set_parameters(connection, study_id, trial_id, parameters, known)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """See `BaseStorage`."""
        gathered: dict[int, list[Parameter]] | None = getattr(self._gathered, "parameters", None)
        if gathered is None:
            super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        else:
            parameter = Parameter(param_name, param_value_internal, distribution)
            gathered.setdefault(trial_id, []).append(parameter)

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
        if states == (TrialState.WAITING,):
            return self._outages.wait_out(lambda again: self._read_waiting(study_id))
        read = super().get_all_trials
        return self._outages.wait_out(lambda again: read(study_id, deepcopy, states))

    def _read_waiting(self, study_id: int) -> list[FrozenTrial]:
        """What every `ask` looks for first; Optuna's cache would read all unfinished trials for it."""
        waiting = self._backend.get_all_trials(study_id, deepcopy=False, states=(TrialState.WAITING,))
        with self._lock:
            self._studies.setdefault(study_id, _StudyInfo())
            self._add_trials_to_cache(study_id, waiting)
        return waiting

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
