"""The driver of a study: asks for composites, has them evaluated, and writes what they are worth."""

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from optuna.artifacts import get_all_artifact_meta
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from hpo import trials
from hpo.confirmation import Confirmed, compare, confirmed_attribute, read_confirmed
from hpo.errors import Interrupted, TrialsFailedError
from hpo.executors import Executor, Job, Outcome
from hpo.failures import FailureCount
from hpo.identity import identity, upgraded
from hpo.in_flight import Asked, InFlight
from hpo.measurements import records
from hpo.plots import CURVE_CSV, CURVE_PNG, STEPS_CSV, STUDY_PNG, CurvePlotter, curve_csv, steps_csv, study_png
from hpo.progress import TrialReport
from hpo.racing import RIVAL, Races, described, given_up
from hpo.samplers import GridSampler, learns, sampler_failure
from hpo.sources import HeuristicSource, SearchSource, TrialSource
from search_spaces.heuristics import heuristics_of
from storage.errors import AfterTrialError, StorageError, TrialResultError
from storage.identity import differences
from storage.store import StudyStore
from storage.trials import LOSSES, TrialResult

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study

    from hpo.config import LaunchConfiguration
    from hpo.problem import Problem
    from hpo.progress import Progress
    from objectives.objective import Evaluation
    from objectives.racing import GivenUp
    from search_spaces.criteria import Ranker
    from search_spaces.spaces import SearchSpace
    from storage.artifacts import ArtifactRecord

__all__ = ["CONFIRMATION", "DESCRIPTION", "StudyDriver"]

CONFIRMATION = "confirmation"
"""The user attribute of a study that holds the confirmation of its best trial."""

DESCRIPTION = "description"
"""The user attribute of a study that holds what its export documents share."""

_POLL_S = 0.2
_N_PLOTTED = 10

_log = logging.getLogger("hpo")


