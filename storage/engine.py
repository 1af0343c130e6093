"""Connections to a store: Optuna's RDB storage on an engine that fails in our words and holds no password."""

from __future__ import annotations

import sqlite3
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import BigInteger, cast, create_engine, event, func, select
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
from storage.locks import advisory_key, file_lock
from storage.schema import VERSION, newest_versions, stored_version, stored_versions, upgrade, upgrade_optuna
from storage.urls import lock_directory, mask_password, parse_url, secrets, sqlite_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Literal

    from sqlalchemy.engine import URL, Connection, ExceptionContext

    from storage.schema import Versions

    Mode = Literal["read", "write", "create"]

__all__ = ["connect", "prepare"]

_T = TypeVar("_T")

_SQLITE_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 10
_CREATION_TIMEOUT_S = 60.0
_HAS_CONNECT_TIMEOUT = {"mysqldb", "psycopg", "psycopg2", "pymysql"}
_SQLITE_MODE = {"read": "ro", "write": "rw", "create": "rwc"}
# Both ends notice within a minute that the other's machine, or the network, is gone.
# https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-KEEPALIVES
_LIBPQ = {"psycopg", "psycopg2"}
_LIBPQ_KEEPALIVE = {
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
_POSTGRESQL_SETTINGS = (
    "SET TIME ZONE 'UTC'",
    "SET tcp_keepalives_idle = 30",
    "SET tcp_keepalives_interval = 10",
    "SET tcp_keepalives_count = 3",
)
_POSTGRESQL_READING = ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",)
# A process that is stopped in a transaction must not hold its rows for ever.
_POSTGRESQL_WRITING = ("SET idle_in_transaction_session_timeout = '60s'",)
# Who waits for a lock any longer is told so, and can be patient in its own way.
_LOCK_TIMEOUT_S = 10


def connect(url: str, mode: Mode) -> RDBStorage:
    """Optuna's storage at a URL.

    Processes that create or upgrade the same store at once take turns; on databases other than PostgreSQL and SQLite,
    those of one machine do.

    Args:
        url: Where the store is.
        mode: `read` refuses every write, `write` wants Optuna's tables to be there and upgrades the store's own,
            `create` makes what is missing.

    Raises:
        StorageError: One of those drawn in `storage.errors`; nothing has been written.
    """
    place = _Place.of(url, mode)
    version = None if place.is_missing_file else _read(place, stored_version)
    if version is None and mode != "create":
        raise StoreNotFoundError(
            f"There are no studies at {place.shown} yet; start one with `hpo launch`, create the tables with "
            "`hpo db init`, or name another store."
        )
    _refuse_newer(version, place.shown)
    if version == VERSION or (version is not None and mode == "read"):
        return _storage(place)
    with _turn(place), _no_leftovers(place.path):
        # Another process, of a newer release perhaps, may have had its turn before.
        version = None if place.is_missing_file else _read(place, stored_version)
        _refuse_newer(version, place.shown)
        return _storage(place, create_tables=version is None, upgrade_tables=version != VERSION)


def prepare(url: str) -> tuple[Versions | None, Versions]:
    """Create or upgrade every table at a URL, Optuna's too, while no other process does so.

    Returns:
        The versions before, None where there was no store, and after.

    Raises:
        StorageError: As `connect` does; on PostgreSQL nothing has been written.
    """
    place = _Place.of(url, "create")
    with _turn(place):
        with _no_leftovers(place.path):
            before = None if place.is_missing_file else _read(place, stored_versions)
            _refuse_newer(None if before is None else before.own, place.shown)
            if before != newest_versions():
                storage = _storage(place, create_tables=True, upgrade_tables=True, upgrade_optunas=True)
                storage.engine.dispose()
        after = _read(place, stored_versions)
        assert after is not None, "it has just been created"
        return before, after


@dataclass(frozen=True)
class _Place:
    """Where a store is, and how to connect to it."""

    url: str
    parsed: URL
    shown: str
    path: Path | None
    connector: Callable[[], Any]

    @classmethod
    def of(cls, url: str, mode: Mode) -> _Place:
        """The place at a URL, of which a file has been put in order."""
        parsed, shown = parse_url(url), mask_password(url)
        path = sqlite_path(url) if parsed.get_backend_name() == "sqlite" else None
        connector = _server_connector(parsed, shown, mode) if path is None else _sqlite_connector(path, mode)
        if path is not None and path.is_dir():
            raise StoreUrlError(
                f"The storage URL '{shown}' names a directory; write 'sqlite:///PATH' with a file's path."
            )
        if path is not None:
            _roll_back_interrupted_write(path)
        return cls(url, parsed, shown, path, connector)

    @property
    def is_missing_file(self) -> bool:
        return self.path is not None and not self.path.exists()

    @property
    def harmless_url(self) -> str:
        """A URL that only says which dialect to speak; Optuna keeps it, the connector alone knows the password."""
        return f"{self.parsed.drivername}://"


def _refuse_newer(version: int | None, shown: str) -> None:
    if version is not None and version > VERSION:
        raise StoreFormatError(
            f"The store {shown} has tables of version {version}, and this release knows {VERSION}; "
            "update it with `pip install -U pruning-hpo`, or name another store."
        )


def _storage(
    place: _Place, *, create_tables: bool = False, upgrade_tables: bool = False, upgrade_optunas: bool = False
) -> RDBStorage:
    parsed, shown = place.parsed, place.shown
    # A pool of our own can be closed where Optuna's constructor fails.
    pool = QueuePool(place.connector, pre_ping=True)
    try:
        with _translated(parsed, shown):
            storage = RDBStorage(
                place.harmless_url,
                engine_kwargs={"pool": pool},
                skip_table_creation=not create_tables,
                skip_compatibility_check=upgrade_optunas,
            )
            if upgrade_tables:
                with storage.engine.begin() as connection:
                    if upgrade_optunas:
                        upgrade_optuna(connection)
                    upgrade(connection)
    except BaseException:
        pool.dispose()
        raise
    _translate_failures(storage, parsed, shown)
    return storage


@contextmanager
def _turn(place: _Place) -> Iterator[None]:
    """Wait until no other process creates or upgrades the store."""
    parsed, shown = place.parsed, place.shown
    busy = StoreBusyError(f"Another process has been creating the store {shown} for long; wait, or stop it.")
    with ExitStack() as stack:
        if parsed.get_backend_name() == "postgresql":
            engine = create_engine(place.harmless_url, creator=place.connector, poolclass=NullPool)
            try:
                with _translated(parsed, shown):
                    # The lock goes with the connection, whatever ends it.
                    connection = stack.enter_context(engine.connect().execution_options(isolation_level="AUTOCOMMIT"))
                    connection.exec_driver_sql(f"SET lock_timeout = '{_CREATION_TIMEOUT_S:g}s'")
                    connection.execute(select(func.pg_advisory_lock(cast(advisory_key("schema"), BigInteger))))
            except StoreBusyError:
                raise busy from None
        elif not stack.enter_context(
            file_lock(lock_directory(place.url) / "create.lock", timeout_s=_CREATION_TIMEOUT_S)
        ):
            raise busy
        yield


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
    if dialect.driver in _LIBPQ:
        options = {**_LIBPQ_KEEPALIVE, **options}
    settings: tuple[str, ...] = ()
    if dialect.name == "postgresql":
        settings = _POSTGRESQL_SETTINGS + (_POSTGRESQL_READING if mode == "read" else _POSTGRESQL_WRITING)
        settings += (f"SET lock_timeout = '{_LOCK_TIMEOUT_S}s'",)

    def connector() -> Any:
        connection: Any = dialect.connect(*arguments, **options)
        with closing(connection.cursor()) as cursor:
            for setting in settings:
                cursor.execute(setting)
        connection.commit()
        return connection

    return connector


def _read(place: _Place, query: Callable[[Connection], _T]) -> _T:
    engine = create_engine(place.harmless_url, creator=place.connector, poolclass=NullPool)
    with _translated(place.parsed, place.shown), engine.connect() as connection:
        return query(connection)


@contextmanager
def _translated(parsed: URL, shown: str) -> Iterator[None]:
    """Translate failures while a store is opened; `from None`, as a driver may repeat the URL that it was given."""
    driver: Any = parsed.get_dialect().import_dbapi()
    # What a connector raises passes by SQLAlchemy as it is.
    foreign: tuple[type[Exception], ...] = (SQLAlchemyError, driver.Error, OSError, StorageInternalError)
    try:
        yield
    except StorageError:
        raise
    except foreign as error:
        # Optuna's word for a commit that failed.
        raised = error.__cause__ or error if isinstance(error, StorageInternalError) else error
        original = raised.orig if isinstance(raised, DBAPIError) and raised.orig is not None else raised
        failure = database_failure(original, shown, connecting=True, secrets=secrets(parsed))
        reason = one_line(original, secrets(parsed))
        raise failure or StoreUnreachableError(f"Cannot open the store {shown}: {reason}") from None
    except RuntimeError:  # Optuna's word for tables of another version
        raise StoreFormatError(
            f"The tables of {shown} are of another version than Optuna {optuna.__version__}; upgrade older ones with "
            "`hpo db init`, or update Optuna with `pip install -U optuna`."
        ) from None


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
