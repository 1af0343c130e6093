"""Opening stores: what is missing, unreachable, foreign or half written."""

from __future__ import annotations

import importlib.util
import logging
import re
import sqlite3
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from forked_python import ForkedPython

from storage.errors import (
    StorageError,
    StoreFormatError,
    StoreNotFoundError,
    StoreReadOnlyError,
    StoreUnreachableError,
    StoreUrlError,
)
from storage.failures import one_line
from storage.store import StudyStore
from storage.trials import TrialResult

Start = Callable[..., ForkedPython]


def _refusal(url: str, **options: bool) -> StorageError:
    """The error that opening ends in: one line, and no password in anything that is printed of it."""
    with pytest.raises(StorageError) as caught:
        StudyStore.open(url, **options)
    error = caught.value
    assert "\n" not in str(error)
    link: BaseException | None = error
    while link is not None:
        assert "s3cret" not in f"{link}{link!r}"
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    assert "s3cret" not in "".join(traceback.format_exception(error))
    return error


def _files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))


def test_unknown_dialect(tmp_path: Path) -> None:
    error = _refusal("postgres://ada:s3cret@127.0.0.1/studies")
    assert isinstance(error, StoreUnreachableError)
    assert "'postgres://ada:***@127.0.0.1/studies'. Did you mean 'postgresql'?" in str(error)
    assert _files(tmp_path) == []


@pytest.mark.skipif(importlib.util.find_spec("pg8000") is not None, reason="needs a driver that is not installed")
def test_missing_driver(tmp_path: Path) -> None:
    error = _refusal("postgresql+pg8000://ada:s3cret@127.0.0.1/studies")
    assert isinstance(error, StoreUnreachableError)
    assert str(error).startswith(
        "The driver 'pg8000' of the storage URL 'postgresql+pg8000://ada:***@127.0.0.1/studies'"
    )
    assert "install it with pip" in str(error)
    assert _files(tmp_path) == []


def test_unreachable_server(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="needs the driver psycopg")
    error = _refusal("postgresql+psycopg://ada:s3cret@127.0.0.1:1/studies")
    assert isinstance(error, StoreUnreachableError)
    assert re.search(
        r"Cannot reach the store postgresql\+psycopg://ada:\*\*\*@127.0.0.1:1/studies: .*refused", str(error)
    )
    assert _files(tmp_path) == []


def test_unknown_host(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="needs the driver psycopg")
    error = _refusal("postgresql+psycopg://ada:s3cret@no-such-host.invalid/studies")
    assert isinstance(error, StoreUnreachableError)
    assert _files(tmp_path) == []


