"""The lease: one process at a time drives a study.

On PostgreSQL it is an advisory lock of a connection of its own, which reaches every machine, and a fence: whatever the
store writes while it holds the lease goes through only if nobody has taken it since. On other databases it is a file
lock, which on those with a server reaches as far as the machine. Either is dropped with its process, so that a killed
driver blocks nobody.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, Integer, cast, column, event, func, inspect, select, table, update
from sqlalchemy.dialects import postgresql

from storage.errors import LeaseLostError, StoreUnreachableError, StudyInUseError
from storage.failures import file_failures
from storage.locks import advisory_key, file_lock
from storage.schema import LEASES
from storage.urls import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy.engine import Connection, Engine

    from storage.patience import Outages

__all__ = [
    "LeaseHolder",
    "file_lease",
    "file_lease_holder",
    "server_lease",
    "server_lease_holder",
]

_HOLDER_APPEARS_S = 1.0
_POLL_S = 0.05
_LONGEST_LOCK_S = 10
_OWN = "lease"
"""The execution option of the lease's own connection."""


@dataclass(frozen=True, slots=True)
class LeaseHolder:
    """The process that drives a study.

    Attributes:
        host: Its machine's name.
        pid: Its process id there.
        started: When it took the lease, as ISO 8601 in UTC.
    """

    host: str
    pid: int
    started: str

    @classmethod
    def here(cls) -> LeaseHolder:
        """This process, from now on."""
        return cls(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))

    def __str__(self) -> str:
        return f"pid {self.pid} on host {self.host} since {self.started}"


# By a file lock


@contextmanager
def file_lease(directory: Path, study_name: str) -> Iterator[LeaseHolder]:
    """Hold the right to drive a study, by a lock file in a directory.

    Raises:
        StudyInUseError: Another process, or another part of this one, holds it; the message says who.
    """
    base = directory / fingerprint(study_name)
    holder_path = base.with_suffix(".json")
    with file_lock(base.with_suffix(".lock"), timeout_s=0) as acquired:
        if not acquired:
            raise StudyInUseError(study_name, _read_holder(holder_path))
        holder = LeaseHolder.here()
        with file_failures(holder_path):
            holder_path.write_text(json.dumps(asdict(holder)))
        try:
            yield holder
        finally:
            holder_path.unlink(missing_ok=True)


def file_lease_holder(directory: Path, study_name: str) -> LeaseHolder | None:
    """Who holds a study's `file_lease`, or None."""
    base = directory / fingerprint(study_name)
    # Only where somebody seems to hold it may we get in the way of who is about to take it.
    if (holder := _living_holder(base.with_suffix(".json"))) is None:
        return None
    with file_lock(base.with_suffix(".lock"), timeout_s=0) as acquired:
        return None if acquired else holder


def _read_holder(path: Path) -> LeaseHolder | None:
    """Who holds the lease; a holder that has only just taken it is given a moment to say so."""
    deadline = time.monotonic() + _HOLDER_APPEARS_S
    while (holder := _living_holder(path)) is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return holder


def _living_holder(path: Path) -> LeaseHolder | None:
    """Who a file names; a killed driver leaves its name behind, which says nothing about who holds the lock now."""
    try:
        holder = LeaseHolder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return holder if _may_live(holder) else None


def _may_live(holder: LeaseHolder) -> bool:
    if holder.host != socket.gethostname():
        return True
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# By an advisory lock on a PostgreSQL server


@contextmanager
def server_lease(engine: Engine, study_name: str, outages: Outages) -> Iterator[LeaseHolder]:
    """Hold the right to drive a study, by an advisory lock of a connection of its own.

    Everything that is written by the engine meanwhile is fenced: the first write of each transaction makes sure that
    the lease is still held, takes it again after a lost connection, and keeps others from taking it until the end of
    the transaction.

    Raises:
        StudyInUseError: Another process, or another part of this one, holds it; the message says who.
        LeaseLostError: From a later write: another process has taken it over.
    """
    lease = _ServerLease(engine, study_name)
    outages.wait_out(lambda again: lease.take())
    event.listen(engine, "before_cursor_execute", lease.fence)
    try:
        yield lease.holder
    finally:
        event.remove(engine, "before_cursor_execute", lease.fence)
        lease.give_back()


def server_lease_holder(connection: Connection, study_name: str) -> LeaseHolder | None:
    """Who holds a study's `server_lease`, or None."""
    if not inspect(connection).has_table(LEASES.name):
        return None  # a store of an earlier release
    locks = _advisory_locks(study_name)
    named = select(LEASES.c.host, LEASES.c.pid, LEASES.c.started).join(locks, locks.c.pid == LEASES.c.backend)
    row = connection.execute(named.where(LEASES.c.study_name == study_name)).first()
    return None if row is None else LeaseHolder(*row)


