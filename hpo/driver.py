"""The driver of a study: asks for composites, has them evaluated, and writes what they are worth."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from optuna.artifacts import get_all_artifact_meta
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from hpo import trials
from hpo.confirmation import Confirmed, compare, confirmed_attribute, read_confirmed
from hpo.errors import Interrupted, SamplerError, TrialsFailedError
from hpo.executors import Executor, Job, Outcome
from hpo.plots import CURVE_CSV, CURVE_PNG, STUDY_PNG, CurvePlotter, curve_csv, study_png
from hpo.progress import TrialReport
from hpo.samplers import GridSampler
from search_spaces.errors import OutsideSpaceError, PruningHPOError
from search_spaces.heuristics import HEURISTICS
from storage.errors import AfterTrialError, StorageError, TrialResultError
from storage.identity import differences
from storage.store import StudyStore
from storage.trials import TrialResult

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study

    from hpo.config import LaunchConfiguration
    from hpo.problem import Problem
    from hpo.progress import Progress
    from objectives.objective import Evaluation
    from objectives.pruning.curve import Curve
    from search_spaces.composites import CompositeSpec
    from search_spaces.spaces import SearchSpace

__all__ = ["CONFIRMATION", "DESCRIPTION", "StudyDriver", "identity", "upgraded"]

CONFIRMATION = "confirmation"
"""The user attribute of a study that holds the confirmation of its best trial."""

DESCRIPTION = "description"
"""The user attribute of a study that holds what its export documents share."""

_MOST_FAILURES_IN_A_ROW = 3
_MOST_FAILURES_AT_FIRST = 10
_POLL_S = 0.2
_N_PLOTTED = 10

_log = logging.getLogger("hpo")


def identity(configuration: "LaunchConfiguration", space: "SearchSpace", problem: "Problem") -> dict[str, Any]:
    """What must be equal for two launches to be one study: everything that a trial's value or choice depends on."""
    return {
        "repair": "none",
        "sampler": configuration.sampler,
        "metric": configuration.metric,
        "seed": configuration.seed,
        "space": _content(space.to_json()),
        "objective": problem.identity(),
    }


