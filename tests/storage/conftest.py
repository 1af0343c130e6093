"""Stores on every backend: SQLite, and a real PostgreSQL server where its programs are on PATH."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from storage.store import StudyStore

PASSWORD = "s3cret%word"
PASSWORD_IN_URL = "s3cret%25word"


@pytest.fixture(autouse=True)
def _own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's stores out of the tests."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("HPO_STORAGE", raising=False)
    monkeypatch.delenv("HPO_ARTIFACTS", raising=False)


@dataclass(frozen=True)
class Server:
    """A PostgreSQL server on 127.0.0.1."""

    port: int
    user: str = "owner"

    def url(self, database: str, password: str = PASSWORD_IN_URL) -> str:
        return f"postgresql+psycopg://{self.user}:{password}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Create an empty database and return its URL."""
        import psycopg

        name = f"test_{uuid.uuid4().hex}"
        address = f"host=127.0.0.1 port={self.port} user={self.user} dbname=postgres"
        with psycopg.connect(address, password=PASSWORD, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Server]:
    """A private cluster, whose clock is deliberately not in UTC."""
    missing = [program for program in ("initdb", "pg_ctl", "postgres") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs PostgreSQL's {', '.join(missing)} on PATH")
    pytest.importorskip("psycopg", reason="needs the driver psycopg")
    # As root, the server runs as `postgres`, which may not enter pytest's own directory.
    directory = Path(tempfile.mkdtemp(prefix="postgresql-"))
    command: list[str] = []
    if os.getuid() == 0:
        command = ["runuser", "-u", "postgres", "--"]
        shutil.chown(directory, "postgres", "postgres")
    password_file = directory / "password"
    password_file.write_text(PASSWORD)
    password_file.chmod(0o644)
    port = free_port()

    def run(*arguments: str) -> None:
        done = subprocess.run([*command, *arguments], cwd=directory, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    data = str(directory / "data")
    options = (
        f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={directory} -c fsync=off "
        "-c timezone=Asia/Tokyo"
    )
    try:
        run("initdb", "-D", data, "-U", Server.user, "--auth=scram-sha-256", f"--pwfile={password_file}", "--no-sync")
        # Its log goes to a file: a pipe would stay open as long as the server runs.
        run("pg_ctl", "-D", data, "-w", "-l", str(directory / "log"), "-o", options, "start")
        try:
            yield Server(port)
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


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


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Python on a piece of code in a process of its own, killed at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def start_python(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start_python
    for process in started:
        process.kill()
        process.communicate()
