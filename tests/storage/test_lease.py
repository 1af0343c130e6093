from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from commit_proxy import CommitProxy
from forked_python import ForkedPython
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler
from optuna.study import Study
from postgresql_cluster import Server

from storage.errors import LeaseLostError, StudyInUseError
from storage.lease import file_lease
from storage.patience import Patience
from storage.schema import LEASES
from storage.store import StudyStore
from storage.trials import TrialResult
from storage.urls import lock_directory

HOLD = """
import sys
from storage.store import StudyStore
with StudyStore.open(sys.argv[1]) as store, store.lease(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.readline()
"""
RESULT = TrialResult(value=0.5, curve={0: 0.9})
Start = Callable[..., ForkedPython]


def _held_by_another(start: Start, url: str, name: str) -> ForkedPython:
    process = start(HOLD, url, name)
    assert process.stdout.readline() == "held\n", process.communicate()[1]
    return process


def create(store: StudyStore, name: str = "digits") -> Study:
    return store.create_or_resume(name, identity={}, configuration={}, sampler=RandomSampler(0))


# On every backend


def test_holder_is_this_process(store: StudyStore) -> None:
    with store.lease("digits") as holder:
        assert (holder.host, holder.pid) == (socket.gethostname(), os.getpid())
        assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(holder.started) < timedelta(minutes=1)
        assert store.lease_holder("digits") == holder


def test_second_is_refused_and_told_who_holds_it(store: StudyStore, url: str, start: Start) -> None:
    process = _held_by_another(start, url, "digits")
    with (
        pytest.raises(StudyInUseError, match=f"'digits' is driven by pid {process.pid} on host {socket.gethostname()}"),
        store.lease("digits"),
    ):
        pass
    holder = store.lease_holder("digits")
    assert holder is not None
    assert holder.pid == process.pid


def test_second_in_the_same_process_is_refused(store: StudyStore, url: str) -> None:
    with store.lease("digits"), StudyStore.open(url) as other:
        for each in (store, other):
            with pytest.raises(StudyInUseError, match=str(os.getpid())), each.lease("digits"):
                pass


