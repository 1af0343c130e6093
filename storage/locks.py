"""File locks between processes, dropped by the operating system when their process ends."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from storage.failures import file_failures

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["file_lock"]


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
