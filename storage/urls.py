"""Storage URLs: any that Optuna takes, such as `sqlite:///studies.db` or `postgresql+psycopg://user@host/studies`.

A URL that appears in a message goes through `mask_password`, one that is saved through `without_user_information`.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from search_spaces.suggestions import did_you_mean
from storage.errors import StoreUnreachableError, StoreUrlError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

__all__ = [
    "Bucket",
    "artifact_location",
    "artifacts_are_placed",
    "data_directory",
    "default_storage_url",
    "fingerprint",
    "is_sqlite",
    "lock_directory",
    "mask_password",
    "parse_url",
    "secrets",
    "sqlite_path",
    "without_password",
    "without_user_information",
]

_APPLICATION = "pruning-hpo"
_DIALECTS = ("mariadb", "mssql", "mysql", "oracle", "postgresql", "sqlite")
_SQLITE_FILE = re.compile(r"sqlite(\+\w+)?:///")
# User information ends at the last `@`, wherever it is: what was not percent-encoded must not show through.
_USER_INFORMATION = re.compile(r"^([^:/?#]*://).*@", re.DOTALL)
_PASSWORD = re.compile(r"^([^:/?#]*://[^:]*:).*@", re.DOTALL)
# `user:password` without a host, where a port of letters would stand.
_PASSWORD_ALONE = re.compile(r"^([^:/?#]*://[^:@/\[]*:)(?!\d+(?:[,/?]|$))[^@/?]+$", re.DOTALL)
# A server's address without a scheme, or with half of one: `user:password@host`.
_ADDRESS = re.compile(r"^([^/@:]*:)(.*@|/)", re.DOTALL)
_SECRET_OPTION = re.compile(r"([?&][^=&]*(?:pass|secret|token)[^=&]*=)[^&]*", re.IGNORECASE)
_SECRET_OPTION_NAME = re.compile(r"pass|secret|token", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # `s3:/x` too, but no drive's letter
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html, and no user information.
_BUCKET = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([^?#]*))?")
_PRIVATE_OPTION = re.compile(r"^user$|pass|secret|token", re.IGNORECASE)


def default_storage_url() -> str:
    """The URL in `HPO_STORAGE`, or a SQLite file in the user's data directory."""
    return os.environ.get("HPO_STORAGE") or f"sqlite:///{data_directory() / 'studies.db'}"


def data_directory() -> Path:
    """The user's data directory of this product; it need not exist."""
    return Path(platformdirs.user_data_dir(_APPLICATION, appauthor=False))


def parse_url(url: str) -> URL:
    """The parsed URL.

    Raises:
        StoreUrlError: It is a plain path, an in-memory database or malformed.
        StoreUnreachableError: SQLAlchemy knows no such database.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    shown = mask_password(url)
    if "://" not in url:
        if address := _ADDRESS.match(url):
            raise StoreUrlError(
                f"'{address[1]}...' is not a storage URL; for PostgreSQL write "
                "'postgresql+psycopg://USER@HOST:PORT/NAME'."
            )
        raise StoreUrlError(f"{shown!r} is not a storage URL; for a SQLite file write 'sqlite:///{shown}'.")
    if not _SQLITE_FILE.match(url) and re.search(r"[@/?#]", url.partition("://")[2].rpartition("@")[0]):
        raise StoreUrlError(
            f"The storage URL '{shown}' is ambiguous; write '@', '/', '?' and '#' inside a user name, a password "
            "or an option as %40, %2F, %3F and %23."
        )
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except NoSuchModuleError:
        dialect = url.partition("://")[0]
        known = did_you_mean(dialect.partition("+")[0], _DIALECTS)
        raise StoreUnreachableError(f"No database {dialect!r} is known for the storage URL '{shown}'.{known}") from None
    except (ArgumentError, ValueError):
        raise StoreUrlError(
            f"The storage URL '{shown}' is malformed; write 'sqlite:///PATH' or 'DIALECT+DRIVER://USER@HOST:PORT/NAME'."
        ) from None
    if parsed.get_backend_name() == "sqlite":
        _check_sqlite(parsed, shown)
    return parsed


def _check_sqlite(parsed: URL, shown: str) -> None:
    if parsed.drivername not in {"sqlite", "sqlite+pysqlite"} or parsed.query or parsed.host:
        raise StoreUrlError(
            f"The storage URL '{shown}' has more than a path; for a SQLite file write 'sqlite:///PATH'."
        )
    if not parsed.database or parsed.database == ":memory:" or parsed.database.startswith("file:"):
        raise StoreUrlError(f"The storage URL '{shown}' names no file to keep studies in; write 'sqlite:///PATH'.")


def is_sqlite(url: str) -> bool:
    """Whether the store is a SQLite file."""
    return parse_url(url).get_backend_name() == "sqlite"


def sqlite_path(url: str) -> Path:
    """The absolute path of a SQLite store's file, the same for every way to write it.

    Raises:
        StoreUrlError: The store is no SQLite file.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database is None:
        raise StoreUrlError(f"The storage URL '{mask_password(url)}' is not a SQLite file; write 'sqlite:///PATH'.")
    path = Path(parsed.database)
    return (path.expanduser() if path.parts[0] == "~" else path).resolve()


