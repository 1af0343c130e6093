"""The store's own tables: created once however many ask, upgraded, and refused where they are newer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from forked_python import ForkedPython
from optuna.storages import RDBStorage

from storage.errors import StoreFormatError
from storage.schema import TABLES, VERSION, store_id, stored_version, upgrade
from storage.store import StudyStore

OPEN = """
import sys
import time
from pathlib import Path
from storage.engine import prepare
from storage.store import StudyStore
url, go, prepares, way = sys.argv[1:]
print("ready", flush=True)
while not Path(go).exists():
    time.sleep(0.001)
if prepares == "True":
    prepare(url)
with StudyStore.open(url) as store, store.lease(f"study {way}"):
    print(len(store.summaries()))
"""


def tables(url: str) -> set[str]:
    with StudyStore.open(url, read_only=True) as store:
        return set(sqlalchemy.inspect(store.rdb.engine).get_table_names())


@pytest.fixture
def former_url(url: str) -> str:
    """A store of an earlier release, which had Optuna's tables only, with a study."""
    storage = RDBStorage(url)
    optuna.create_study(study_name="digits", storage=storage, direction="maximize")
    storage.remove_session()
    storage.engine.dispose()
    return url


def test_ten_that_create_a_store_at_once_all_succeed(
    url: str, tmp_path: Path, start: Callable[..., ForkedPython]
) -> None:
    go = tmp_path / "go"
    processes = [start(OPEN, url, str(go), str(n % 2 == 0), str(n)) for n in range(10)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    go.touch()
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output) == (0, "0\n"), errors
    with StudyStore.open(url) as store, store.rdb.engine.connect() as connection:
        assert stored_version(connection) == VERSION


def test_new_store_has_both_kinds_of_tables(store: StudyStore, url: str) -> None:
    assert tables(url) > {"trials", "alembic_version", *TABLES.tables}


def test_former_store_is_upgraded_when_it_is_written_to(former_url: str) -> None:
    before = tables(former_url)
    assert not before & set(TABLES.tables)
    with StudyStore.open(former_url, create=False) as store, store.lease("digits"):
        assert store.exists("digits")
    assert tables(former_url) == before | set(TABLES.tables)


def test_identity_stays(former_url: str) -> None:
    found = set()
    for _ in range(2):
        with StudyStore.open(former_url) as store, store.rdb.engine.begin() as connection:
            found.add(store_id(connection))
            upgrade(connection)
    [identity] = found
    assert identity is not None
    assert len(identity) == 32


def test_former_store_is_read_as_it_is(former_url: str) -> None:
    before = tables(former_url)
    with StudyStore.open(former_url, read_only=True) as store:
        assert store.load("digits").trials == []
        assert store.lease_holder("digits") is None
    assert tables(former_url) == before


@pytest.mark.parametrize("options", [{}, {"create": False}, {"read_only": True}])
def test_newer_store_is_refused(url: str, options: dict[str, Any]) -> None:
    with StudyStore.open(url) as store, store.rdb.engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"UPDATE hpo_schema SET version = {VERSION + 1}"))
    with pytest.raises(StoreFormatError) as caught:
        StudyStore.open(url, **options)
    assert f"has tables of version {VERSION + 1}, and this release knows {VERSION}; update it with" in str(caught.value)
