"""Failures of drivers and file systems, translated to the errors of this package."""

from __future__ import annotations

import errno
import re
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING

from search_spaces.reasons import message_of
from storage.errors import (
    StorageError,
    StoreBusyError,
    StoreFormatError,
    StoreFullError,
    StoreReadOnlyError,
    StoreUnreachableError,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path
    from typing import Literal

__all__ = ["database_failure", "file_failures", "one_line"]

_N_SHOWN = 300
_SHORT = 4
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_SQLSTATE_FULL = ("53100",)
_SQLSTATE_READ_ONLY = ("25006",)
_SQLSTATE_NO_RIGHT = ("42501",)
_SQLSTATE_UNREACHABLE = ("08", "25P03", "28", "3D", "57P")
_SQLSTATE_BUSY = ("40001", "40P01", "55P03")


def one_line(error: BaseException, secrets: Collection[str] = ()) -> str:
    """What a foreign exception says, on one line and without the secrets."""
    text = message_of(error)
    for secret in secrets:
        # A letter or two are part of many words, which must not be garbled.
        alone = rf"(?<!\w){re.escape(secret)}(?!\w)" if len(secret) < _SHORT else re.escape(secret)
        text = re.sub(alone, "***", text)
    return text if len(text) <= _N_SHOWN else text[: _N_SHOWN - 1] + "…"


def database_failure(
    error: BaseException, shown_url: str, *, connecting: bool = False, secrets: Collection[str] = ()
) -> StorageError | None:
    """The error that a driver's exception stands for, or None where only its caller can say.

    Args:
        error: The driver's exception, not SQLAlchemy's wrapper.
        shown_url: The store's URL with its password masked.
        connecting: There is no connection yet, or it has just been lost.
        secrets: What to keep out of the message.
    """
    reason = one_line(error, secrets)
    if isinstance(error, sqlite3.Error):
        return _sqlite_failure(error, shown_url, reason)
    state = str(getattr(error, "sqlstate", None) or getattr(error, "pgcode", None) or "")
    if state in _SQLSTATE_FULL:
        return _full(shown_url)
    if state in _SQLSTATE_READ_ONLY:
        return StoreReadOnlyError(
            f"The store {shown_url} may only be read: {reason}; name a user who may write, or the primary server."
        )
    if state in _SQLSTATE_NO_RIGHT:
        return StoreReadOnlyError(f"You lack a right at the store {shown_url}: {reason}; ask its owner for it.")
    if state in _SQLSTATE_BUSY:
        return _busy(shown_url)
    if connecting or state.startswith(_SQLSTATE_UNREACHABLE):
        return StoreUnreachableError(f"Cannot reach the store {shown_url}: {reason.rstrip('.')}. {_remedy(reason)}")
    return None


def _remedy(reason: str) -> str:
    """What to do where there is no connection; a driver that doesn't get that far gives no SQLSTATE."""
    if re.search(r"password|authentication", reason, re.IGNORECASE):
        return "Check the user, and the password in PGPASSWORD or ~/.pgpass."
    if match := re.search(r'database "([^"]+)" does not exist', reason):
        return f"Create it first: `createdb {match[1]}`."
    return "Check the address, the user and that the server runs."


def _sqlite_failure(error: sqlite3.Error, shown_url: str, reason: str) -> StorageError | None:
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:  # the low byte is the primary code
        case sqlite3.SQLITE_FULL:
            return _full(shown_url)
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return _busy(shown_url)
        case sqlite3.SQLITE_READONLY:
            return StoreReadOnlyError(f"The store {shown_url} may only be read: {reason}; check its permissions.")
        case sqlite3.SQLITE_CANTOPEN:
            return StoreUnreachableError(f"Cannot open {shown_url}: {reason}; check its path and permissions.")
        case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
            return StoreFormatError(f"{shown_url} cannot be read as a database: {reason}; name another file.")
        case sqlite3.SQLITE_IOERR:
            return StoreUnreachableError(f"The disk of {shown_url} fails: {reason}; check it and its free space.")
    return None


def _busy(shown_url: str) -> StoreBusyError:
    return StoreBusyError(f"Another process holds {shown_url}; wait until it ends, or stop it.")


def _full(where: object) -> StoreFullError:
    return StoreFullError(f"No space left for {where}; free some and launch again: finished trials are kept.")


@contextmanager
def file_failures(path: Path, doing: Literal["read", "write"] = "write") -> Iterator[None]:
    """Translate what the operating system says about files at a path.

    Raises:
        StoreFullError: No space, or no quota, is left.
        StoreUnreachableError: Any other failure.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise _full(path) from error
        reason = error.strerror or one_line(error)
        raise StoreUnreachableError(f"Cannot {doing} {path}: {reason}; check the path and its permissions.") from error
