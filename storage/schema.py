"""The store's own tables beside Optuna's: a version, an identity, and who drives which study."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages._rdb import models
from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    delete,
    func,
    insert,
    inspect,
    select,
    update,
)

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy.engine import Connection

__all__ = [
    "LEASES",
    "MEASUREMENTS",
    "TABLES",
    "VERSION",
    "Versions",
    "newest_versions",
    "store_id",
    "stored_version",
    "stored_versions",
    "upgrade",
    "upgrade_optuna",
]

VERSION = 3
"""Version of the store's own tables; a release that changes them raises it."""

TABLES = MetaData()
"""The store's own tables."""

LEASES = Table(
    "hpo_lease",
    TABLES,
    Column("study_name", String(models.MAX_INDEXED_STRING_LENGTH), primary_key=True),
    Column("token", String(32), nullable=False),
    Column("backend", Integer, nullable=False),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started", String(32), nullable=False),
)
"""The last holder of each study's lease: a random token, the server's process that has the lock, and `LeaseHolder`."""

MEASUREMENTS = Table(
    "hpo_measurement",
    TABLES,
    Column("subject", String(32), primary_key=True),
    Column("origin", String(32), primary_key=True),
    Column("mask", String(32), primary_key=True),
    Column("n_images", Integer, nullable=False),
    Column("correct", LargeBinary, nullable=False),
    Column("parameters", BigInteger, nullable=False),
    Column("flops", BigInteger, nullable=False),
    Column("created", DateTime, nullable=False),
    Index("hpo_measurement_newest", "subject", "created"),
    sqlite_with_rowid=False,
)
"""What is known of pruned networks, see `storage.measurements`; when, in UTC without a zone, as in Optuna's tables."""

_SCHEMA = Table("hpo_schema", TABLES, Column("version", Integer, primary_key=True, autoincrement=False))
# One row: what tells the store from every other, wherever it is moved.
_STORE = Table("hpo_store", TABLES, Column("id", String(32), primary_key=True))
_LAST_OF_OPTUNA = "alembic_version"  # Optuna creates it when all its others are there


def stored_version(connection: Connection) -> int | None:
    """The version of a database's tables: 0 where it holds Optuna's only, None where it is no store yet."""
    tables = inspect(connection)
    if not tables.has_table(_LAST_OF_OPTUNA):
        return None
    if not tables.has_table(_SCHEMA.name):
        return 0
    version: int = connection.scalar(select(func.coalesce(func.max(_SCHEMA.c.version), 0))) or 0
    return version


def upgrade(connection: Connection) -> None:
    """Bring the store's own tables to `VERSION`, in a transaction and while no other process does so."""
    TABLES.create_all(connection)
    connection.execute(delete(_SCHEMA))
    connection.execute(insert(_SCHEMA).values(version=VERSION))
    if store_id(connection) is None:
        connection.execute(insert(_STORE).values(id=uuid.uuid4().hex))


def store_id(connection: Connection) -> str | None:
    """What tells a store from every other; None where an earlier release has made its tables."""
    if not inspect(connection).has_table(_STORE.name):
        return None
    found: str | None = connection.scalar(select(_STORE.c.id))
    return found


@dataclass(frozen=True, slots=True)
class Versions:
    """Versions of a store's tables.

    Attributes:
        own: Of the store's own tables; 0 where there are none.
        optuna: The revision of Optuna's tables; None where Optuna had no revisions yet.
    """

    own: int
    optuna: str | None

    def __str__(self) -> str:
        return f"{self.optuna} by Optuna's count and {self.own} by our own"


def stored_versions(connection: Connection) -> Versions | None:
    """The versions of a database's tables, or None where it is no store yet."""
    from alembic.migration import MigrationContext

    own = stored_version(connection)
    return None if own is None else Versions(own, MigrationContext.configure(connection).get_current_revision())


def newest_versions() -> Versions:
    """The versions that this release reads and writes."""
    from alembic.script import ScriptDirectory

    return Versions(VERSION, ScriptDirectory.from_config(_migrations()).get_current_head())


def upgrade_optuna(connection: Connection) -> None:
    """Bring Optuna's tables to the revision of the installed Optuna, in a transaction and while no other does so.

    It is Optuna's `storage upgrade`, but on a connection that there is: that command makes one of its own, for which it
    would have to be told the password.

    Raises:
        RuntimeError: A newer Optuna has made them.
    """
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    configuration = _migrations()
    scripts = ScriptDirectory.from_config(configuration)
    versions = stored_versions(connection)
    if versions is not None and versions.optuna not in {None, *(each.revision for each in scripts.walk_revisions())}:
        raise RuntimeError(f"Optuna {optuna.__version__} doesn't know the revision {versions.optuna}.")

    def to_newest(revision: str | tuple[str, ...], context: object) -> list[Any]:
        return scripts._upgrade_revs("head", revision)  # type: ignore[arg-type]

    with EnvironmentContext(configuration, scripts, fn=to_newest) as environment:
        # Batches, because SQLite alters few things of a table.
        environment.configure(connection=connection, target_metadata=models.BaseModel.metadata, render_as_batch=True)
        environment.run_migrations()
    written = {"schema_version": models.SCHEMA_VERSION, "library_version": optuna.__version__}
    connection.execute(update(models.VersionInfoModel).values(written))


def _migrations() -> Config:
    from alembic.config import Config

    configuration = Config()
    configuration.set_main_option("script_location", str(Path(models.__file__).with_name("alembic")).replace("%", "%%"))
    return configuration