def test_of_many_that_ask_at_once_one_gets_it(url: str) -> None:
    start, done = threading.Barrier(5), threading.Barrier(5)
    outcomes: list[object] = []

    def take() -> None:
        with StudyStore.open(url) as store:
            start.wait()
            try:
                with store.lease("digits") as holder:
                    outcomes.append(holder)
                    done.wait()
            except StudyInUseError as error:
                outcomes.append(error)
                done.wait()

    threads = [threading.Thread(target=take) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [holder] = [outcome for outcome in outcomes if not isinstance(outcome, StudyInUseError)]
    assert [outcome.holder for outcome in outcomes if isinstance(outcome, StudyInUseError)] == [holder] * 4


def test_studies_of_a_store_have_leases_of_their_own(store: StudyStore) -> None:
    with store.lease("digits"), store.lease("cifar/../10 \U0001f600"):
        create(store)


def test_lease_can_be_taken_again(store: StudyStore) -> None:
    for _ in range(3):
        with store.lease("digits"):
            create(store)
        assert store.lease_holder("digits") is None


def test_nobody_holds_what_nobody_took(store: StudyStore, url: str) -> None:
    assert store.lease_holder("digits") is None
    with StudyStore.open(url, read_only=True) as reader:
        assert reader.lease_holder("digits") is None


def test_reader_sees_the_holder(store: StudyStore, url: str) -> None:
    with store.lease("digits") as holder, StudyStore.open(url, read_only=True) as reader:
        assert reader.lease_holder("digits") == holder


def test_killed_holder_blocks_nobody(store: StudyStore, url: str, start: Start) -> None:
    process = _held_by_another(start, url, "digits")
    process.send_signal(signal.SIGKILL)
    process.wait()
    # A server takes a moment to notice.
    deadline = time.monotonic() + 10
    while store.lease_holder("digits") is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    with store.lease("digits") as holder:
        assert holder.pid == os.getpid()
        create(store)


def test_stopped_holder_keeps_it(store: StudyStore, url: str, start: Start) -> None:
    process = _held_by_another(start, url, "digits")
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(StudyInUseError, match=f"pid {process.pid} "), store.lease("digits"):
            pass
    finally:
        process.send_signal(signal.SIGCONT)


def test_who_holds_no_lease_writes_all_the_same(store: StudyStore, url: str) -> None:
    with StudyStore.open(url) as other, store.lease("digits"):
        create(other, "another")


# By a file lock


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/studies.db"


def test_other_spelling_of_the_file_is_the_same_lease(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        StudyStore.open(sqlite_url) as store,
        StudyStore.open("sqlite:///studies.db") as other,
        store.lease("digits"),
        pytest.raises(StudyInUseError),
        other.lease("digits"),
    ):
        pass


def test_lock_files_of_a_server_tell_no_password(tmp_path: Path) -> None:
    directory = lock_directory("mysql+pymysql://ada:s3cret@db.example.org/studies")
    same = lock_directory("mysql+pymysql://bob:other@db.example.org/studies")
    with file_lease(directory, "digits"), pytest.raises(StudyInUseError), file_lease(same, "digits"):
        pass
    written = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert written
    assert not any("s3cret" in path.name or "s3cret" in path.read_text() for path in written)


def test_name_that_a_killed_holder_left_is_not_told(sqlite_url: str, start: Start, tmp_path: Path) -> None:
    _held_by_another(start, sqlite_url, "digits")
    [holder_path] = (tmp_path / "studies.db.locks").glob("*.json")
    gone = start("pass")
    gone.wait()
    holder_path.write_text(json.dumps({"host": socket.gethostname(), "pid": gone.pid, "started": "2024"}))
    with (
        StudyStore.open(sqlite_url) as store,
        pytest.raises(StudyInUseError, match="driven by another process;"),
        store.lease("digits"),
    ):
        pass


def test_name_that_is_left_holds_nothing(sqlite_url: str, tmp_path: Path) -> None:
    with StudyStore.open(sqlite_url) as store:
        with store.lease("digits"):
            [holder_path] = (tmp_path / "studies.db.locks").glob("*.json")
            named = holder_path.read_text()
        assert not holder_path.exists()
        # This process lives, and holds nothing any more.
        holder_path.write_text(named)
        assert store.lease_holder("digits") is None


# By an advisory lock


@pytest.fixture
def leased(postgresql_server: Server) -> Iterator[tuple[StudyStore, str]]:
    """A store on a server that holds the lease of `digits`, and its URL."""
    url = postgresql_server.new_database()
    with StudyStore.open(url, patience=Patience(30)) as store, store.lease("digits"):
        yield store, url


def end_lease_connection(url: str) -> None:
    """End the server's process that has the lock, as the administrator or a timeout of the network may."""
    with StudyStore.open(url) as other, other.rdb.engine.connect() as connection:
        backend = connection.scalar(sqlalchemy.select(LEASES.c.backend))
        assert connection.scalar(sqlalchemy.select(sqlalchemy.func.pg_terminate_backend(backend)))


def rows(store: StudyStore) -> dict[str, list[str]]:
    """Everything in the database but the lease."""
    metadata = sqlalchemy.MetaData()
    metadata.reflect(store.rdb.engine)
    with store.rdb.engine.connect() as connection:
        return {
            table.name: sorted(map(repr, connection.execute(sqlalchemy.select(table))))
            for table in metadata.sorted_tables
            if table.name != LEASES.name
        }


def test_server_knows_the_lease_and_no_file_does(leased: tuple[StudyStore, str], tmp_path: Path) -> None:
    assert not list((tmp_path / "data").rglob("*.lock"))


def test_lost_lease_is_taken_again_before_the_next_write(leased: tuple[StudyStore, str]) -> None:
    store, url = leased
    before = store.lease_holder("digits")
    end_lease_connection(url)
    study = create(store)
    assert store.lease_holder("digits") == before
    with StudyStore.open(url) as other, pytest.raises(StudyInUseError), other.lease("digits"):
        pass
    store.finish(study.ask(), RESULT)


def test_lease_is_taken_again_after_a_restart(new_postgresql: Callable[[], Server]) -> None:
    server = new_postgresql()
    url = server.new_database()
    with StudyStore.open(url, patience=Patience(60)) as store, store.lease("digits") as holder:
        study = create(store)
        server.restart()
        trial, _ = store.ask(study, lambda trial: None)
        store.finish(trial, RESULT)
        assert store.lease_holder("digits") == holder


def test_own_connection_that_the_server_takes_for_alive_is_no_obstacle(postgresql_server: Server) -> None:
    url = postgresql_server.new_database()
    with CommitProxy(postgresql_server.port) as proxy:
        by_proxy = url.replace(f":{postgresql_server.port}/", f":{proxy.port}/")
        with StudyStore.open(by_proxy, patience=Patience(30)) as store, store.lease("digits") as holder:
            study = create(store)
            proxy.cut()
            trial, _ = store.ask(study, lambda trial: None)
            store.finish(trial, RESULT)
            assert store.lease_holder("digits") == holder


def writes(store: StudyStore, study: Study) -> dict[str, Callable[[], Any]]:
    """Writes of every kind, the store's and Optuna's own."""
    trial, other, third = study.ask(), study.ask(), study.ask()
    return {
        "finish": lambda: store.finish(trial, RESULT),
        "fail": lambda: store.fail(trial, "reason"),
        "release": lambda: store.release(other),
        "adopt": lambda: store.adopt_orphans(study),
        "ask": lambda: store.ask(study, lambda trial: trial.suggest_float("x", 0, 1)),
        "attribute": lambda: store.set_attribute(study, "a", 1),
        "artifact": lambda: store.add_artifact(study, "a.png", b""),
        "create": lambda: create(store, "another"),
        "optuna_ask": lambda: study.ask({"x": FloatDistribution(0, 1)}),
        "optuna_attribute": lambda: study.set_user_attr("a", 1),
        "optuna_parameter": lambda: third.suggest_float("x", 0, 1),
        "optuna_report": lambda: trial.report(0.5, 1),
        "optuna_tell": lambda: study.tell(trial, 0.5),
    }


def test_study_that_was_taken_over_is_not_written_to(leased: tuple[StudyStore, str]) -> None:
    store, url = leased
    study = create(store)
    attempts = writes(store, study)
    end_lease_connection(url)
    with StudyStore.open(url) as other, other.lease("digits") as holder:
        before = rows(other)
        for name, write in attempts.items():
            with pytest.raises(LeaseLostError) as caught:
                write()
            told = f"Study 'digits' has been taken over by pid {holder.pid} on host {holder.host} since"
            assert str(caught.value).startswith(told), name
            assert rows(other) == before, name
        # The one that has it writes.
        other.adopt_orphans(other.load("digits"))
    # Also when it is free again: who has had it may have changed everything.
    with pytest.raises(LeaseLostError):
        store.set_attribute(study, "a", 1)


def test_fence_holds_where_the_lock_seems_held(leased: tuple[StudyStore, str]) -> None:
    store, url = leased
    study = create(store)
    attempts = writes(store, study)
    with StudyStore.open(url) as other:
        with other.rdb.engine.begin() as connection:
            connection.execute(sqlalchemy.update(LEASES).values(token="another's", host="elsewhere"))
        before = rows(other)
        for name, write in attempts.items():
            with pytest.raises(LeaseLostError, match=r"taken over by pid \d+ on host elsewhere"):
                write()
            assert rows(other) == before, name


def wait_until_one_waits_for_a_lock(url: str) -> None:
    waiting = sqlalchemy.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    deadline = time.monotonic() + 30
    with StudyStore.open(url) as observer:
        while True:
            with observer.rdb.engine.connect() as connection:  # a transaction sees one state of that view
                if connection.scalar(waiting):
                    return
            assert time.monotonic() < deadline, "nobody waits for a lock"
            time.sleep(0.05)


def test_who_takes_over_waits_for_the_write_that_is_under_way(leased: tuple[StudyStore, str]) -> None:
    store, url = leased
    create(store)
    taken = threading.Event()

    def take() -> None:
        with StudyStore.open(url) as other, other.lease("digits"):
            taken.set()

    taking = threading.Thread(target=take)
    with store.rdb.engine.begin() as connection:
        study = sqlalchemy.table("studies", sqlalchemy.column("study_name"))
        connection.execute(sqlalchemy.update(study).values(study_name="digits"))
        end_lease_connection(url)
        taking.start()
        wait_until_one_waits_for_a_lock(url)
        assert not taken.is_set()
    taking.join()
    assert taken.is_set()


def test_lease_connection_dies_with_its_machine(leased: tuple[StudyStore, str]) -> None:
    store, _ = leased
    with store.rdb.engine.connect() as connection:
        shown = {
            name: connection.exec_driver_sql(f"SHOW {name}").scalar()
            for name in ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count")
        }
        raw: Any = connection.connection.dbapi_connection
        asked = re.findall(r"(keepalives\w*)=(\d+)", raw.info.dsn)
    assert shown == {"tcp_keepalives_idle": "30", "tcp_keepalives_interval": "10", "tcp_keepalives_count": "3"}
    assert dict(asked) == {
        "keepalives": "1",
        "keepalives_idle": "30",
        "keepalives_interval": "10",
        "keepalives_count": "3",
    }