def test_wrong_password(postgresql_server: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = postgresql_server.url("postgres", password="s3cret%40wrong")
    with caplog.at_level(logging.DEBUG):
        error = _refusal(url)
    assert isinstance(error, StoreUnreachableError)
    assert "password authentication failed" in str(error)
    assert str(error).endswith("Check the user, and the password in PGPASSWORD or ~/.pgpass.")
    assert "s3cret" not in caplog.text
    assert _files(tmp_path) == []


def test_short_password_garbles_nothing(postgresql_server: Any) -> None:
    error = _refusal(postgresql_server.url("postgres", password="a"))
    assert "password authentication failed" in str(error)
    assert one_line(ValueError("no password 'a' for ada"), ["a"]) == "no password '***' for ada"
    assert one_line(ValueError("wordword"), ["word"]) == "******"


def test_missing_database(postgresql_server: Any, tmp_path: Path) -> None:
    error = _refusal(postgresql_server.url("nowhere"))
    assert isinstance(error, StoreUnreachableError)
    assert str(error).endswith('database "nowhere" does not exist. Create it first: `createdb nowhere`.')
    assert _files(tmp_path) == []


def test_password_is_nowhere_in_an_open_store(postgresql_server: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), StudyStore.open(postgresql_server.new_database()) as store:
        study = store.create_or_resume("digits", identity={}, configuration={})
        seen = f"{store!r}{vars(store)}{vars(store.rdb)}{store.rdb.engine}{vars(store.rdb.engine)}{study!r}"
        assert store.rdb.engine.url.password is None
    assert "s3cret" not in seen
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize("options", [{"read_only": True}, {"create": False}])
def test_missing_store_is_not_created_by_reading(url: str, tmp_path: Path, options: dict[str, bool]) -> None:
    error = _refusal(url, **options)
    assert isinstance(error, StoreNotFoundError)
    assert "start one with `hpo launch`" in str(error)
    assert _files(tmp_path) == []


def test_empty_file_is_no_store_to_read(tmp_path: Path) -> None:
    (tmp_path / "studies.db").touch()
    assert isinstance(_refusal(f"sqlite:///{tmp_path}/studies.db", read_only=True), StoreNotFoundError)


def test_directories_are_created(tmp_path: Path) -> None:
    with StudyStore.open(f"sqlite:///{tmp_path}/a/b/studies.db") as store:
        assert store.summaries() == []


@pytest.mark.parametrize("name", ["with space.db", "{brace}%20?.db", "größe#1.db", "a:b@c.db", "it's.db"])
def test_any_file_name_will_do(name: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/{name.replace('%', '%25').replace('?', '%3F')}"
    with StudyStore.open(url) as store:
        store.create_or_resume("digits", identity={}, configuration={})
    with StudyStore.open(url, read_only=True) as store:
        assert store.exists("digits")


def test_directory_is_refused(tmp_path: Path) -> None:
    assert isinstance(_refusal(f"sqlite:///{tmp_path}"), StoreUrlError)
    assert _files(tmp_path) == []


def test_file_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = _refusal(f"sqlite:///{tmp_path}/file/studies.db")
    assert isinstance(error, StoreUnreachableError)
    assert _files(tmp_path) == [tmp_path / "file"]


def test_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"not a database" * 100)
    for options in ({}, {"read_only": True}):
        assert isinstance(_refusal(f"sqlite:///{path}", **options), StoreFormatError)
    assert path.read_bytes() == b"not a database" * 100
    assert _files(tmp_path) == [path]


@pytest.mark.parametrize("read_only", [False, True])
def test_store_of_another_version_is_refused(url: str, read_only: bool) -> None:
    with StudyStore.open(url) as store, store.rdb.engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE alembic_version SET version_num = 'v99.0.0.a'"))
    error = _refusal(url, read_only=read_only)
    assert isinstance(error, StoreFormatError)
    assert "another version" in str(error)


def test_store_that_was_opened_before_needs_no_lock(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    with StudyStore.open(url):
        pass
    for path in (tmp_path / "studies.db.locks").iterdir():
        path.unlink()
    with StudyStore.open(url), StudyStore.open(url, read_only=True):
        assert list((tmp_path / "studies.db.locks").iterdir()) == []


HALF_A_WRITE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("PRAGMA cache_size = 1")
connection.execute("UPDATE trial_user_attributes SET value_json = '\\"half\\"'")
print("half", flush=True)
sys.stdin.readline()
"""


def test_reader_sees_the_state_before_an_interrupted_write(tmp_path: Path, start: Start) -> None:
    url, path = f"sqlite:///{tmp_path}/studies.db", tmp_path / "studies.db"
    with StudyStore.open(url) as store:
        study = store.create_or_resume("digits", identity={}, configuration={})
        for _ in range(50):
            store.finish(study.ask(), TrialResult(value=0.5, curve={}, attributes={"text": "x" * 2000}))
    process = start(HALF_A_WRITE, str(path))
    assert process.stdout.readline() == "half\n", process.communicate()[1]
    process.kill()
    process.wait()
    assert path.with_name("studies.db-journal").stat().st_size > 0
    assert b'"half"' in path.read_bytes()
    with StudyStore.open(url, read_only=True) as store:
        assert {trial.user_attrs["text"] for trial in store.load("digits").trials} == {"x" * 2000}


def test_locked_file_is_waited_for(tmp_path: Path, start: Start) -> None:
    url, path = f"sqlite:///{tmp_path}/studies.db", tmp_path / "studies.db"
    with StudyStore.open(url) as store:
        store.create_or_resume("digits", identity={}, configuration={})
        process = start(
            "import sqlite3, sys, time\n"
            "connection = sqlite3.connect(sys.argv[1])\n"
            "connection.execute('BEGIN EXCLUSIVE')\n"
            "print('locked', flush=True)\n"
            "time.sleep(6)\n",
            str(path),
        )
        assert process.stdout.readline() == "locked\n"
        # SQLite's own default is 5 s.
        store.load("digits").set_user_attr("waited", True)


def test_write_protected_file_is_read(tmp_path: Path) -> None:
    url, path = f"sqlite:///{tmp_path}/studies.db", tmp_path / "studies.db"
    with StudyStore.open(url) as store:
        store.create_or_resume("digits", identity={}, configuration={})
    path.chmod(0o444)
    with StudyStore.open(url, read_only=True) as store:
        assert store.exists("digits")


def test_connection_that_was_dropped_is_replaced(postgresql_server: Any) -> None:
    url = postgresql_server.new_database()
    with StudyStore.open(url) as store, StudyStore.open(url) as other:
        study = store.create_or_resume("digits", identity={}, configuration={})
        drop = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> "
        with other.rdb.engine.begin() as connection:
            connection.execute(sqlalchemy.text(f"{drop} pg_backend_pid()"))
        store.finish(study.ask(), TrialResult(value=0.5, curve={}))
        assert study.best_value == 0.5


def test_read_only_role_reads(postgresql_server: Any) -> None:
    with StudyStore.open(postgresql_server.new_database()) as store:
        store.create_or_resume("digits", identity={}, configuration={})
        name = store.url_masked.rpartition("/")[2]
        with store.rdb.engine.begin() as connection:
            role = f"reader_{name}"[:60]
            connection.execute(sqlalchemy.text(f"CREATE ROLE {role} LOGIN PASSWORD 's3cret'"))
            connection.execute(sqlalchemy.text(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}"))
    port = postgresql_server.port
    url = f"postgresql+psycopg://{role}:s3cret@127.0.0.1:{port}/{name}"
    with StudyStore.open(url) as reader:
        study = reader.load("digits")
        with pytest.raises(StoreReadOnlyError, match="permission denied"):
            study.set_user_attr("a", 1)


def test_sqlite_keeps_its_default_journal(tmp_path: Path) -> None:
    with StudyStore.open(f"sqlite:///{tmp_path}/studies.db") as store:
        store.create_or_resume("digits", identity={}, configuration={})
    connection = sqlite3.connect(tmp_path / "studies.db")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()
