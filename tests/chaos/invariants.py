"""What holds after every fault: the six invariants of a study."""

import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from chaos.stub import StubSettings
from optuna.trial import FrozenTrial, TrialState

from hpo import trials
from hpo.driver import CONFIRMATION
from hpo.plots import CURVE_CSV, CURVE_PNG
from search_spaces.errors import PruningHPOError
from search_spaces.heuristics import HEURISTICS
from search_spaces.spaces import SearchSpace
from storage.store import StudyStore

MARK = "HPO_CHAOS_MARK"
ORPHANS_GONE_S = 10.0


@dataclass(frozen=True)
class Tally:
    """What a study holds after its faults.

    Attributes:
        complete: Search trials with a value.
        given_up: Search trials that lost a race.
        failed: Search trials that failed.
        lost: Points, or trials of the budget, that have neither a value nor a reason why not, and complete trials that
            were seen before and are gone or changed.
        duplicated: Complete search trials beyond the first of a grid's point.
    """

    complete: int
    given_up: int
    failed: int
    lost: int
    duplicated: int


class Witness:
    """Reads a study every second while it is driven, and remembers each complete trial as it was first seen (I5).

    Args:
        url: The store; whoever tests an outage gives an address that stays.
        study: The study's name.
    """

    def __init__(self, url: str, study: str = "s", interval_s: float = 1.0) -> None:
        self._url = url
        self._study = study
        self._interval_s = interval_s
        self._seen: dict[int, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.n_looks = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def altered(self, stored: list[FrozenTrial]) -> list[int]:
        """Numbers of complete trials that are not as they were first seen."""
        now = {trial.number: digest(trial) for trial in stored if trial.state == TrialState.COMPLETE}
        return [number for number, seen in self._seen.items() if now.get(number) != seen]

    def look(self) -> None:
        with StudyStore.open(self._url, read_only=True) as store:
            for trial in store.load(self._study).get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
                self._seen.setdefault(trial.number, digest(trial))
        self.n_looks += 1

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            with suppress(PruningHPOError):  # not yet created, or just the fault under test
                self.look()


def digest(trial: FrozenTrial) -> str:
    """Everything about a complete trial but the pictures, which are drawn later."""
    content = [trial.number, trial.values, trial.params, trial.user_attrs, sorted(trial.intermediate_values.items())]
    dates = [str(trial.datetime_start), str(trial.datetime_complete)]
    return hashlib.sha256(json.dumps([content, dates], sort_keys=True).encode()).hexdigest()


def assert_invariants(
    url: str,
    artifacts: Path,
    space: SearchSpace,
    settings: StubSettings,
    *,
    study: str = "s",
    sampler: str = "grid",
    n_trials: int | None = None,
    witness: Witness | None = None,
    mark: str | None = None,
    finished: bool = True,
) -> Tally:
    """The six invariants of `study`, the artifacts and the heuristics.

    Args:
        url: The store.
        artifacts: The store's artifacts.
        space: What was searched.
        settings: Of the stub that was searched with; they say what every value has to be.
        study: Its name.
        sampler: Its sampler; a grid has each point once.
        n_trials: The budget of a sampler that isn't a grid.
        witness: Who has watched.
        mark: Of the processes of a driver that has ended less than ten seconds ago.
        finished: Whether the study has been searched to its end.
    """
    with StudyStore.open(url, read_only=True) as store:
        loaded = store.load(study)
        stored, attributes = loaded.get_trials(), loaded.user_attrs
    files = set(os.listdir(artifacts)) if artifacts.is_dir() else set()
    search = [trial for trial in stored if trials.role(trial) == "search"]
    complete = [trial for trial in search if trial.state == TrialState.COMPLETE]
    failed = [trial for trial in search if trial.state == TrialState.FAIL]
    pruned = [trial for trial in search if trial.state == TrialState.PRUNED]
    lost = duplicated = 0

    # I1, I2
    if sampler == "grid":
        points = {composite.key: composite for composite in space.grid()}
        values = Counter(composite_key(trial) for trial in complete)
        assert set(values) <= set(points)
        faulty = {key for key, composite in points.items() if settings.fault(composite) is not None}
        duplicated = sum(values.values()) - len(values)
        failing = {composite_key(trial) for trial in failed}
        given_up = {composite_key(trial) for trial in pruned}
        assert not given_up & set(values), "what is given up has no value"
        lost = len(set(points) - set(values) - failing - given_up) if finished else 0
        assert not set(values) & faulty, "a faulty composite has no value"
        assert failing <= faulty, [trial.user_attrs for trial in failed if composite_key(trial) not in faulty]
        assert duplicated == 0, [key for key, count in values.items() if count > 1]
    elif finished:
        assert n_trials is not None
        lost = n_trials - len(complete) - len(failed) - len(pruned)
    assert lost == 0
    # I3
    if finished:
        assert Counter(trial.state for trial in stored if not trial.state.is_finished()) == {}
    # I4
    for trial in stored:
        if trial.state == TrialState.COMPLETE:
            assert_value(trial, settings)
        elif trial.state == TrialState.FAIL:
            assert trial.user_attrs["failure"]
        elif trial.state == TrialState.PRUNED:
            # The stub's images are so few that races are certain.
            best = max(other.value for other in stored if other.state == TrialState.COMPLETE and other.params)
            composite = trials.composite_of(trial)
            assert composite is not None
            assert settings.curve(composite).figures()["auc"] < best
            assert (trial.values, trial.intermediate_values) == (None, {})
    # I5
    if witness is not None:
        altered = witness.altered(stored)
        assert altered == []
    # I6
    if mark is not None:
        assert_no_orphans(mark)
    # What the dashboard shows is whole, too.
    for trial in stored:
        if trial.state == TrialState.COMPLETE:
            assert {CURVE_CSV, CURVE_PNG} <= set(artifact_names(trial, files)) or not finished, trial.number
    if finished:
        names = [trial.user_attrs["heuristic"] for trial in stored if trials.role(trial) == "heuristic"]
        assert sorted(names) == sorted(trials.heuristics(stored)) == sorted(HEURISTICS)
        assert CONFIRMATION in attributes
    return Tally(len(complete), len(pruned), len(failed), lost, duplicated)


def assert_value(trial: FrozenTrial, settings: StubSettings) -> None:
    """I4: the value is that of the stored curve, which is that of the composite, as is what the dashboard draws."""
    composite, curve = trials.composite_of(trial), trials.curve_of(trial)
    assert composite is not None
    assert trial.value == curve.figures()["auc"]
    assert curve == settings.curve(composite)
    assert trial.intermediate_values == trials.steps(curve.rates, curve.accuracies)


def composite_key(trial: FrozenTrial) -> str:
    composite = trials.composite_of(trial)
    assert composite is not None, trial
    return composite.key


def artifact_names(trial: FrozenTrial, files: set[str]) -> Iterator[str]:
    """File names of a trial's artifacts, each of which has its file."""
    for key, value in trial.system_attrs.items():
        if key.startswith("artifacts:"):
            record = json.loads(value)
            assert record["artifact_id"] in files, (trial.number, record)
            yield record["filename"]


# Processes


def marked(mark: str) -> dict[int, str]:
    """Titles of the processes that descend from a marked one, by pid.

    They have the mark in their environment or in their working directory; Ray writes its processes' titles over the
    former.

    Args:
        mark: Of a launch, or its beginning.
    """
    found = {}
    for directory in Path("/proc").iterdir():
        if not directory.name.isdecimal() or int(directory.name) == os.getpid():
            continue
        with suppress(OSError):
            state = (directory / "stat").read_text().rpartition(")")[2].split()[0]
            environment = (directory / "environ").read_bytes()
            where = os.readlink(directory / "cwd")
            if state != "Z" and (f"{MARK}={mark}".encode() in environment or mark in where):
                title = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(directory.name)] = title.strip()
    return found


def assert_no_orphans(mark: str) -> None:
    """I6: ten seconds after a driver's end, none of its processes is left."""
    deadline = time.monotonic() + ORPHANS_GONE_S
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.25)
    assert left == {}
