"""The read-only role of a PostgreSQL store, for its dashboard."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from storage.engine import connect
from storage.errors import RoleError, StorageError
from storage.failures import database_failure, one_line
from storage.locks import advisory_key
from storage.urls import mask_password, parse_url

if TYPE_CHECKING:
    from psycopg import Connection, Cursor

__all__ = ["check_reader", "create_reader"]

_LONGEST_NAME = 63  # bytes; PostgreSQL cuts what is longer
_RESERVED = ("none", "public")
_POWERS = {
    "rolsuper": "is a superuser",
    "rolcreaterole": "may create roles",
    "rolcreatedb": "may create databases",
    "rolreplication": "may replicate",
    "rolbypassrls": "passes row security by",
    "is_member": "is a member of another role",
    "is_owner": "owns a database or a table",
}
# What a role may do beyond reading, whoever has granted it: PUBLIC, too.
_EXCESS = """
SELECT 'create in schema ' || quote_ident(nspname) FROM pg_namespace
    WHERE nspname !~ '^pg_(temp|toast)' AND has_schema_privilege(%(role)s, oid, 'CREATE')
UNION ALL SELECT lower(privilege) || ' in database ' || quote_ident(current_database())
    FROM unnest(ARRAY['CREATE', 'TEMPORARY']) AS privilege
    WHERE has_database_privilege(%(role)s, current_database(), privilege)
