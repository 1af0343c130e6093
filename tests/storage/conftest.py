"""Stores on every backend: SQLite, and a real PostgreSQL server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked_python import ForkedPython
from postgresql_cluster import Server

from storage.store import StudyStore


@pytest.fixture(autouse=True)
def _own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's stores out of the tests."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("HPO_STORAGE", raising=False)
    monkeypatch.delenv("HPO_ARTIFACTS", raising=False)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store on each backend."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'studies.db'}"
    server: Server = request.getfixturevalue("postgresql_server")
    return server.new_database()


@pytest.fixture
def store(url: str) -> Iterator[StudyStore]:
    with StudyStore.open(url) as opened:
        yield opened


STRICT = 'import warnings; warnings.simplefilter("error")\n'


@pytest.fixture
def start() -> Iterator[Callable[..., ForkedPython]]:
    """Start Python on a piece of code in a process of its own, killed at the end of the test."""
    started: list[ForkedPython] = []

    def start_python(code: str, *arguments: str, **environment: str) -> ForkedPython:
        started.append(ForkedPython(f"{STRICT}{code}", arguments, {**os.environ, **environment}))
        return started[-1]

    yield start_python
    for process in started:
        process.kill()
        process.communicate()