def _advisory_locks(study_name: str) -> Any:
    """The server's processes that hold the lock of a study, at most one, in the column `pid`."""
    names = ("locktype", "database", "classid", "objid", "objsubid", "pid", "granted")
    locks = table("pg_locks", *(column(name) for name in names))
    databases = table("pg_database", column("oid"), column("datname"))
    here = select(databases.c.oid).where(databases.c.datname == func.current_database()).scalar_subquery()
    # A key of 64 bits is shown as two of 32, without signs.
    high, low = divmod(_key(study_name) % 2**64, 2**32)
    of_study = (cast(locks.c.classid, BigInteger) == high) & (cast(locks.c.objid, BigInteger) == low)
    return (
        select(cast(locks.c.pid, Integer).label("pid"))
        .where(locks.c.locktype == "advisory", locks.c.objsubid == 1, locks.c.granted, locks.c.database == here)
        .where(of_study)
        .subquery()
    )


def _key(study_name: str) -> int:
    return advisory_key(f"lease/{study_name}")


class _ServerLease:
    """An advisory lock and the row that says who has it; the row's token is the fence.

    Thread-safe.
    """

    def __init__(self, engine: Engine, study_name: str) -> None:
        self.holder = LeaseHolder.here()
        self._engine = engine
        self._study_name = study_name
        self._token = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._backend = 0

    def take(self) -> None:
        """Take a lease that nobody holds.

        Raises:
            StudyInUseError: Somebody does.
        """
        with self._locked(StudyInUseError) as connection:
            values = {"token": self._token, "backend": self._backend, **asdict(self.holder)}
            row = postgresql.insert(LEASES).values(study_name=self._study_name, **values)
            # Waits for the end of what the former holder may still be writing.
            connection.execute(row.on_conflict_do_update(index_elements=[LEASES.c.study_name], set_=values))

    def give_back(self) -> None:
        """Let others take it."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is None:
                return
            # With a connection that is lost, the lock is gone.
            with suppress(StoreUnreachableError):
                connection.execute(select(func.pg_advisory_unlock(cast(_key(self._study_name), BigInteger))))
                connection.commit()
            connection.close()

    def fence(
        self, connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> None:
        """Let the first write of a transaction pass if the lease is held, and stay held until the transaction ends.

        Raises:
            LeaseLostError: Another process has taken it.
        """
        writes = context is not None and (context.isinsert or context.isupdate or context.isdelete)
        if not writes or connection.get_execution_options().get(_OWN):
            return
        transaction = connection.get_transaction()
        key = f"fenced by {self._token}"
        if connection.info.get(key) is transaction:
            return
        self._keep()
        token = connection.scalar(
            select(LEASES.c.token).where(LEASES.c.study_name == self._study_name).with_for_update(read=True)
        )
        if token != self._token:
            raise LeaseLostError(self._study_name, self._named(connection))
        connection.info[key] = transaction

    def _keep(self) -> None:
        """Take the lock again if its connection was lost."""
        with self._lock:
            if self._connection is not None and self._is_alive(self._connection):
                return
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            self._take_again()

    def _is_alive(self, connection: Connection) -> bool:
        try:
            connection.execute(select(1))
            connection.commit()
        except StoreUnreachableError:
            return False
        return True

    def _take_again(self) -> None:
        with self._locked(LeaseLostError) as connection:
            ours = (LEASES.c.study_name == self._study_name) & (LEASES.c.token == self._token)
            if connection.execute(update(LEASES).where(ours).values(backend=self._backend)).rowcount != 1:
                raise LeaseLostError(self._study_name, self._named(connection))

    @contextmanager
    def _locked(self, refusal: type[StudyInUseError]) -> Iterator[Connection]:
        """A new connection that has the lock, and is kept if the block succeeds."""
        former = self._backend
        connection = self._connect()
        try:
            while not connection.scalar(select(func.pg_try_advisory_lock(cast(_key(self._study_name), BigInteger)))):
                # The server may not have noticed yet that the former connection is lost.
                if not self._end(connection, former):
                    raise refusal(self._study_name, self._holder_appears(connection))
                time.sleep(_POLL_S)
            yield connection
            connection.commit()
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _connect(self) -> Connection:
        """A connection of its own, not the pool's."""
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT", **{_OWN: True})
        try:
            connection.detach()
            connection.exec_driver_sql(f"SET lock_timeout = '{_LONGEST_LOCK_S}s'")
            self._backend = connection.scalar(select(func.pg_backend_pid())) or 0
        except BaseException:
            connection.close()
            raise
        return connection

    def _end(self, connection: Connection, backend: int) -> bool:
        """End one of the server's processes, if it is what holds the lock."""
        locks = _advisory_locks(self._study_name)
        ended = select(func.pg_terminate_backend(locks.c.pid)).where(locks.c.pid == backend)
        return connection.execute(ended).first() is not None

    def _holder_appears(self, connection: Connection) -> LeaseHolder | None:
        """Who holds the lease; a holder that has only just taken it is given a moment to say so."""
        deadline = time.monotonic() + _HOLDER_APPEARS_S
        while (holder := server_lease_holder(connection, self._study_name)) is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return holder

    def _named(self, connection: Connection) -> LeaseHolder | None:
        """Who has taken the lease last."""
        row = select(LEASES.c.host, LEASES.c.pid, LEASES.c.started).where(LEASES.c.study_name == self._study_name)
        found = connection.execute(row).first()
        return None if found is None else LeaseHolder(*found)