class StudyDriver:
    """The one process that writes to a study; to be made once the study's lease is held.

    Trials lost by a former driver are asked again, and so are those lost with a worker, a limited number of times. A
    composite that equals that of a complete trial is not evaluated: it is told the same value, with the user attribute
    `reused_from`; one that equals a trial in flight waits for that to end. Where trials race, one that loses is told
    PRUNED, and so is every other of its composite.

    Each worker has a batch of trials to compute and one to go on with. A sampler that learns is asked for one trial
    after the other where there is one worker, so that a study that is resumed is the one that was not interrupted.

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
            store.set_attribute(self._study, DESCRIPTION, problem.describe())
        self._deadline = math.inf if configuration.timeout_s is None else time.monotonic() + configuration.timeout_s
        self._in_flight = InFlight()
        self._unparked: deque[Asked] = deque()
        self._known: dict[str, int] = {}
        self._given_up: dict[str, tuple[int, GivenUp]] = {}
        is_raced = configuration.pruner == "race"
        self._races = Races(configuration, self._study.user_attrs.get(RIVAL)) if is_raced else None
        self._losses: Counter[int] = Counter()
        self._best: float | None = None
        self._best_heuristic: float | None = None
        self._worked = False

    def run(self) -> bool:
        """Heuristics, search, confirmation, pictures; whether there was anything to do.

        Raises:
            TrialsFailedError: So many trials in a row failed that it isn't their composites' fault (see
                `FailureCount`), or one to be confirmed did.
            SamplerError: The sampler failed.
            ExecutorError: No worker can be had.
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
        except BaseException as error:
            # A database that fails now must not hide why we leave; the next driver adopts what is left.
            with suppress(StorageError):
                self._store.adopt_orphans(self._study)
            if isinstance(error, StorageError):
                self._check_stop()  # who waited for the store was told to leave
            raise
        return self._worked

    # Phases

    def _recall(self) -> None:
        """Learn from the trials that are there, and have the pictures drawn that are missing."""
        for trial in self._trials():
            self._losses[trial.number] = trial.user_attrs.get(LOSSES, 0)
            composite = trials.composite_of(trial)
            if composite is not None and (verdict := given_up(trial)) is not None:
                self._given_up.setdefault(composite.key, (trial.number, verdict))
            if trial.state != TrialState.COMPLETE or composite is None:
                continue
            self._remember(trial, composite, trial.values[0], trial.user_attrs.get("heuristic"))
            if CURVE_PNG not in self._artifacts(trial):
                self._draw_trial(trial, composite, trial.values[0], trial.user_attrs)
        self._failures = FailureCount(self._executor.n_workers, some_work=bool(self._known))

    def _evaluate_heuristics(self) -> None:
        stored = self._trials()
        done = trials.heuristics(stored)
        # What a former launch was asked for and has left waiting would be asked by the search.
        begun = {*done, *(t.user_attrs.get("heuristic") for t in stored if t.state == TrialState.WAITING)}
        usual = heuristics_of(self._space.distributions(), baselines=self._configuration.baselines)
        every = heuristics_of(self._space.distributions(), baselines=True)
        wanted = [name for name in every if name in usual or name in begun]
        left = [name for name in wanted if name not in done]
        if left:
            self._phase("Heuristics", len(wanted), len(done))
        given = self._store.load(self._configuration.study, RandomSampler(seed=0))
        self._run_trials(HeuristicSource(self._store, given, self._space, self._configuration.repair_spec(), left))

    def _search(self) -> None:
        stored = self._trials()
        n_finished, left = self._count(stored), []
        if self._configuration.n_trials is not None:
            left.append(self._configuration.n_trials - n_finished)
        if isinstance(self._sampler, GridSampler):
            left.append(self._sampler.n_left(stored))
        n_left = max(0, min(left))
        if n_left:
            self._phase("Search", n_finished + n_left, n_finished)
        self._run_trials(
            SearchSource(
                self._store,
                self._study,
                self._space,
                sampler=self._configuration.sampler,
                n_trials=n_left,
                deadline=self._deadline,
            )
        )

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
            self._phase("Confirmation", len(wanted), len(confirmed))
            jobs = [self._confirmation_job(trial) for number, trial in wanted.items() if number not in confirmed]
            confirmed |= {each.trial: each for each in self._confirmed(jobs)}
        confirmation = compare(
            confirmed[best.number],
            {name: confirmed[trial.number] for name, trial in heuristics.items()},
            seed=self._configuration.seed,
        )
        if differences(self._study.user_attrs.get(CONFIRMATION), confirmation.to_json()):
            self._store.set_attribute(self._study, CONFIRMATION, confirmation.to_json())

    @staticmethod
    def _confirmation_job(trial: FrozenTrial) -> Job:
        composite = trials.composite_of(trial)
        assert composite is not None, "a complete trial has a composite"
        return Job(trial.number, composite, "confirmation")

    def _confirmed(self, jobs: list[Job]) -> Iterator[Confirmed]:
        """Have all workers confirm, and write what they find."""
        self._worked = True
        per_worker = math.ceil(len(jobs) / self._executor.n_workers)
        for first in range(0, len(jobs), per_worker):
            self._executor.submit(jobs[first : first + per_worker])
        losses: Counter[int] = Counter()
        n_left = len(jobs)
        while n_left:
            outcome = self._wait()
            number = outcome.job.number
            losses[number] += outcome.cause == "worker"
            if outcome.evaluation is not None:
                confirmed = Confirmed.of(number, outcome.evaluation)
                self._store.set_attribute(
                    self._study,
                    confirmed_attribute(number),
                    confirmed.to_json(),
                    measured=records(outcome.evaluation, self._problem.subject("confirmation")),
                )
                seconds = sum(outcome.evaluation.seconds.values())
                # Without the best values so far, which are of other images.
                label = outcome.job.composite.label
                self._progress.trial(TrialReport(number, label, confirmed.auc, seconds, "", None, None, figure="auc"))
                n_left -= 1
                yield confirmed
            elif outcome.cause in ("worker", "unstarted") and losses[number] <= self._configuration.max_losses:
                self._executor.submit([outcome.job])
            else:
                raise TrialsFailedError(f"Trial {number} could not be confirmed: {outcome.failure}")

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

    def _run_trials(self, source: TrialSource) -> None:
        """Keep the workers busy until nothing is left to ask."""
        while True:
            has_room = self._in_flight.n_batches < self._n_batches
            if has_room and (batch := self._next_batch(source)):
                self._in_flight.submit(batch)
                self._executor.submit([self._job(asked) for asked in batch])
                # Who has become idle meanwhile is served before more is asked ahead.
                outcome = self._executor.wait(timeout_s=0)
            elif self._in_flight:
                outcome = self._wait()
            else:
                return
            if outcome is not None:
                self._take(source, outcome)

    def _job(self, asked: Asked) -> Job:
        return Job(asked.number, asked.composite, race=None if self._races is None else self._races.race(asked))

    @property
    def _n_batches(self) -> int:
        """How many batches are to be in flight: one per worker, and another to go on with."""
        return self._executor.n_workers * (1 + self._looks_ahead)

    @property
    def _looks_ahead(self) -> bool:
        return self._executor.n_workers > 1 or not learns(self._configuration.sampler)

    def _next_batch(self, source: TrialSource) -> list[Asked]:
        """Trials that are to be computed, none if nothing is left to ask; equal ones are told or parked."""
        batch: list[Asked] = []
        size = self._batch_size(source.n_left + len(self._unparked))
        while len(batch) < size:
            self._check_stop()
            asked = self._unparked.popleft() if self._unparked else source.ask()
            if asked is None:
                break
            self._worked = True
            if self._is_settled(asked):
                self._repeat(source, asked)
            elif self._in_flight.add(asked):
                batch.append(asked)
            elif self._in_flight.n_parked >= self._executor.n_workers:
                break  # a sampler that repeats itself has to hear what became of its trials
        return batch

    def _batch_size(self, n_left: int) -> int:
        """What is left is dealt out evenly at the end."""
        size = min(self._configuration.trials_per_batch, math.ceil(n_left / self._n_batches))
        if self._in_flight.n_batches >= self._executor.n_workers:
            return size
        # A worker that has nothing to do gets the next trial at once.
        return 1 if self._looks_ahead else max(1, size)

    def _wait(self) -> Outcome:
        while (outcome := self._executor.wait(timeout_s=_POLL_S)) is None:
            self._check_stop()
            self._progress.stages(self._executor.stages())
        return outcome

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Interrupted

    def _take(self, source: TrialSource, outcome: Outcome) -> None:
        """Write what became of a trial, and tell those that are equal to it or have the next of them computed."""
        asked = self._in_flight[outcome.job.number]
        equal = self._in_flight.remove(asked)
        if outcome.evaluation is not None:
            self._finish_evaluated(source, asked, outcome.evaluation)
        elif outcome.given_up is not None:
            self._give_up(source, asked, outcome.given_up)
        elif outcome.cause == "unstarted":
            self._store.release(asked.trial)
            source.released(asked)
        elif outcome.cause == "worker":
            self._lose(source, asked, outcome.failure or "")
        else:
            self._fail(source, asked, outcome.failure or "", by_composite=outcome.cause == "composite")
        for each in equal:
            if self._is_settled(each):
                self._repeat(source, each)
            else:
                self._unparked.append(each)

    def _is_settled(self, asked: Asked) -> bool:
        """Whether it is known what becomes of a trial; heuristics don't race."""
        key = asked.composite.key
        return key in self._known or (asked.heuristic is None and key in self._given_up)

    def _repeat(self, source: TrialSource, asked: Asked) -> None:
        """Tell what became of the trial that equals this one."""
        if asked.composite.key in self._known:
            self._reuse(source, asked)
            return
        number, verdict = self._given_up[asked.composite.key]
        remark = f"equals trial {number}, {described(verdict)}"
        self._prune(source, asked, verdict, {"reused_from": number}, seconds=None, remark=remark)

    def _finish_evaluated(self, source: TrialSource, asked: Asked, evaluation: "Evaluation") -> None:
        try:
            result = TrialResult(
                value=evaluation.figures[self._configuration.metric],
                curve=trials.steps(evaluation.curve.rates, evaluation.curve.accuracies),
                attributes={**asked.attributes, **trials.attributes(evaluation)},
                measurements=records(evaluation, self._problem.subject("search")),
            )
        except TrialResultError as error:
            self._fail(source, asked, str(error), by_composite=True)
            return
        if self._races is not None and self._leads(asked.trial, result.value):
            # Before the trial is told: whatever happens between, later ones race against a composite of this study.
            self._store.set_attribute(self._study, RIVAL, self._races.lead(asked, evaluation))
        self._finish(source, asked, result, seconds=sum(evaluation.seconds.values()))
        self._failures.completed()

    def _give_up(self, source: TrialSource, asked: Asked, verdict: "GivenUp") -> None:
        self._given_up[asked.composite.key] = (asked.number, verdict)
        seconds = sum(verdict.seconds.values())
        self._prune(source, asked, verdict, {"seconds": verdict.seconds}, seconds=seconds, remark=described(verdict))
        self._failures.completed()

    def _prune(
        self,
        source: TrialSource,
        asked: Asked,
        verdict: "GivenUp",
        attributes: dict[str, Any],
        *,
        seconds: float | None,
        remark: str,
    ) -> None:
        with self._naming_sampler():
            self._store.prune(asked.trial, {**asked.attributes, trials.RACE: verdict.to_json(), **attributes})
        source.told(asked)
        self._report(asked.number, asked.label, None, seconds, remark)

    def _reuse(self, source: TrialSource, asked: Asked) -> None:
        """Tell the value of the complete trial that equals this one."""
        known = self._store.storage.get_trial(self._known[asked.composite.key])
        result = trials.result_of(known)
        shared = {name: value for name, value in result.attributes.items() if name not in trials.OWN}
        result = replace(result, attributes={**shared, **asked.attributes, "reused_from": known.number})
        self._finish(source, asked, result, seconds=None, remark=f"equals trial {known.number}")

    def _finish(
        self, source: TrialSource, asked: Asked, result: TrialResult, *, seconds: float | None, remark: str = ""
    ) -> None:
        curve = trials.curve_from(result.attributes)
        contents = {CURVE_CSV: curve_csv(curve, self._problem.class_names)}
        if steps := trials.steps_of(result.attributes):
            contents[STEPS_CSV] = steps_csv(steps)
        tables: list[ArtifactRecord] = []
        try:
            for name, content in contents.items():
                tables.append(self._store.write_artifact(name, content, "text/csv"))
            with self._naming_sampler():
                self._store.finish(asked.trial, replace(result, artifacts=tuple(tables)))
        except StorageError as error:
            for table in tables:
                self._store.discard_refused(table, error)
            raise
        source.told(asked)
        self._remember(asked.trial, asked.composite, result.value, asked.heuristic)
        self._draw_trial(asked.trial, asked.composite, result.value, result.attributes)
        self._report(asked.number, asked.label, result.value, seconds, remark)

    def _fail(self, source: TrialSource, asked: Asked, reason: str, *, by_composite: bool) -> None:
        with self._naming_sampler():
            self._store.fail(asked.trial, reason)
        source.told(asked)
        self._report(asked.number, asked.composite.label, None, None, f"failed: {reason}", failed=True)
        self._failures.failed(asked, reason, by_composite=by_composite)

    def _lose(self, source: TrialSource, asked: Asked, failure: str) -> None:
        """Have a trial asked again whose worker died, unless that has happened too often."""
        number, most = asked.number, self._configuration.max_losses
        self._losses[number] += 1
        if self._losses[number] > most:
            n_times = "once" if most == 0 else f"{most + 1} times"
            reason = f"its worker died {n_times}, and --max-losses is {most}: {failure}"
            self._fail(source, asked, reason, by_composite=False)
            return
        self._store.release(asked.trial, losses=self._losses[number])
        source.released(asked)
        _log.info("Trial %d was lost with its worker and is asked again: %s", number, failure)

    def _remember(self, trial: Trial | FrozenTrial, composite: "Ranker", value: float, heuristic: str | None) -> None:
        self._known.setdefault(composite.key, trial._trial_id)
        if self._leads(trial, value):
            self._best = value
        if heuristic is not None and (self._best_heuristic is None or value > self._best_heuristic):
            self._best_heuristic = value

    def _leads(self, trial: Trial | FrozenTrial, value: float) -> bool:
        """Whether a trial is better than all before; a heuristic outside the search space has no parameters."""
        return bool(trial.params) and (self._best is None or value > self._best)

    def _draw_trial(
        self, trial: Trial | FrozenTrial, composite: "Ranker", value: float, attributes: Mapping[str, Any]
    ) -> None:
        title = f"trial {trial.number}: {composite.label}\n{self._configuration.metric} {value:.4f}"
        self._plotter.draw(trial, trials.curve_from(attributes), title, trials.steps_of(attributes))

    # Progress

    def _phase(self, name: str, total: int, done: int) -> None:
        n_workers = self._executor.n_workers
        self._progress.phase(name if n_workers == 1 else f"{name}, {n_workers} workers", total, done)

    def _report(
        self,
        number: int,
        label: str,
        value: float | None,
        seconds: float | None,
        remark: str = "",
        *,
        failed: bool = False,
    ) -> None:
        best = (self._best, self._best_heuristic)
        self._progress.trial(TrialReport(number, label, value, seconds, remark, *best, failed))

    # The store

    def _to_be_stored(self) -> "LaunchConfiguration":
        """The configuration; a `--n-trials` below what has been searched already says nothing of the study."""
        name, budget = self._configuration.study, self._configuration.n_trials
        if budget is None or not self._store.exists(name):
            return self._configuration
        n_finished = self._count(self._store.trials(self._store.load(name)))
        return replace(self._configuration, n_trials=max(budget, n_finished))

    def _count(self, stored: list[FrozenTrial]) -> int:
        """How many trials count towards `--n-trials`; a grid asks its failed points again."""
        finished = trials.finished(stored)
        if isinstance(self._sampler, GridSampler):
            return sum(trial.state != TrialState.FAIL for trial in finished)
        return len(finished)

    @contextmanager
    def _naming_sampler(self) -> Iterator[None]:
        """Translate what a sampler raises when it hears of a result."""
        try:
            yield
        except AfterTrialError as error:
            raise sampler_failure(self._configuration.sampler, error.__cause__ or error) from error

    def _trials(self) -> list[FrozenTrial]:
        return self._store.trials(self._study)

    def _artifacts(self, owner: "Study | FrozenTrial") -> set[str]:
        """File names of an owner's artifacts."""
        return {artifact.filename for artifact in get_all_artifact_meta(owner, storage=self._store.storage)}
