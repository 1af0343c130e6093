"""Connections to a store: Optuna's RDB storage on an engine that fails in our words and holds no password."""

from __future__ import annotations

import sqlite3
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from optuna.storages import RDBStorage
from sqlalchemy import create_engine, event, inspect
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool, QueuePool

from storage.errors import (
    StorageError,
    StoreBusyError,
    StoreFormatError,
    StoreNotFoundError,
    StoreUnreachableError,
    StoreUrlError,
)
from storage.failures import database_failure, file_failures, one_line
from storage.locks import file_lock
from storage.urls import lock_directory, mask_password, parse_url, secrets, sqlite_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Literal

    from sqlalchemy.engine import URL, ExceptionContext

    Mode = Literal["read", "write", "create"]

__all__ = ["connect"]

_SQLITE_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 10
_CREATION_TIMEOUT_S = 60.0
_HAS_CONNECT_TIMEOUT = {"mysqldb", "psycopg", "psycopg2", "pymysql"}
_SQLITE_MODE = {"read": "ro", "write": "rw", "create": "rwc"}
_LAST_TABLE = "alembic_version"  # Optuna creates it when all others are there


def connect(url: str, mode: Mode) -> RDBStorage:
    """Optuna's storage at a URL.

    Processes that create the same store at once take turns; on databases other than SQLite, those of one machine do.

    Args:
        url: Where the store is.
        mode: `read` refuses every write, `write` wants the tables to be there, `create` makes what is missing.

    Raises:
        StorageError: One of those drawn in `storage.errors`; nothing has been written.
    """
    parsed, shown = parse_url(url), mask_password(url)
    path = sqlite_path(url) if parsed.get_backend_name() == "sqlite" else None
    connector = _server_connector(parsed, shown, mode) if path is None else _sqlite_connector(path, mode)
    if path is not None and path.is_dir():
        raise StoreUrlError(f"The storage URL '{shown}' names a directory; write 'sqlite:///PATH' with a file's path.")
    if path is not None:
        _roll_back_interrupted_write(path)
    if (path is None or path.exists()) and _has_tables(connector, parsed, shown):
        return _storage(connector, parsed, shown, create_tables=False)
    if mode != "create":
        raise StoreNotFoundError(
            f"There are no studies at {shown} yet; start one with `hpo launch`, or name another store."
        )
    with file_lock(lock_directory(url) / "create.lock", timeout_s=_CREATION_TIMEOUT_S) as our_turn:
        if not our_turn:
            raise StoreBusyError(f"Another process has been creating the store {shown} for long; wait, or stop it.")
        with _no_leftovers(path):
            return _storage(connector, parsed, shown, create_tables=True)


def _storage(connector: Callable[[], Any], parsed: URL, shown: str, *, create_tables: bool) -> RDBStorage:
    # A pool of our own can be closed where Optuna's constructor fails.
    pool = QueuePool(connector, pre_ping=True)
    try:
        with _translated(parsed, shown):
            storage = RDBStorage(_harmless(parsed), engine_kwargs={"pool": pool}, skip_table_creation=not create_tables)
    except BaseException:
        pool.dispose()
        raise
    _translate_failures(storage, parsed, shown)
    return storage


def _harmless(parsed: URL) -> str:
    """A URL that only says which dialect to speak; Optuna keeps it, and the connector alone knows the password."""
    return f"{parsed.drivername}://"


def _sqlite_connector(path: Path, mode: Mode) -> Callable[[], Any]:
    uri = f"file:{quote(str(path))}?mode={_SQLITE_MODE[mode]}"

    def connector() -> sqlite3.Connection:
        # The pool hands a connection to one thread at a time.
        return sqlite3.connect(uri, uri=True, timeout=_SQLITE_TIMEOUT_S, check_same_thread=False)

    return connector


def _server_connector(parsed: URL, shown: str, mode: Mode) -> Callable[[], Any]:
    try:
        dialect = create_engine(parsed, poolclass=NullPool).dialect
    except ImportError as error:
        raise StoreUnreachableError(
            f"The driver {error.name or parsed.drivername!r} of the storage URL '{shown}' is not installed; "
            f"install it with pip, or name another driver as '{parsed.get_backend_name()}+DRIVER://...'."
        ) from None
    arguments, options = dialect.create_connect_args(parsed)
    if dialect.driver in _HAS_CONNECT_TIMEOUT:
        options.setdefault("connect_timeout", _CONNECT_TIMEOUT_S)
    settings = []
    if dialect.name == "postgresql":
        settings.append("SET TIME ZONE 'UTC'")
        if mode == "read":
            settings.append("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")

    def connector() -> Any:
        connection: Any = dialect.connect(*arguments, **options)
        with closing(connection.cursor()) as cursor:
            for setting in settings:
                cursor.execute(setting)
        connection.commit()
        return connection

    return connector


def _has_tables(connector: Callable[[], Any], parsed: URL, shown: str) -> bool:
    engine = create_engine(_harmless(parsed), creator=connector, poolclass=NullPool)
    with _translated(parsed, shown), engine.connect() as connection:
        return inspect(connection).has_table(_LAST_TABLE)


@contextmanager
def _translated(parsed: URL, shown: str) -> Iterator[None]:
    """Translate failures while a store is opened; `from None`, as a driver may repeat the URL that it was given."""
    driver: Any = parsed.get_dialect().import_dbapi()
    # What a connector raises passes by SQLAlchemy as it is.
    foreign: tuple[type[Exception], ...] = (SQLAlchemyError, driver.Error, OSError)
    try:
        yield
    except StorageError:
        raise
    except foreign as error:
        original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        failure = database_failure(original, shown, connecting=True, secrets=secrets(parsed))
        reason = one_line(original, secrets(parsed))
        raise failure or StoreUnreachableError(f"Cannot open the store {shown}: {reason}") from None
    except RuntimeError as error:  # Optuna's word for tables of another version
        raise StoreFormatError(f"The store {shown} has another version: {one_line(error)}") from None


def _translate_failures(storage: RDBStorage, parsed: URL, shown: str) -> None:
    """From now on let every use of the storage, Optuna's own too, fail in our words."""

    @event.listens_for(storage.engine, "handle_error")
    def translate(context: ExceptionContext) -> None:
        if context.is_pre_ping:
            return  # the pool connects anew
        lost = context.connection is None or context.is_disconnect
        failure = database_failure(context.original_exception, shown, connecting=lost, secrets=secrets(parsed))
        if failure is not None:
            raise failure


@contextmanager
def _no_leftovers(path: Path | None) -> Iterator[None]:
    """Remove a SQLite file that could not be completed."""
    if path is None or path.exists():
        yield
        return
    try:
        with file_failures(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
        raise


def _roll_back_interrupted_write(path: Path) -> None:
    """Let SQLite undo what a killed process had half written, which a read-only connection cannot."""
    journal = path.with_name(f"{path.name}-journal")
    if not journal.exists():
        return
    # Where this fails, opening the store fails too, and says why.
    with suppress(sqlite3.Error):
        connection = _sqlite_connector(path, "write")()
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        finally:
            connection.close()
