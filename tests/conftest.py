import functools
import gc
import os
import signal
import sqlite3
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from alembic.util import pyfiles
from postgresql_cluster import Server, running_server
from s3_server import running_s3_server
from sqlalchemy import Engine, event

# Read when huggingface_hub is imported; without it, a test of missing weights waits for a network's time-outs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


# Read when torch is imported; the tests run in several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# Networks and graphs are many objects that live as long as their tests, and are searched for garbage again and again.
gc.set_threshold(20_000, 20, 20)


# A shell that starts the tests in the background lets them and their children ignore Ctrl-C, which some are about.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers():
    """One more than there are processors: a third of the time goes into waiting for processes that start and end."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session", autouse=True)
def _own_cache(request):
    """Keeps the trained digits network between runs of the tests, apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_CACHE", str(request.config.cache.mkdir("pruning-hpo")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _migrations_read_once() -> Iterator[None]:
    """Alembic executes the twenty files of Optuna's migrations anew for each store that is opened."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyfiles, "load_module_py", functools.cache(pyfiles.load_module_py))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_disks() -> Iterator[None]:
    """SQLite syncs no file, as the tests' PostgreSQL syncs none: no test is about machines that lose power."""

    def relax(connection: Any, record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            [[timeout_ms]] = connection.execute("PRAGMA busy_timeout").fetchall()
            connection.execute("PRAGMA busy_timeout = 0")
            with suppress(sqlite3.Error):  # of files that are held, or none of SQLite's
                connection.execute("PRAGMA synchronous = OFF")
            connection.execute(f"PRAGMA busy_timeout = {timeout_ms}")

    event.listen(Engine, "connect", relax)
    yield
    event.remove(Engine, "connect", relax)


@pytest.fixture(scope="session")
def data_pack() -> Path:
    """Directory of real networks and images: HPO_DATA_PACK, or shared/data beside the project."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    directory = Path(os.environ.get("HPO_DATA_PACK") or default)
    if not (directory / "weights").is_dir():
        pytest.skip(f"the data pack isn't at {directory}; set HPO_DATA_PACK to its directory")
    return directory


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Server]:
    """A server for all tests that don't stop it; each takes a database of its own."""
    with running_server() as server:
        yield server


@pytest.fixture
def new_postgresql() -> Iterator[Callable[[], Server]]:
    """Starts servers of a test's own, to be stopped and restarted."""
    with ExitStack() as started:
        yield lambda: started.enter_context(running_server())


@pytest.fixture(scope="session")
def _s3_endpoint() -> Iterator[str]:
    with running_s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3_server(_s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The endpoint of an S3 service, which the environment names with credentials that it takes."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ada")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    return _s3_endpoint


@pytest.fixture
def s3_client(s3_server: str):
    import boto3

    return boto3.session.Session().client("s3")


@pytest.fixture
def bucket(s3_client) -> str:
    """The name of an empty bucket."""
    name = f"test-{uuid.uuid4().hex}"
    s3_client.create_bucket(Bucket=name)
    return name


@pytest.fixture
def mount_disk(tmp_path):
    """Mounts a disk of a size in bytes, for what a full one does."""
    mounted = []

    def mount(size: int) -> Path:
        disk = tmp_path / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("needs `mount`")
        if done.returncode != 0:
            pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Turns a skip into a failure where its reason names something of HPO_REQUIRED (continuous integration)."""
    report = yield
    required = [name for name in os.environ.get("HPO_REQUIRED", "").split(",") if name]
    if report.skipped and not hasattr(report, "wasxfail") and any(name in str(report.longrepr) for name in required):
        report.outcome = "failed"
    return report