def mask_password(url: str) -> str:
    """The URL with every password in it as `***`, fit for messages; it need not be well-formed."""
    if _SQLITE_FILE.match(url):
        return url
    masked = _PASSWORD_ALONE.sub(r"\1***", _PASSWORD.sub(r"\1***@", url))
    return _SECRET_OPTION.sub(r"\1***", masked)


def without_password(url: str) -> str:
    """The URL without password and secret options, fit to be typed again: whoever needs a password gives it apart.

    Raises:
        StorageError: It is no storage URL.
    """
    if _SQLITE_FILE.match(url):
        return url
    from sqlalchemy.engine import URL

    parsed = parse_url(url)
    options = {name: value for name, value in parsed.query.items() if not _SECRET_OPTION_NAME.search(name)}
    address = (parsed.drivername, parsed.username, None, parsed.host, parsed.port, parsed.database)
    return URL.create(*address, query=options).render_as_string()


def without_user_information(url: str) -> str:
    """The URL without user name, password and secret options, fit to be saved; it need not be well-formed."""
    if _SQLITE_FILE.match(url):
        return url
    address, _, query = _USER_INFORMATION.sub(r"\1", url).partition("?")
    options = [option for option in query.split("&") if not _PRIVATE_OPTION.search(option.partition("=")[0])]
    return "?".join(filter(None, [address, "&".join(options)]))


def secrets(parsed: URL) -> frozenset[str]:
    """Every password in the URL, to be kept out of what a driver says."""
    options = [str(value) for name, value in parsed.query.items() if _SECRET_OPTION_NAME.search(name)]
    return frozenset(secret for secret in (parsed.password, *options) if secret)


def fingerprint(text: str) -> str:
    """A file name for a text of any length: the first 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Bucket:
    """A place in an S3-compatible service: `s3://NAME/PREFIX`.

    Attributes:
        name: The bucket's name.
        prefix: What the keys of its files start with, without slashes at its ends; may be empty.
    """

    name: str
    prefix: str = ""

    def __str__(self) -> str:
        return f"s3://{self.name}/{self.prefix}" if self.prefix else f"s3://{self.name}"


def artifact_location(url: str) -> Path | Bucket:
    """Where a store's artifacts are.

    It is the directory or the bucket of `HPO_ARTIFACTS`; without that `NAME.artifacts` beside a SQLite file, or for a
    server a directory in the user's data directory.

    Raises:
        StoreUrlError: `HPO_ARTIFACTS` is a URL other than of a bucket.
    """
    chosen = os.environ.get("HPO_ARTIFACTS")
    if not chosen:
        return _beside(url, "artifacts")
    if match := _BUCKET.fullmatch(chosen):
        return Bucket(match[1], (match[2] or "").strip("/"))
    if _SCHEME.match(chosen):
        raise StoreUrlError(
            f"HPO_ARTIFACTS names no place for artifacts: '{mask_password(chosen)}'; write a directory, or "
            "'s3://BUCKET/PREFIX' with the credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    return Path(chosen).expanduser().resolve()


def artifacts_are_placed() -> bool:
    """Whether `HPO_ARTIFACTS` names the place of artifacts, whatever the store."""
    return bool(os.environ.get("HPO_ARTIFACTS"))


def lock_directory(url: str) -> Path:
    """Where a store's lock files are: `NAME.locks` beside a SQLite file, or the data directory."""
    return _beside(url, "locks")


def _beside(url: str, kind: str) -> Path:
    if is_sqlite(url):
        path = sqlite_path(url)
        return path.with_name(f"{path.name}.{kind}")
    return data_directory() / kind / fingerprint(without_user_information(url))
