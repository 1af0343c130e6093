"""Sources of trials: the heuristics, which are given, and the search, which the study's sampler chooses."""

import logging
import math
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.in_flight import Asked
from hpo.samplers import sampler_failure
from search_spaces.criteria import CriterionSpec, Ranker
from search_spaces.errors import OutsideSpaceError, PruningHPOError
from search_spaces.heuristics import heuristic
from search_spaces.repairs import RepairSpec

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study

    from search_spaces.spaces import SearchSpace
    from storage.store import StudyStore

__all__ = ["HeuristicSource", "SearchSource", "TrialSource"]

_log = logging.getLogger("hpo")


class TrialSource(Protocol):
    """Where the driver gets trials from. Used by its thread only."""

    @property
    def n_left(self) -> int:
        """How many trials may well be asked ahead of the workers; `ask` may have one where this is 0."""
        ...

    def ask(self) -> Asked | None:
        """A running trial; None when there is no more, unless one is released.

        Raises:
            SamplerError: The sampler failed.
            StorageError: The database failed.
        """
        ...

    def told(self, asked: Asked) -> None:
        """A trial has been told what became of it."""
        ...

    def released(self, asked: Asked) -> None:
        """A trial waits again, to be asked once more."""
        ...


class HeuristicSource:
    """A trial of each heuristic, those first that were interrupted.

    Args:
        store: Where the study is.
        study: The study with a sampler that is not the search's: heuristics are given, not sampled.
        space: The search space; heuristics outside of it, as all criteria are, have no parameters.
        repair: How the study repairs what heuristics prune.
        names: The heuristics to ask.
    """

    def __init__(
        self, store: "StudyStore", study: "Study", space: "SearchSpace", repair: RepairSpec, names: Iterable[str]
    ) -> None:
        self._store = store
        self._study = study
        self._space = space
        self._repair = repair
        self._names = deque(names)

    @property
    def n_left(self) -> int:
        """See `TrialSource.n_left`."""
        return len(self._names)

    def ask(self) -> Asked | None:
        """See `TrialSource.ask`.

        It is added WAITING with all it has, and claimed then: at no time can a second one of this name come to be.
        """
        if not self._names:
            return None
        name = self._names.popleft()
        waiting = self._waiting(name) or self._store.add_waiting(self._study, self._trial(name))
        return Asked(self._store.claim(self._study, waiting), self._ranker(name), name)

    def told(self, asked: Asked) -> None:
        """See `TrialSource.told`."""

    def released(self, asked: Asked) -> None:
        """See `TrialSource.released`."""
        assert asked.heuristic is not None, "it is one of ours"
        self._names.appendleft(asked.heuristic)

    def _waiting(self, name: str) -> FrozenTrial | None:
        waiting = self._store.trials(self._study, states=(TrialState.WAITING,))
        return next((trial for trial in waiting if trial.user_attrs.get("heuristic") == name), None)

    def _ranker(self, name: str) -> Ranker:
        """What a name stands for: of a space that searches the repair the point with the study's own, if it has it."""
        ranker = heuristic(name)
        if isinstance(ranker, CriterionSpec) or "repair" not in self._space.distributions():
            return ranker
        point = replace(ranker, repair=self._repair)
        try:
            self._space.parameters(point)
        except OutsideSpaceError:
            return ranker
        return point

    def _trial(self, name: str) -> FrozenTrial:
        ranker = self._ranker(name)
        # Optuna holds a parameter to one set of values in all trials of a study.
        parameters: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        if not isinstance(ranker, CriterionSpec):
            with suppress(OutsideSpaceError):
                parameters, distributions = self._space.parameters(ranker), self._space.distributions()
        return create_trial(
            state=TrialState.WAITING,
            params=parameters,
            distributions=distributions,
            user_attrs={"role": "heuristic", "heuristic": name, "composite": ranker.to_json()},
        )


class SearchSource:
    """The trials that the sampler asks for; those that wait in the store come first.

    Args:
        store: Where the study is.
        study: The study with its sampler.
        space: The search space.
        sampler: What the user calls the sampler.
        n_trials: How many may be asked.
        deadline: When to ask no more, by `time.monotonic`.
    """

    def __init__(
        self, store: "StudyStore", study: "Study", space: "SearchSpace", *, sampler: str, n_trials: int, deadline: float
    ) -> None:
        self._store = store
        self._study = study
        self._space = space
        self._sampler = sampler
        self._n_left = n_trials
        self._deadline = deadline
        self._began = time.monotonic()
        self._n_in_flight = 0
        self._n_told = 0
        self._is_over = False

    @property
    def n_left(self) -> int:
        """See `TrialSource.n_left`; before a deadline, as many as are likely to be done by then."""
        if self._deadline == math.inf:
            return self._n_left
        now = time.monotonic()
        n_in_time = int((self._deadline - now) * self._n_told / max(now - self._began, 1e-3))
        return max(0, min(self._n_left, n_in_time - self._n_in_flight))

    def ask(self) -> Asked | None:
        """See `TrialSource.ask`."""
        if self._n_left <= 0:
            return None
        if time.monotonic() >= self._deadline:
            if not self._is_over:
                _log.info("The time given by --timeout is up.")
            self._is_over = True
            return None
        try:
            trial, composite = self._store.ask(self._study, self._space.suggest)
        except PruningHPOError:
            raise
        except Exception as error:  # a sampler of the user's may raise anything
            raise sampler_failure(self._sampler, error) from error
        self._n_left -= 1
        self._n_in_flight += 1
        return Asked(trial, composite)

    def told(self, asked: Asked) -> None:
        """See `TrialSource.told`."""
        self._n_in_flight -= 1
        self._n_told += 1

    def released(self, asked: Asked) -> None:
        """See `TrialSource.released`."""
        self._n_in_flight -= 1
        self._n_left += 1