UNION ALL SELECT 'write to table ' || c.oid::regclass FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'v', 'f') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
    AND has_table_privilege(%(role)s, c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')
"""


def check_reader(url: str, role: str, password: str) -> None:
    """Check what can be checked of a reader before anything is written.

    Raises:
        RoleError: The store is not on PostgreSQL, the name is none that a role can have, or the password is empty.
    """
    shown = mask_password(url)
    if parse_url(url).get_dialect().driver != "psycopg":
        raise RoleError(
            f"The role {role!r} is for PostgreSQL, and the store is {shown}; name one as 'postgresql+psycopg://...'."
        )
    if role in _RESERVED:
        raise RoleError(f"PostgreSQL keeps the name {role!r} for itself; choose another one for the reader.")
    if not role or len(role.encode()) > _LONGEST_NAME or not role.isprintable() or role.startswith("pg_"):
        raise RoleError(
            f"A role's name is 1 to {_LONGEST_NAME} printable bytes that don't begin with 'pg_', but got {role!r}."
        )
    if not password:
        raise RoleError(f"The role {role!r} has no password; set one.")


def create_reader(url: str, role: str, password: str) -> bool:
    """Let a role log in and read every table of a store, also those to come, and write to none; all or nothing.

    The password leaves this process only as a SCRAM-SHA-256 verifier. That a role may create nothing takes that nobody
    may by default: schema and database keep `CREATE` and `TEMPORARY` for those who have been granted them by name.
    What PostgreSQL lets every role do in every database stays, because only a superuser could take it away: to make
    large objects, to hold advisory locks, and to connect to the server's other databases. So the password is a secret.

    Args:
        url: Where the store is, as a user who may create roles.
        role: Its name.
        password: Its password from now on.

    Returns:
        Whether the role is new.

    Raises:
        RoleError: The store is not on PostgreSQL, the role is another's that may do more, or rights are missing.
        StorageError: The store cannot be opened.
    """
    check_reader(url, role, password)
    shown = mask_password(url)
    import psycopg

    storage = connect(url, "write")
    try:
        with closing(storage.engine.raw_connection()) as pooled:
            connection: Connection[Any] = pooled.driver_connection  # type: ignore[assignment]
            try:
                return _set_up(connection, role, password, shown)
            except (psycopg.errors.InternalError_, psycopg.errors.UniqueViolation):
                # Roles belong to all databases of a server: somebody has just set the same one from another of them.
                return _set_up(connection, role, password, shown)
    except StorageError:
        raise
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction) as error:
        raise RoleError(
            f"Cannot set up the role {role!r} on {shown}: {one_line(error)}; "
            "do it as the owner, with the right to create roles (ALTER ROLE ... CREATEROLE); the tables are there."
        ) from None
    except psycopg.Error as error:
        failure = database_failure(error, shown, secrets=[password])
        # Not all of it: the server quotes the statement, and in it the password's verifier.
        reason = error.diag.message_primary or one_line(error, [password])
        raise failure or RoleError(f"Cannot set up the role {role!r} on {shown}: {reason}; try another name.") from None
    finally:
        storage.engine.dispose()


def _set_up(connection: Connection[Any], role: str, password: str, shown: str) -> bool:
    """Create a role or change it, in one transaction; whether it is new."""
    with connection.transaction(), connection.cursor() as cursor:
        # Two that grant the same at once would disturb each other.
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [advisory_key("roles")])
        is_new = _set_role(cursor, role, password)
        _grant_reading(cursor, role)
        _check_excess(cursor, role, shown)
    return is_new


def _set_role(cursor: Cursor[Any], role: str, password: str) -> bool:
    """Create a role or give one its password; whether it is new."""
    from psycopg.rows import dict_row
    from psycopg.sql import SQL, Identifier, Literal

    found = cursor.connection.cursor(row_factory=dict_row).execute(
        "SELECT r.*, EXISTS (SELECT FROM pg_auth_members WHERE member = r.oid) AS is_member,"
        " EXISTS (SELECT FROM pg_database WHERE datdba = r.oid)"
        " OR EXISTS (SELECT FROM pg_class WHERE relowner = r.oid) AS is_owner FROM pg_roles r WHERE rolname = %s",
        [role],
    )
    former = found.fetchone()
    if former is not None and (powers := [text for column, text in _POWERS.items() if former[column]]):
        raise RoleError(f"The role {role!r} is there already and {powers[0]}; choose another name for the reader.")
    verifier = cursor.connection.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256")
    name, command = Identifier(role), SQL("CREATE" if former is None else "ALTER")
    cursor.execute(SQL("{} ROLE {} LOGIN PASSWORD {}").format(command, name, Literal(verifier.decode())))
    cursor.execute(SQL("ALTER ROLE {} SET default_transaction_read_only = on").format(name))
    return former is None


def _grant_reading(cursor: Cursor[Any], role: str) -> None:
    """Take from a role all that it was granted here, and grant it to read."""
    from psycopg.sql import SQL, Identifier

    row = cursor.execute("SELECT current_database(), current_schema()").fetchone()
    assert row is not None
    names = {"role": Identifier(role), "database": Identifier(row[0]), "schema": Identifier(row[1])}
    for statement in (
        "REVOKE ALL ON ALL TABLES IN SCHEMA {schema} FROM {role}",
        "REVOKE ALL ON ALL SEQUENCES IN SCHEMA {schema} FROM {role}",
        "REVOKE ALL ON SCHEMA {schema} FROM {role}",
        "REVOKE ALL ON DATABASE {database} FROM {role}",
        "REVOKE CREATE ON SCHEMA {schema} FROM PUBLIC",
        "REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC",
        "GRANT CONNECT ON DATABASE {database} TO {role}",
        "GRANT USAGE ON SCHEMA {schema} TO {role}",
        "GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {role}",
        "ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT SELECT ON TABLES TO {role}",
    ):
        cursor.execute(SQL(statement).format(**names))


def _check_excess(cursor: Cursor[Any], role: str, shown: str) -> None:
    # What PUBLIC may do can be revoked by the owner only; for others PostgreSQL just warns.
    excess = [text for (text,) in cursor.execute(_EXCESS, {"role": role})]
    if excess:
        raise RoleError(
            f"The role {role!r} could {excess[0]} on {shown}, because everybody may; "
            "do it as the owner of the database, or revoke that from PUBLIC."
        )