def upgraded(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The identity that an earlier release has stored, in today's form.

    It had no repair, named the space, and held the procedure once more beside the objective's.
    """
    kept = {key: value for key, value in stored.items() if key != "procedure"}
    return {"repair": "none", **kept, "space": _content(stored.get("space", {}))}


def _content(space: Mapping[str, Any]) -> dict[str, Any]:
    """A space's JSON form without its name: a file that is renamed holds the same space."""
    return {key: value for key, value in space.items() if key != "name"}


@dataclass(frozen=True, slots=True)
class _Asked:
    """A trial that is being evaluated; `heuristic` is its heuristic's name, None for a search trial."""

    trial: Trial
    composite: "CompositeSpec"
    heuristic: str | None = None

    @property
    def attributes(self) -> dict[str, Any]:
        """User attributes that say what the trial is."""
        role = {"role": "search"} if self.heuristic is None else {"role": "heuristic", "heuristic": self.heuristic}
        return {**role, "composite": self.composite.to_json()}


class StudyDriver:
    """The one process that writes to a study; to be made once the study's lease is held.

    Trials lost by a former driver are asked again. A composite that equals that of a complete trial is not evaluated:
    it is told the same value, with the user attribute `reused_from`.

    Not thread-safe; `run` is called once.

    Raises:
        StudyIdentityError: The stored study of this name is another search; nothing is written.
    """

    def __init__(
        self,
        configuration: "LaunchConfiguration",
        *,
        space: "SearchSpace",
        sampler: "BaseSampler",
        problem: "Problem",
        store: StudyStore,
        executor: Executor,
        plotter: CurvePlotter,
        progress: "Progress",
        stop: threading.Event,
    ) -> None:
        self._configuration = configuration
        self._space = space
        self._sampler = sampler
        self._problem = problem
        self._store = store
        self._executor = executor
        self._plotter = plotter
        self._progress = progress
        self._stop = stop
        self._study = store.create_or_resume(
            configuration.study,
            identity=identity(configuration, space, problem),
            upgrade=upgraded,
            configuration=self._to_be_stored().to_json(),
            sampler=sampler,
        )
        if DESCRIPTION not in self._study.user_attrs:
            self._study.set_user_attr(DESCRIPTION, problem.describe())
        # Heuristics are given, not sampled.
        self._given = store.load(configuration.study, RandomSampler(seed=0))
        self._deadline = math.inf if configuration.timeout_s is None else time.monotonic() + configuration.timeout_s
        self._asked: dict[int, _Asked] = {}
        self._known: dict[str, tuple[int, TrialResult]] = {}
        self._n_finished = 0
        self._n_failures = 0
        self._n_failures_in_a_row = 0
        self._best: float | None = None
        self._best_heuristic: float | None = None
        self._worked = False

    def run(self) -> bool:
        """Heuristics, search, confirmation, pictures; whether there was anything to do.

        Raises:
            TrialsFailedError: Three trials in a row failed for reasons that are not their composites', the first ten
                of a study failed for whatever reason, or one to be confirmed did.
            SamplerError: The sampler failed.
            StorageError: The database or the disk failed.
            Interrupted: `stop` was set.
        """
        for number in self._store.adopt_orphans(self._study):
            _log.info("Trial %d was lost with its driver and is asked again.", number)
        try:
            self._recall()
            self._evaluate_heuristics()
            self._search()
            self._confirm()
            self._draw()
        except BaseException:
            # A database that fails now must not hide why we leave; the next driver adopts what is left.
            with suppress(StorageError):
                self._store.adopt_orphans(self._study)
            raise
        return self._worked

    # Phases

    def _recall(self) -> None:
        """Learn from the trials that are there, and have the pictures drawn that are missing."""
        stored = self._trials()
        self._n_finished = self._count(stored)
        for trial in stored:
            composite = trials.composite_of(trial)
            if trial.state != TrialState.COMPLETE or composite is None:
                continue
            self._remember(
                trial.number, composite, trials.result_of(trial), trial.user_attrs.get("heuristic"), bool(trial.params)
            )
            if CURVE_PNG not in self._artifacts(trial):
                self._draw_trial(trial, composite, trial.values[0], trials.curve_of(trial))

    def _evaluate_heuristics(self) -> None:
        done = trials.heuristics(self._trials())
        left = [name for name in HEURISTICS if name not in done]
        if left:
            self._progress.phase("Heuristics", len(HEURISTICS), len(done))
        names = iter(left)
        self._run_trials(lambda: None if (name := next(names, None)) is None else self._ask_heuristic(name))

    def _search(self) -> None:
        if n_left := self._n_left():
            self._progress.phase("Search", self._n_finished + n_left, self._n_finished)
        self._run_trials(self._ask_search)

    def _confirm(self) -> None:
        """Evaluate the best trial and the heuristics on the confirmation images, those that are not yet."""
        stored = self._trials()
        best = next(iter(trials.best(stored)), None)
        if best is None or not self._problem.n_confirmation_images:
            return
        heuristics = trials.heuristics(stored)
        wanted = {trial.number: trial for trial in (*heuristics.values(), best)}
        confirmed = read_confirmed(self._study.user_attrs, wanted)
        if len(confirmed) < len(wanted):
            self._progress.phase("Confirmation", len(wanted), len(confirmed))
        for number, trial in wanted.items():
            if number not in confirmed:
                confirmed[number] = self._confirm_trial(trial)
        confirmation = compare(
            confirmed[best.number],
            {name: confirmed[trial.number] for name, trial in heuristics.items()},
            seed=self._configuration.seed,
        )
        if differences(self._study.user_attrs.get(CONFIRMATION), confirmation.to_json()):
            self._study.set_user_attr(CONFIRMATION, confirmation.to_json())

    def _confirm_trial(self, trial: FrozenTrial) -> Confirmed:
        self._worked = True
        composite = trials.composite_of(trial)
        assert composite is not None, "a complete trial has a composite"
        self._executor.submit([Job(trial.number, composite, "confirmation")])
        outcome = self._wait()
        if outcome.evaluation is None:
            raise TrialsFailedError(f"Trial {trial.number} could not be confirmed: {outcome.failure}")
        confirmed = Confirmed.of(trial.number, outcome.evaluation)
        self._study.set_user_attr(confirmed_attribute(trial.number), confirmed.to_json())
        self._report(trial.number, composite.label, confirmed.auc, sum(outcome.evaluation.seconds.values()))
        return confirmed

    def _draw(self) -> None:
        """Wait for the pictures of the trials, and draw that of the study."""
        while not self._plotter.finish(timeout_s=_POLL_S):
            self._check_stop()
        stored = self._trials()
        if not self._worked and STUDY_PNG in self._artifacts(self._study):
            return
        best = {f"trial {trial.number}": trials.curve_of(trial) for trial in trials.best(stored, _N_PLOTTED)}
        heuristics = {name: trials.curve_of(trial) for name, trial in trials.heuristics(stored).items()}
        if best or heuristics:
            picture = study_png(best, heuristics, title=self._study.study_name)
            self._store.add_artifact(self._study, STUDY_PNG, picture, "image/png")

    # Trials

    def _run_trials(self, ask: Callable[[], _Asked | None]) -> None:
        """Keep the executor busy until nothing is left to ask."""
        while True:
            while len(self._asked) < self._executor.n_workers and (asked := ask()) is not None:
                self._check_stop()
                self._worked = True
                self._asked[asked.trial.number] = asked
                if asked.composite.key in self._known:
                    self._reuse(asked)
                else:
                    self._executor.submit([Job(asked.trial.number, asked.composite)])
            if not self._asked:
                return
            self._take(self._wait())

    def _ask_heuristic(self, name: str) -> _Asked:
        """A running trial of a heuristic: the one that was interrupted, or a new one.

        It is added WAITING with all it has, and claimed then: at no time can a second one of this name come to be.
        """
        composite = HEURISTICS[name]
        if (waiting := self._waiting_heuristic(name)) is None:
            try:
                parameters, distributions = self._space.parameters(composite), self._space.distributions()
            except OutsideSpaceError:
                # Optuna holds a parameter to one set of values in all trials of a study.
                parameters, distributions = {}, {}
            self._given.add_trial(
                create_trial(
                    state=TrialState.WAITING,
                    params=parameters,
                    distributions=distributions,
                    user_attrs={"role": "heuristic", "heuristic": name, "composite": composite.to_json()},
                )
            )
            waiting = self._waiting_heuristic(name)
        assert waiting is not None, "it was just added"
        self._store.storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
        return _Asked(Trial(self._given, waiting._trial_id), composite, name)

    def _waiting_heuristic(self, name: str) -> FrozenTrial | None:
        waiting = self._given.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return next((trial for trial in waiting if trial.user_attrs.get("heuristic") == name), None)

    def _ask_search(self) -> _Asked | None:
        if not self._n_left():
            return None
        if time.monotonic() >= self._deadline:
            _log.info("The time given by --timeout is up.")
            return None
        try:
            trial = self._study.ask()
            return _Asked(trial, self._space.suggest(trial))
        except PruningHPOError:
            raise
        except Exception as error:  # a sampler of the user's may raise anything
            raise self._sampler_error(error) from error

    def _count(self, stored: list[FrozenTrial]) -> int:
        """How many trials count towards `--n-trials`; a grid asks its failed points again."""
        finished = trials.finished(stored)
        if isinstance(self._sampler, GridSampler):
            return sum(trial.state != TrialState.FAIL for trial in finished)
        return len(finished)

    def _n_left(self) -> int:
        """How many search trials may still be asked."""
        budget = self._configuration.n_trials
        left = [] if budget is None else [budget - self._n_finished - len(self._asked)]
        if isinstance(self._sampler, GridSampler):
            left.append(self._sampler.n_left(self._study))
        return max(0, min(left))

    def _wait(self) -> Outcome:
        while (outcome := self._executor.wait(timeout_s=_POLL_S)) is None:
            self._check_stop()
        return outcome

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Interrupted

    def _take(self, outcome: Outcome) -> None:
        asked = self._asked[outcome.job.number]
        if outcome.evaluation is None:
            self._fail(asked, outcome.failure or "", by_composite=outcome.cause == "composite")
            return
        evaluation = outcome.evaluation
        try:
            result = self._result(asked, evaluation)
        except TrialResultError as error:
            self._fail(asked, str(error), by_composite=True)
            return
        self._finish(asked, result, seconds=sum(evaluation.seconds.values()))

    def _result(self, asked: _Asked, evaluation: "Evaluation") -> TrialResult:
        return TrialResult(
            value=evaluation.figures[self._configuration.metric],
            curve=trials.steps(evaluation.curve.rates, evaluation.curve.accuracies),
            attributes={**asked.attributes, **trials.attributes(evaluation)},
        )

    def _reuse(self, asked: _Asked) -> None:
        """Tell the value of the complete trial that equals this one."""
        number, known = self._known[asked.composite.key]
        shared = {name: value for name, value in known.attributes.items() if name not in trials.OWN}
        result = replace(known, attributes={**shared, **asked.attributes, "reused_from": number})
        self._finish(asked, result, seconds=None, remark=f"equals trial {number}")

    def _finish(self, asked: _Asked, result: TrialResult, *, seconds: float | None, remark: str = "") -> None:
        number, composite = asked.trial.number, asked.composite
        curve = trials.curve_from(result.attributes)
        table = self._store.write_artifact(CURVE_CSV, curve_csv(curve, self._problem.class_names), "text/csv")
        try:
            with self._naming_sampler():
                self._store.finish(asked.trial, replace(result, artifacts=(table,)))
        except StorageError:
            self._store.artifacts.discard(table.artifact_id)
            raise
        self._forget(asked)
        self._n_failures_in_a_row = 0
        self._remember(number, composite, result, asked.heuristic, in_space=bool(asked.trial.params))
        self._draw_trial(asked.trial, composite, result.value, curve)
        label = composite.label if asked.heuristic is None else f"{asked.heuristic}: {composite.label}"
        self._report(number, label, result.value, seconds, remark)

    def _fail(self, asked: _Asked, reason: str, *, by_composite: bool) -> None:
        with self._naming_sampler():
            self._store.fail(asked.trial, reason)
        self._forget(asked)
        self._report(asked.trial.number, asked.composite.label, None, None, f"failed: {reason}")
        self._n_failures += 1
        # Neighbours on a grid fail together; that alone must not end a search.
        self._n_failures_in_a_row += not by_composite
        none_works = not self._known and self._n_failures >= _MOST_FAILURES_AT_FIRST
        if none_works or self._n_failures_in_a_row >= _MOST_FAILURES_IN_A_ROW:
            count = self._n_failures if none_works else self._n_failures_in_a_row
            raise TrialsFailedError(
                f"{count} trials in a row failed, the last one (trial {asked.trial.number}, "
                f"{asked.composite.label}) because: {reason}"
            )

    def _forget(self, asked: _Asked) -> None:
        del self._asked[asked.trial.number]
        self._n_finished += asked.heuristic is None

    def _remember(
        self, number: int, composite: "CompositeSpec", result: TrialResult, heuristic: str | None, in_space: bool
    ) -> None:
        self._known.setdefault(composite.key, (number, result))
        if in_space and (self._best is None or result.value > self._best):
            self._best = result.value
        if heuristic is not None and (self._best_heuristic is None or result.value > self._best_heuristic):
            self._best_heuristic = result.value

    def _draw_trial(self, trial: Trial | FrozenTrial, composite: "CompositeSpec", value: float, curve: "Curve") -> None:
        title = f"trial {trial.number}: {composite.label}\n{self._configuration.metric} {value:.4f}"
        self._plotter.draw(trial, curve, title)

    def _report(self, number: int, label: str, value: float | None, seconds: float | None, remark: str = "") -> None:
        self._progress.trial(TrialReport(number, label, value, seconds, remark, self._best, self._best_heuristic))

    # The store

    def _to_be_stored(self) -> "LaunchConfiguration":
        """The configuration; a `--n-trials` below what has been searched already says nothing of the study."""
        name, budget = self._configuration.study, self._configuration.n_trials
        if budget is None or not self._store.exists(name):
            return self._configuration
        n_finished = self._count(self._store.load(name).get_trials(deepcopy=False))
        return replace(self._configuration, n_trials=max(budget, n_finished))

    @contextmanager
    def _naming_sampler(self) -> Iterator[None]:
        """Translate what a sampler raises when it hears of a result."""
        try:
            yield
        except AfterTrialError as error:
            raise self._sampler_error(error.__cause__ or error) from error

    def _sampler_error(self, error: BaseException) -> SamplerError:
        reason = " ".join(str(error).split())
        return SamplerError(
            f"Sampler {self._configuration.sampler!r} failed: {type(error).__name__}: {reason}; "
            "try `--sampler tpe` in another --study."
        )

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _artifacts(self, owner: "Study | FrozenTrial") -> set[str]:
        """File names of an owner's artifacts."""
        return {artifact.filename for artifact in get_all_artifact_meta(owner, storage=self._store.storage)}
