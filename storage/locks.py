"""Locks between processes, dropped when their process ends: on files, and by number on a PostgreSQL server."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from storage.failures import file_failures

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["advisory_key", "file_lock"]


def advisory_key(purpose: str) -> int:
    """The number of an advisory lock, 64 bits with a sign, which no other application is likely to take."""
    digest = hashlib.sha256(f"pruning-hpo/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


@contextmanager
def file_lock(path: Path, *, timeout_s: float) -> Iterator[bool]:
    """Hold a file's lock, and say whether it could be had in time.

    Raises:
        StoreFullError: The lock file doesn't fit on the disk.
        StoreUnreachableError: It cannot be written.
    """
    # Any thread may release it, and each call is a holder of its own.
    lock = FileLock(path, timeout=timeout_s, thread_local=False)
    with file_failures(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            acquired = False
        else:
            acquired = True
    try:
        yield acquired
    finally:
        if acquired:
            lock.release()
