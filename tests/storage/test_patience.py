"""Outages: what is waited for, how it is told, and what an answer that was lost leaves behind."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from commit_proxy import CommitProxy
from optuna.artifacts import get_all_artifact_meta
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from postgresql_cluster import Server

from storage import engine
from storage.errors import StoreBusyError, StoreUnreachableError
from storage.measurements import MeasurementRecord
from storage.patience import IMPATIENT, Outages, Patience
from storage.store import StudyStore
from storage.trials import TrialResult

SPACE: dict[str, BaseDistribution] = {
    "LLR": CategoricalDistribution(["Epsilon", "ZPlus"]),
    "epsilon": FloatDistribution(1e-6, 1.0, log=True),
}
RESULT = TrialResult(value=0.6, curve={0: 0.9, 50: 0.3}, attributes={"auc": 0.6, "role": "search"})
HEURISTIC = create_trial(
    state=TrialState.WAITING,
    params={"LLR": "ZPlus"},
    distributions={"LLR": SPACE["LLR"]},
    user_attrs={"heuristic": "h"},
)
AWAY = StoreUnreachableError("Cannot reach the store: refused.")


def suggest(trial: Trial) -> dict[str, Any]:
    return {name: trial._suggest(name, distribution) for name, distribution in SPACE.items()}


@dataclass
class Told:
    """What a user is told of outages."""

    sentences: list[str] = field(default_factory=list)

    def patience(self, timeout_s: float = 60.0, stop: threading.Event | None = None) -> Patience:
        return Patience(timeout_s, stop, self.sentences.append)


# Waiting


def outages(patience: Patience) -> Outages:
    return Outages(patience, "sqlite:///studies.db", (StoreUnreachableError,))


def fails_first(n: int, error: Exception = AWAY) -> Callable[[bool], list[bool]]:
    """An attempt that fails n times and then returns what it has been told each time."""
    told: list[bool] = []

    def attempt(again: bool) -> list[bool]:
        told.append(again)
        if len(told) <= n:
            raise error
        return told

    return attempt


def test_outage_is_waited_out_and_told_once() -> None:
    told = Told()
    assert outages(told.patience()).wait_out(fails_first(3)) == [False, True, True, True]
    begin, end = told.sentences
    assert begin == f"{AWAY} Waiting for it, at most 60 s."
    assert re.fullmatch(r"The store sqlite:///studies.db is back after 0\.\d s; the study goes on\.", end)


def test_outage_is_told_once_to_all_threads() -> None:
    told = Told()
    waiting, gone = outages(told.patience()), threading.Event()

    def attempt(again: bool) -> None:
        if not gone.is_set():
            raise AWAY

    threads = [threading.Thread(target=waiting.wait_out, args=(attempt,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    gone.set()
    for thread in threads:
        thread.join()
    assert len(told.sentences) == 2


def test_each_outage_has_its_own_time() -> None:
    told = Told()
    waiting = outages(told.patience(timeout_s=0.5))
    for _ in range(3):
        # 0.3 s each.
        waiting.wait_out(fails_first(2))
    assert len(told.sentences) == 6


def test_success_of_a_call_within_prolongs_nothing() -> None:
    told = Told()
    waiting = outages(told.patience(timeout_s=0.5))

    def attempt(again: bool) -> None:
        assert waiting.wait_out(lambda again: 1) == 1
        raise AWAY

    start = time.monotonic()
    with pytest.raises(StoreUnreachableError, match=r"longer than --store-timeout \(0\.5 s\)"):
        waiting.wait_out(attempt)
    assert time.monotonic() - start < 2
    assert len(told.sentences) == 1


def test_success_of_another_thread_prolongs_nothing() -> None:
    told, done = Told(), threading.Event()
    waiting = outages(told.patience(timeout_s=0.5))

    def read() -> None:
        while not done.wait(0.01):
            waiting.wait_out(lambda again: None)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        start = time.monotonic()
        with pytest.raises(StoreUnreachableError, match="longer than --store-timeout"):
            waiting.wait_out(fails_first(10**6))
        assert time.monotonic() - start < 2
    finally:
        done.set()
        reader.join()
    assert len(told.sentences) == 1


def test_patience_ends() -> None:
    told = Told()
    start = time.monotonic()
    with pytest.raises(StoreUnreachableError) as caught:
        outages(told.patience(timeout_s=0.5)).wait_out(fails_first(10**6))
    assert 0.5 <= time.monotonic() - start < 2
    assert str(caught.value) == (
        "The store sqlite:///studies.db has been away for longer than --store-timeout (0.5 s); "
        "finished trials are kept: launch again once it is back."
    )
    assert caught.value.__cause__ is AWAY
    assert len(told.sentences) == 1


def test_without_patience_the_failure_is_raised_at_once() -> None:
    attempt = fails_first(1)
    with pytest.raises(StoreUnreachableError, match="refused"):
        outages(IMPATIENT).wait_out(attempt)
    assert attempt(True) == [False, True]


@pytest.mark.parametrize("error", [StoreBusyError("held"), ValueError("wrong")])
def test_other_errors_are_raised_at_once(error: Exception) -> None:
    told = Told()
    with pytest.raises(type(error)):
        outages(told.patience()).wait_out(fails_first(1, error))
    assert told.sentences == []


def test_stop_ends_the_waiting_at_once() -> None:
    stop, told = threading.Event(), Told()
    timer = threading.Timer(1.6, stop.set)  # attempts are made at 0, 0.1, 0.3, 0.7, 1.5 and 3.1 s
    start = time.monotonic()
    timer.start()
    attempts: list[float] = []

    def attempt(again: bool) -> None:
        attempts.append(time.monotonic())
        raise AWAY

    with pytest.raises(StoreUnreachableError, match="refused"):
        outages(told.patience(stop=stop)).wait_out(attempt)
    stopped = time.monotonic()
    assert 1.6 <= stopped - start < 3.0
    # No attempt is made once it is stopped: one may take as long as a connection's time-out.
    assert attempts[-1] - start < 1.6
    with pytest.raises(StoreUnreachableError, match="refused"):
        outages(told.patience(stop=stop)).wait_out(attempt)


# Answers that are lost


@pytest.fixture
def proxy(postgresql_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CommitProxy]:
    # Otherwise a directory for each address of a store.
    monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path / "artifacts"))
    with CommitProxy(postgresql_server.port) as opened:
        yield opened


def by_proxy(url: str, server: Server, proxy: CommitProxy) -> str:
    return url.replace(f":{server.port}/", f":{proxy.port}/")


Operation = Callable[[StudyStore, Study], Callable[[], object]]
Check = Callable[[StudyStore, Study], None]


def only_trial(study: Study) -> FrozenTrial:
    [trial] = study.get_trials(deepcopy=False)
    return trial


def ask(store: StudyStore, study: Study) -> Callable[[], object]:
    def work() -> None:
        trial, suggested = store.ask(study, suggest)
        assert trial.number == 0
        assert trial.params == suggested

    return work


def ask_waiting(store: StudyStore, study: Study) -> Callable[[], object]:
    trial, first = store.ask(study, suggest)
    store.release(trial)

    def work() -> None:
        again, suggested = store.ask(study, suggest)
        assert (again.number, suggested) == (0, first)

    return work


def is_asked(store: StudyStore, study: Study) -> None:
    trial = only_trial(study)
    assert trial.state == TrialState.RUNNING
    assert list(trial.params) == list(SPACE)


def measured(study: Study) -> MeasurementRecord:
    return MeasurementRecord(study.study_name, "origin", "mask", 8, b"\xff", 10, 100)


def finish(store: StudyStore, study: Study) -> Callable[[], object]:
    trial, _ = store.ask(study, suggest)
    record = store.write_artifact("curve.csv", b"0,1")
    result = TrialResult(RESULT.value, RESULT.curve, RESULT.attributes, (record,), (measured(study),))
    return lambda: store.finish(trial, result)


def is_finished(store: StudyStore, study: Study) -> None:
    trial = only_trial(study)
    assert (trial.state, trial.values) == (TrialState.COMPLETE, [0.6])
    assert (trial.intermediate_values, trial.user_attrs) == (RESULT.curve, RESULT.attributes)
    [artifact] = get_all_artifact_meta(trial, storage=store.storage)
    with store.artifacts.open_reader(artifact.artifact_id) as file:
        assert file.read() == b"0,1"
    assert store.measurements([study.study_name]) == [measured(study)]


def fail(store: StudyStore, study: Study) -> Callable[[], object]:
    trial, _ = store.ask(study, suggest)
    return lambda: store.fail(trial, "out of memory")


def has_failed(store: StudyStore, study: Study) -> None:
    trial = only_trial(study)
    assert (trial.state, trial.user_attrs) == (TrialState.FAIL, {"failure": "out of memory"})


def prune(store: StudyStore, study: Study) -> Callable[[], object]:
    trial, _ = store.ask(study, suggest)
    return lambda: store.prune(trial, {"race": {"rival": 3}})


def is_pruned(store: StudyStore, study: Study) -> None:
    trial = only_trial(study)
    assert (trial.state, trial.values, trial.user_attrs) == (TrialState.PRUNED, None, {"race": {"rival": 3}})


def release(store: StudyStore, study: Study) -> Callable[[], object]:
    trial, _ = store.ask(study, suggest)
    return lambda: store.release(trial, losses=2)


def is_released(store: StudyStore, study: Study) -> None:
    trial = only_trial(study)
    assert (trial.state, trial.user_attrs) == (TrialState.WAITING, {"losses": 2})


def adopt(store: StudyStore, study: Study) -> Callable[[], object]:
    store.ask(study, suggest)

    def work() -> None:
        assert store.adopt_orphans(study) == [0]

    return work


def is_waiting(store: StudyStore, study: Study) -> None:
    assert only_trial(study).state == TrialState.WAITING


def add_waiting(store: StudyStore, study: Study) -> Callable[[], object]:
    def work() -> None:
        assert store.add_waiting(study, HEURISTIC).number == 0

    return work


def is_added(store: StudyStore, study: Study) -> None:
    trial = only_trial(study)
    assert (trial.state, trial.params, trial.user_attrs) == (TrialState.WAITING, HEURISTIC.params, HEURISTIC.user_attrs)


def claim(store: StudyStore, study: Study) -> Callable[[], object]:
    waiting = store.add_waiting(study, HEURISTIC)
    return lambda: store.claim(study, waiting)


def is_claimed(store: StudyStore, study: Study) -> None:
    assert only_trial(study).state == TrialState.RUNNING


def set_attribute(store: StudyStore, study: Study) -> Callable[[], object]:
    store.set_attribute(study, "description", "former")
    return lambda: store.set_attribute(study, "description", {"model": "digits"})


def has_attribute(store: StudyStore, study: Study) -> None:
    assert study.user_attrs["description"] == {"model": "digits"}


def create(store: StudyStore, study: Study) -> Callable[[], object]:
    name = f"{study.study_name} again"
    return lambda: store.create_or_resume(name, identity={"seed": 0}, configuration={})


def is_created(store: StudyStore, study: Study) -> None:
    [created] = [each for each in store.summaries() if each.name == f"{study.study_name} again"]
    assert created.created is not None
    assert store.load(created.name).user_attrs["identity"] == {"seed": 0}


def add_artifact(store: StudyStore, study: Study) -> Callable[[], object]:
    store.add_artifact(study, "best.png", b"former")
    return lambda: store.add_artifact(study, "best.png", b"png")


def has_artifact(store: StudyStore, study: Study) -> None:
    [artifact] = get_all_artifact_meta(study)
    with store.artifacts.open_reader(artifact.artifact_id) as file:
        assert file.read() == b"png"


OPERATIONS: dict[str, tuple[Operation, Check]] = {
    "add_artifact": (add_artifact, has_artifact),
    "add_waiting": (add_waiting, is_added),
    "adopt_orphans": (adopt, is_waiting),
    "ask": (ask, is_asked),
    "ask_waiting": (ask_waiting, is_asked),
    "claim": (claim, is_claimed),
    "create_or_resume": (create, is_created),
    "fail": (fail, has_failed),
    "finish": (finish, is_finished),
    "prune": (prune, is_pruned),
    "release": (release, is_released),
    "set_attribute": (set_attribute, has_attribute),
}


def _open_often(url: str, times: int) -> None:
    for _ in range(times):
        StudyStore.open(url).close()


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_store_that_goes_away_while_it_is_opened_is_unreachable(
    nth: int, postgresql_server: Server, proxy: CommitProxy
) -> None:
    url = postgresql_server.new_database()
    StudyStore.open(url).close()
    proxy.lose(nth, delivered=True)
    with pytest.raises(StoreUnreachableError):
        _open_often(by_proxy(url, postgresql_server, proxy), times=nth)
    assert proxy.n_lost == 1


@pytest.mark.parametrize("delivered", [True, False], ids=["answer", "commit"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_done_once_whichever_commit_is_lost(
    name: str, delivered: bool, postgresql_server: Server, proxy: CommitProxy
) -> None:
    operation, check = OPERATIONS[name]
    url = postgresql_server.new_database()
    told = Told()
    with (
        StudyStore.open(by_proxy(url, postgresql_server, proxy), patience=told.patience()) as store,
        StudyStore.open(url, read_only=True) as witness,
    ):
        # Each turn loses the next of the operation's commits, until it has no more.
        for n in count(1):
            study_name = f"turn {n}"
            with store.lease(study_name):
                study = store.create_or_resume(study_name, identity={}, configuration={}, sampler=RandomSampler(0))
                work = operation(store, study)
                proxy.lose(n, delivered=delivered)
                work()
                proxy.keep()
            check(witness, witness.load(study_name))
            if proxy.n_lost < n:
                break
        assert n > 1
        assert len(told.sentences) == 2 * (n - 1)


def test_file_stays_whose_record_may_be_there(postgresql_server: Server, proxy: CommitProxy, tmp_path: Path) -> None:
    url = postgresql_server.new_database()
    stop = threading.Event()
    patience = Patience(60.0, stop, lambda sentence: stop.set())
    with (
        StudyStore.open(by_proxy(url, postgresql_server, proxy), patience=patience) as store,
        StudyStore.open(url, read_only=True) as witness,
    ):
        study = store.create_or_resume("digits", identity={}, configuration={})
        # The launch is stopped while it waits for the answer to a commit that has been carried out.
        proxy.lose(1, delivered=True)
        with pytest.raises(StoreUnreachableError):
            store.add_artifact(study, "best.png", b"png")
        has_artifact(witness, witness.load("digits"))


# Servers that restart


def test_loop_goes_on_through_crashes_of_the_server(new_postgresql: Callable[[], Server]) -> None:
    server = new_postgresql()
    told = Told()
    n_trials = 60
    with StudyStore.open(server.new_database(), patience=told.patience()) as store, store.lease("digits"):
        study = store.create_or_resume("digits", identity={}, configuration={}, sampler=RandomSampler(0))
        done = threading.Event()

        def crash() -> None:
            while not done.wait(0.7):
                server.restart("immediate")

        crashing = threading.Thread(target=crash)
        crashing.start()
        values: dict[int, float] = {}
        try:
            start = time.monotonic()
            while len(values) < n_trials or time.monotonic() - start < 6:
                trial, suggested = store.ask(study, suggest)
                assert trial.number not in values
                values[trial.number] = suggested["epsilon"]
                store.finish(trial, TrialResult(value=suggested["epsilon"], curve={0: 1.0}))
        finally:
            done.set()
            crashing.join()
        stored = study.get_trials(deepcopy=False)
        assert {trial.number: trial.value for trial in stored} == values
        assert [trial.number for trial in stored] == list(range(len(values)))
        assert {trial.state for trial in stored} == {TrialState.COMPLETE}
        store.set_attribute(study, "crashes", "over")  # a crash after the last write has taken the lock with it
        holder = store.lease_holder("digits")
        assert holder is not None
    assert len(told.sentences) >= 2


def test_opening_waits_for_nothing(new_postgresql: Callable[[], Server]) -> None:
    server = new_postgresql()
    url = server.new_database()
    with StudyStore.open(url):
        pass
    server.stop()
    start = time.monotonic()
    with pytest.raises(StoreUnreachableError, match="Cannot reach the store"):
        StudyStore.open(url, patience=Patience(60))
    assert time.monotonic() - start < 5


def test_reading_waits_too(new_postgresql: Callable[[], Server]) -> None:
    server = new_postgresql()
    told = Told()
    with StudyStore.open(server.new_database(), patience=told.patience()) as store:
        study = store.create_or_resume("digits", identity={}, configuration={})
        server.stop()
        starting = threading.Timer(1.0, server.start)
        starting.start()
        assert study.get_trials() == []
        starting.join()
    assert len(told.sentences) == 2


def test_store_that_stays_away_is_left_in_time(new_postgresql: Callable[[], Server]) -> None:
    server = new_postgresql()
    told = Told()
    with (
        StudyStore.open(server.new_database(), patience=told.patience(timeout_s=1.0)) as store,
        store.lease("digits"),
    ):
        study = store.create_or_resume("digits", identity={}, configuration={})
        server.stop()
        start = time.monotonic()
        with pytest.raises(StoreUnreachableError, match=r"away for longer than --store-timeout \(1 s\)") as caught:
            store.ask(study, suggest)
        assert time.monotonic() - start < 8
        assert "s3cret" not in str(caught.value)
        # What is tried on the way out does not wait once more.
        start = time.monotonic()
        with pytest.raises(StoreUnreachableError):
            store.adopt_orphans(study)
        assert time.monotonic() - start < 1
    assert len(told.sentences) == 1


def test_reads_that_work_do_not_prolong_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_SQLITE_TIMEOUT_S", 0.1)
    told, path = Told(), tmp_path / "studies.db"
    with StudyStore.open(f"sqlite:///{path}", patience=told.patience(timeout_s=1.0)) as store:
        study = store.create_or_resume("digits", identity={}, configuration={})
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            start = time.monotonic()
            with pytest.raises(StoreUnreachableError, match=r"away for longer than --store-timeout \(1 s\)"):
                store.ask(study, suggest)
            assert time.monotonic() - start < 6
    assert len(told.sentences) == 1


def test_write_that_waits_for_a_lock_ends(postgresql_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_LOCK_TIMEOUT_S", 1)
    told, url = Told(), postgresql_server.new_database()
    holder = sqlalchemy.create_engine(url)
    with StudyStore.open(url, patience=told.patience(timeout_s=1.0)) as store:
        study = store.create_or_resume("digits", identity={}, configuration={})
        trial, _ = store.ask(study, suggest)
        with holder.connect() as connection:
            connection.execute(sqlalchemy.text("LOCK TABLE trials IN SHARE MODE"))
            # Ends the test where it would wait for ever.
            connection.execute(sqlalchemy.text("SET LOCAL idle_in_transaction_session_timeout = '20s'"))
            start = time.monotonic()
            with pytest.raises(StoreUnreachableError, match=r"away for longer than --store-timeout \(1 s\)"):
                store.finish(trial, RESULT)
            assert time.monotonic() - start < 8
            connection.rollback()
        # The lock is gone, and the very next write succeeds.
        store.finish(trial, RESULT)
    holder.dispose()
    [begin] = told.sentences
    assert begin.startswith("Another process holds")
