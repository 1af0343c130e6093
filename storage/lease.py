"""The lease: one process at a time drives a study.

It is a file lock that the operating system drops with its process, so a killed driver blocks nobody. On databases
other than SQLite it reaches as far as the machine.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from storage.errors import StudyInUseError
from storage.failures import file_failures
from storage.locks import file_lock
from storage.urls import fingerprint, lock_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["LeaseHolder", "study_lease"]

_HOLDER_APPEARS_S = 1.0


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


@contextmanager
def study_lease(url: str, study_name: str) -> Iterator[LeaseHolder]:
    """Hold the right to drive a study.

    Raises:
        StudyInUseError: Another process, or another part of this one, holds it; the message says who.
    """
    base = lock_directory(url) / fingerprint(study_name)
    holder_path = base.with_suffix(".json")
    with file_lock(base.with_suffix(".lock"), timeout_s=0) as acquired:
        if not acquired:
            holder = _read_holder(holder_path) or "another process"
            raise StudyInUseError(f"Study {study_name!r} is driven by {holder}; wait until it ends, or stop it.")
        holder = LeaseHolder.here()
        with file_failures(holder_path):
            holder_path.write_text(json.dumps(asdict(holder)))
        try:
            yield holder
        finally:
            holder_path.unlink(missing_ok=True)


def _read_holder(path: Path) -> LeaseHolder | None:
    """Who holds the lease; a holder that has only just taken it is given a moment to say so."""
    deadline = time.monotonic() + _HOLDER_APPEARS_S
    while True:
        try:
            holder = LeaseHolder(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            holder = None
        # A killed driver leaves its name behind, which says nothing about who holds the lock now.
        if holder is not None and _may_live(holder):
            return holder
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)


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
