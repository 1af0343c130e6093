"""The role that may only read, on a real server."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from forked_python import ForkedPython

from storage.engine import prepare
from storage.errors import RoleError, StoreNotFoundError, StoreReadOnlyError
from storage.health import check
from storage.roles import create_reader
from storage.store import StudyStore
from storage.trials import TrialResult

Start = Callable[..., ForkedPython]
PASSWORD = "d'a@sh%b/ö rd"


@pytest.fixture
def url(postgresql_server: Any) -> str:
    url: str = postgresql_server.new_database()
    prepare(url)
    return url


@pytest.fixture
def role(url: str) -> Iterator[str]:
    """A name that no role has; the role is dropped at the end."""
    name = f"Reader of {url.rpartition('_')[2]}"
    yield name
    with psycopg.connect(_address(url), autocommit=True) as connection:
        if connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [name]).fetchone():
            connection.execute(f'DROP OWNED BY "{name}"')
            connection.execute(f'DROP ROLE "{name}"')


def _address(url: str) -> str:
    return url.replace("postgresql+psycopg", "postgresql")


def reader_url(url: str, role: str, password: str = PASSWORD) -> str:
    return f"postgresql+psycopg://{quote(role)}:{quote(password, safe='')}@{url.partition('@')[2]}"


def test_reader_reads_everything(url: str, role: str) -> None:
    assert create_reader(url, role, PASSWORD)
    with StudyStore.open(url) as store, store.lease("digits"):
        study = store.create_or_resume("digits", identity={"seed": 0}, configuration={})
        store.add_artifact(study, "best.png", b"png")
        store.finish(study.ask(), TrialResult(0.6, {0: 0.98}))
        with StudyStore.open(reader_url(url, role), read_only=True) as reader:
            assert reader.load("digits").best_value == 0.6
            assert reader.lease_holder("digits") == store.lease_holder("digits") is not None
        health = check(reader_url(url, role))
        assert (health.user, health.may_write, health.problems) == (role, False, ())


WRITES = [
    "INSERT INTO studies (study_name) VALUES ('mine')",
    "UPDATE trials SET state = 'FAIL'",
    "DELETE FROM trials",
    "TRUNCATE trials CASCADE",
    "DROP TABLE trials",
    "ALTER TABLE trials ADD COLUMN mine int",
    "CREATE TABLE mine (id int)",
    "CREATE TEMPORARY TABLE mine (id int)",
    "CREATE SCHEMA mine",
    "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE ROLE mine",
    "CREATE DATABASE mine",
    "UPDATE hpo_lease SET token = 'mine'",
    "INSERT INTO hpo_measurement VALUES ('mine', '', '', 0, '', 0, 0, now())",
    "SELECT nextval('studies_study_id_seq')",
    "SELECT study_id FROM studies FOR UPDATE",
    "COPY trials TO '/dev/null'",
]


@pytest.mark.parametrize("write", WRITES)
def test_database_refuses_the_readers_writes(url: str, role: str, write: str) -> None:
    create_reader(url, role, PASSWORD)
    with psycopg.connect(_address(reader_url(url, role)), autocommit=True) as connection:
        assert connection.execute("SHOW default_transaction_read_only").fetchone() == ("on",)
        connection.execute("SET default_transaction_read_only = off")  # which anybody may
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(write)


def test_store_refuses_the_readers_writes(url: str, role: str) -> None:
    create_reader(url, role, PASSWORD)
    with StudyStore.open(reader_url(url, role)) as reader, pytest.raises(StoreReadOnlyError):
        reader.create_or_resume("digits", identity={}, configuration={})


def test_tables_to_come_are_read_too(url: str, role: str) -> None:
    create_reader(url, role, PASSWORD)
    with psycopg.connect(_address(url)) as connection:
        connection.execute("CREATE TABLE later AS SELECT 7 AS n")
    with psycopg.connect(_address(reader_url(url, role))) as connection:
        assert connection.execute("SELECT n FROM later").fetchone() == (7,)


def test_password_is_changed_and_excess_rights_are_taken(url: str, role: str) -> None:
    assert create_reader(url, role, "former")
    with psycopg.connect(_address(url)) as connection:
        connection.execute(f'GRANT ALL ON ALL TABLES IN SCHEMA public TO "{role}"')
        connection.execute(f'GRANT CREATE ON SCHEMA public TO "{role}"')
        connection.execute(f'GRANT TEMPORARY, CREATE ON DATABASE {connection.info.dbname} TO "{role}"')
    assert not create_reader(url, role, PASSWORD)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(_address(reader_url(url, role, "former")))
    with psycopg.connect(_address(reader_url(url, role)), autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")
        for write in WRITES:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(write)


def test_password_never_leaves_the_process(new_postgresql: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> None:
    server = new_postgresql()
    url = server.new_database()
    prepare(url)
    with psycopg.connect(_address(url), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET log_statement = 'all'")
        connection.execute("SELECT pg_reload_conf()")
    with caplog.at_level(logging.DEBUG):
        create_reader(url, "dashboard", "Plain-0-Text")
    with psycopg.connect(_address(url)) as connection:
        row = connection.execute("SELECT rolpassword FROM pg_authid WHERE rolname = 'dashboard'").fetchone()
    assert row is not None
    assert row[0].startswith("SCRAM-SHA-256$4096:")
    assert 'CREATE ROLE "dashboard"' in server.log
    for text in (server.log, caplog.text, repr(caplog.records)):
        assert "Plain-0-Text" not in text


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        ("SUPERUSER", "is a superuser"),
        ("CREATEROLE", "may create roles"),
        ("CREATEDB", "may create databases"),
        ("REPLICATION", "may replicate"),
        ("BYPASSRLS", "passes row security by"),
        ("IN ROLE pg_write_all_data", "is a member of another role"),
    ],
)
def test_role_that_may_more_is_left_as_it_is(url: str, role: str, attribute: str, reason: str) -> None:
    with psycopg.connect(_address(url)) as connection:
        connection.execute(f"CREATE ROLE \"{role}\" LOGIN {attribute} PASSWORD 'former'")
    with pytest.raises(RoleError, match=f"is there already and {reason}; choose another name"):
        create_reader(url, role, PASSWORD)
    with psycopg.connect(_address(reader_url(url, role, "former"))):
        pass


def test_owner_cannot_become_the_reader(url: str) -> None:
    with pytest.raises(RoleError, match="The role 'owner' is there already and is a superuser"):
        create_reader(url, "owner", PASSWORD)


@pytest.mark.parametrize("read_only", ["on", "off"])
def test_user_without_the_right_is_told(url: str, role: str, read_only: str) -> None:
    create_reader(url, role, PASSWORD)
    with psycopg.connect(_address(url)) as connection:
        connection.execute(f'ALTER ROLE "{role}" SET default_transaction_read_only = {read_only}')
    with pytest.raises(RoleError, match="do it as the owner, with the right to create roles") as caught:
        create_reader(reader_url(url, role), "another", PASSWORD)
    assert "\n" not in str(caught.value)
    assert quote(PASSWORD, safe="") not in str(caught.value)


def test_rights_of_everybody_that_cannot_be_revoked_are_named(url: str, role: str) -> None:
    with psycopg.connect(_address(url), autocommit=True) as connection:
        connection.execute("GRANT INSERT ON trials TO PUBLIC")
    with pytest.raises(RoleError, match=r"could write to table trials on .*, because everybody may"):
        create_reader(url, role, PASSWORD)
    with psycopg.connect(_address(url)) as connection:
        assert connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [role]).fetchone() is None


@pytest.mark.parametrize("name", ["", "x" * 64, "ä" * 32, "pg_reader", "a\nb"])
def test_impossible_name_is_refused(url: str, name: str) -> None:
    with pytest.raises(RoleError, match="A role's name is 1 to 63 printable bytes"):
        create_reader(url, name, PASSWORD)


@pytest.mark.parametrize("name", ["none", "public"])
def test_name_of_postgresqls_own_is_refused(url: str, name: str) -> None:
    with pytest.raises(RoleError, match="PostgreSQL keeps the name"):
        create_reader(url, name, PASSWORD)


def test_role_needs_a_password(url: str, role: str) -> None:
    with pytest.raises(RoleError, match="has no password"):
        create_reader(url, role, "")


def test_role_is_for_postgresql(tmp_path: Any) -> None:
    with pytest.raises(RoleError, match="is for PostgreSQL, and the store is sqlite:///"):
        create_reader(f"sqlite:///{tmp_path}/studies.db", "reader", PASSWORD)
    assert list(tmp_path.iterdir()) == []


def test_tables_come_first(postgresql_server: Any) -> None:
    with pytest.raises(StoreNotFoundError):
        create_reader(postgresql_server.new_database(), "reader", PASSWORD)


def test_databases_of_a_server_set_up_the_role_at_once(postgresql_server: Any, url: str, role: str) -> None:
    urls = [url, postgresql_server.new_database()]
    prepare(urls[1])
    with ThreadPoolExecutor() as threads:
        for _ in range(10):
            assert sum(threads.map(partial(create_reader, role=role, password=PASSWORD), urls)) <= 1
    with psycopg.connect(_address(urls[1])) as connection:
        connection.execute(f'DROP OWNED BY "{role}"')


def test_ten_processes_set_up_the_role_at_once(url: str, role: str, start: Start) -> None:
    code = """
import sys
from storage.roles import create_reader
print("ready", flush=True)
sys.stdin.readline()
print(create_reader(*sys.argv[1:4]))
"""
    processes = [start(code, url, role, PASSWORD) for _ in range(10)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 10, answers
    assert sorted(output for output, _ in answers) == [*["False\n"] * 9, "True\n"]
    with psycopg.connect(_address(reader_url(url, role))) as connection:
        assert connection.execute("SELECT count(*) FROM studies").fetchone() == (0,)
