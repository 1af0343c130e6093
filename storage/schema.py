"""The store's own tables beside Optuna's: a version, and who drives which study."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna.storages._rdb import models
from sqlalchemy import Column, Integer, MetaData, String, Table, delete, func, insert, inspect, select

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

__all__ = ["LEASES", "TABLES", "VERSION", "stored_version", "upgrade"]

VERSION = 1
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

_SCHEMA = Table("hpo_schema", TABLES, Column("version", Integer, primary_key=True, autoincrement=False))
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
