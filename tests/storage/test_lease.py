from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.errors import StudyInUseError
from storage.lease import study_lease

HOLD = """
import sys
from storage.lease import study_lease
with study_lease(sys.argv[1], sys.argv[2]):
    print("held", flush=True)
    sys.stdin.readline()
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/studies.db"


def _held_by_another(start: Start, url: str, name: str) -> subprocess.Popen[str]:
    process = start(HOLD, url, name)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n", process.communicate()[1]
    return process


def test_holder_is_this_process(sqlite_url: str) -> None:
    with study_lease(sqlite_url, "digits") as holder:
        assert (holder.host, holder.pid) == (socket.gethostname(), os.getpid())
        assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(holder.started) < timedelta(minutes=1)


def test_second_is_refused_and_told_who_holds_it(sqlite_url: str, start: Start) -> None:
    process = _held_by_another(start, sqlite_url, "digits")
    with (
        pytest.raises(StudyInUseError, match=f"'digits' is driven by pid {process.pid} on host {socket.gethostname()}"),
        study_lease(sqlite_url, "digits"),
    ):
        pass


def test_second_in_the_same_process_is_refused(sqlite_url: str) -> None:
    with (
        study_lease(sqlite_url, "digits"),
        pytest.raises(StudyInUseError, match=str(os.getpid())),
        study_lease(sqlite_url, "digits"),
    ):
        pass


def test_other_spelling_of_the_file_is_the_same_lease(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        study_lease(sqlite_url, "digits"),
        pytest.raises(StudyInUseError),
        study_lease("sqlite:///studies.db", "digits"),
    ):
        pass


def test_studies_of_a_store_have_leases_of_their_own(sqlite_url: str) -> None:
    with study_lease(sqlite_url, "digits"), study_lease(sqlite_url, "cifar/../10 \U0001f600"):
        pass


def test_stores_on_a_server_have_leases_too(tmp_path: Path) -> None:
    url = "postgresql+psycopg://ada:s3cret@db.example.org/studies"
    same = "postgresql+psycopg://bob:other@db.example.org/studies"
    with study_lease(url, "digits"), pytest.raises(StudyInUseError), study_lease(same, "digits"):
        pass
    written = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert written
    assert not any("s3cret" in path.name or "s3cret" in path.read_text() for path in written)


def test_lease_can_be_taken_again(sqlite_url: str) -> None:
    for _ in range(3):
        with study_lease(sqlite_url, "digits"):
            pass


def test_killed_holder_blocks_nobody(sqlite_url: str, start: Start) -> None:
    process = _held_by_another(start, sqlite_url, "digits")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with study_lease(sqlite_url, "digits") as holder:
        assert holder.pid == os.getpid()


def test_name_that_a_killed_holder_left_is_not_told(sqlite_url: str, start: Start, tmp_path: Path) -> None:
    _held_by_another(start, sqlite_url, "digits")
    [holder_path] = (tmp_path / "studies.db.locks").glob("*.json")
    gone = start("pass")
    gone.wait()
    holder_path.write_text(json.dumps({"host": socket.gethostname(), "pid": gone.pid, "started": "2024"}))
    with pytest.raises(StudyInUseError, match="driven by another process;"), study_lease(sqlite_url, "digits"):
        pass


def test_holder_file_goes_with_the_lease(sqlite_url: str, tmp_path: Path) -> None:
    with study_lease(sqlite_url, "digits"):
        assert len(list((tmp_path / "studies.db.locks").glob("*.json"))) == 1
    assert not list((tmp_path / "studies.db.locks").glob("*.json"))
