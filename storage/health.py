"""Health of a store: what a glance at its database, its studies and its artifacts shows."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState
from sqlalchemy import func, select, text

from storage.artifact_files import is_claimed
from storage.artifacts import recorded_ids
from storage.errors import StorageError
from storage.measurements import Volume, volume
from storage.schema import Versions, newest_versions, store_id, stored_versions
from storage.store import StudyStore
from storage.urls import parse_url, sqlite_path

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from storage.lease import LeaseHolder

__all__ = ["ArtifactHealth", "StoreHealth", "StudyHealth", "check"]

_N_PINGS = 5


@dataclass(frozen=True, slots=True)
class StudyHealth:
    """How a study is.

    Attributes:
        name: Its name.
        holder: Who drives it, or None.
        n_trials: Number of trials by state, of every state that occurs.
    """

    name: str
    holder: LeaseHolder | None
    n_trials: Mapping[TrialState, int]

    @property
    def n_orphans(self) -> int:
        """Number of trials that are RUNNING though nobody drives the study."""
        return 0 if self.holder is not None else self.n_trials.get(TrialState.RUNNING, 0)


@dataclass(frozen=True, slots=True)
class ArtifactHealth:
    """How the files of artifacts are.

    Attributes:
        location: Where they are.
        n_files: How many are there; 0 where they cannot be listed.
        n_bytes: Their size.
        missing: Ids that studies and trials refer to, of which the files are not there, sorted.
        failure: Why files cannot be listed or, by who may write to the store, written; None where they can.
    """

    location: str
    n_files: int
    n_bytes: int
    missing: tuple[str, ...]
    failure: str | None


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """How a store is.

    Attributes:
        url_masked: Where it is, with passwords as `***`.
        server: The database's product and version.
        versions: Of its tables.
        newest: Of the tables of this release.
        latency_s: Median time of a query that does nothing.
        time_zone: The zone that the database shows times in by default; the store's own connections use UTC.
        user: Who asks, where the database has users.
        may_write: Whether they may write results.
        studies: In the order of their creation.
        artifacts: The files.
        measurements: What is kept for other trials and studies.
    """

    url_masked: str
    server: str
    versions: Versions
    newest: Versions
    latency_s: float
    time_zone: str | None
    user: str | None
    may_write: bool
    studies: tuple[StudyHealth, ...]
    artifacts: ArtifactHealth
    measurements: Volume

    @property
    def problems(self) -> tuple[str, ...]:
        """What is to be done something about, a sentence each with what."""
        found = []
        if self.versions != self.newest:
            found.append(f"The tables are {self.versions}, not {self.newest}: run `hpo db init`.")
        found.extend(
            f"Study {study.name!r} has RUNNING trials that nobody drives ({study.n_orphans}): "
            "launch it, or run `hpo gc`."
            for study in self.studies
            if study.n_orphans
        )
        if self.artifacts.failure is not None:
            found.append(self.artifacts.failure)
        elif self.artifacts.missing:
            n_missing, first = len(self.artifacts.missing), self.artifacts.missing[0]
            found.append(
                f"Artifacts are missing from {self.artifacts.location} ({n_missing}, such as {first}): "
                "is HPO_ARTIFACTS what it was when they were written?"
            )
        return tuple(found)


def check(url: str) -> StoreHealth:
    """Look at a store without changing it.

    Raises:
        StorageError: The store cannot be opened.
    """
    with StudyStore.open(url, read_only=True) as store:
        with store.rdb.engine.connect() as connection:
            versions = stored_versions(connection)
            assert versions is not None, "it could be opened"
            dialect = connection.dialect
            server = ".".join(map(str, dialect.server_version_info or ()))
            latency_s = statistics.median(_ping_s(connection) for _ in range(_N_PINGS))
            on_postgresql = dialect.name == "postgresql"
            time_zone = connection.scalar(text(_DEFAULT_TIME_ZONE)) if on_postgresql else None
            user = connection.scalar(select(func.current_user())) if dialect.name != "sqlite" else None
            may_write = _may_write(connection, url)
            artifacts = _artifact_health(store, may_write, connection)
            measurements = volume(connection)
        return StoreHealth(
            store.url_masked,
            f"{_PRODUCTS.get(dialect.name, dialect.name)} {server}",
            versions,
            newest_versions(),
            latency_s,
            time_zone,
            user,
            may_write,
            tuple(_studies(store)),
            artifacts,
            measurements,
        )


def _studies(store: StudyStore) -> Iterator[StudyHealth]:
    # Before its trials are counted and after: a driver that ends, or begins, in between leaves no orphans.
    before = {summary.name: store.lease_holder(summary.name) for summary in store.summaries()}
    for summary in store.summaries():
        holder = before.get(summary.name) or store.lease_holder(summary.name)
        yield StudyHealth(summary.name, holder, summary.n_trials)


_PRODUCTS = {"postgresql": "PostgreSQL", "sqlite": "SQLite", "mysql": "MySQL", "mariadb": "MariaDB"}
# The session's own is UTC; this is the one that it would return to.
_DEFAULT_TIME_ZONE = "SELECT reset_val FROM pg_settings WHERE name = 'TimeZone'"


def _ping_s(connection: Connection) -> float:
    started = time.perf_counter()
    connection.execute(select(1))
    return time.perf_counter() - started


def _may_write(connection: Connection, url: str) -> bool:
    if parse_url(url).get_backend_name() == "sqlite":
        path = sqlite_path(url)
        return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
    if connection.dialect.name != "postgresql":
        return True
    allowed: Any = connection.scalar(
        text("SELECT has_table_privilege('trials', 'INSERT, UPDATE') AND NOT pg_is_in_recovery()")
    )
    return bool(allowed)


def _artifact_health(store: StudyStore, may_write: bool, connection: Connection) -> ArtifactHealth:
    files = store.artifacts
    # Records first: an artifact's file is written before its record.
    recorded, identity = recorded_ids(connection), store_id(connection)
    try:
        if files.is_placed and identity is not None:
            is_claimed(files, identity)
        whole = {file.artifact_id: file.n_bytes for file in files.stored() if file.upload is None}
        if may_write:
            files.try_writing()
    except StorageError as error:
        return ArtifactHealth(files.location, 0, 0, (), str(error))
    missing = tuple(sorted(recorded - whole.keys()))
    return ArtifactHealth(files.location, len(whole), sum(whole.values()), missing, None)
