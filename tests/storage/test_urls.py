from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import StorageError, StoreUnreachableError, StoreUrlError
from storage.urls import (
    Bucket,
    artifact_location,
    default_storage_url,
    is_sqlite,
    lock_directory,
    mask_password,
    parse_url,
    sqlite_path,
    without_password,
    without_user_information,
)

SERVER = "postgresql+psycopg://ada:s3cret@db.example.org:5432/studies"


def test_default_is_a_file_in_the_data_directory(tmp_path: Path) -> None:
    assert default_storage_url() == f"sqlite:///{tmp_path}/data/pruning-hpo/studies.db"


def test_environment_overrides_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_STORAGE", SERVER)
    assert default_storage_url() == SERVER


def test_every_spelling_of_a_file_is_one_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path)
    spellings = ["studies.db", f"{tmp_path}/studies.db", "~/studies.db", "link/studies.db"]
    assert {sqlite_path(f"sqlite:///{each}") for each in spellings} == {tmp_path / "studies.db"}
    assert sqlite_path("sqlite+pysqlite:///studies.db") == tmp_path / "studies.db"


def test_files_lie_beside_a_sqlite_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    assert is_sqlite(url)
    assert artifact_location(url) == tmp_path / "studies.db.artifacts"
    assert lock_directory(url) == tmp_path / "studies.db.locks"


def test_files_of_a_server_lie_in_the_data_directory_whoever_asks(tmp_path: Path) -> None:
    assert not is_sqlite(SERVER)
    location = artifact_location(SERVER)
    assert isinstance(location, Path)
    assert location.parent == tmp_path / "data/pruning-hpo/artifacts"
    assert artifact_location(SERVER) == artifact_location(SERVER.replace("ada:s3cret", "bob:other"))
    assert artifact_location(SERVER) != artifact_location(f"{SERVER}2")


def test_environment_overrides_the_artifact_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path / "elsewhere"))
    assert artifact_location(SERVER) == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (SERVER, "postgresql+psycopg://ada@db.example.org:5432/studies"),
        ("postgresql+psycopg://host/db?user=ada&password=s3cret", "postgresql+psycopg://host/db?user=ada"),
        ("postgresql+psycopg:///db?host=h1&host=h2", "postgresql+psycopg:///db?host=h1&host=h2"),
        ("sqlite:////data/a:b@c/studies.db", "sqlite:////data/a:b@c/studies.db"),
    ],
)
def test_without_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize(
    ("chosen", "bucket", "shown"),
    [
        ("s3://studies", Bucket("studies"), "s3://studies"),
        ("s3://studies/", Bucket("studies"), "s3://studies"),
        ("s3://my.studies/of/ada/", Bucket("my.studies", "of/ada"), "s3://my.studies/of/ada"),
    ],
)
def test_artifacts_may_be_in_a_bucket(chosen: str, bucket: Bucket, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_ARTIFACTS", chosen)
    assert artifact_location(SERVER) == bucket
    assert str(bucket) == shown


@pytest.mark.parametrize("path", ["studies.db", "/data/studies.db", "./studies", "/data/me@home/a:b.db", "postgres.db"])
def test_plain_path_is_refused_with_the_url_to_write(path: str) -> None:
    with pytest.raises(StoreUrlError, match=f"write 'sqlite:///{path}'"):
        parse_url(path)


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("", StoreUrlError, "not a storage URL"),
        ("sqlite://", StoreUrlError, "names no file"),
        ("sqlite:///", StoreUrlError, "names no file"),
        ("sqlite:///:memory:", StoreUrlError, "names no file"),
        ("sqlite:///file:studies.db?mode=ro&uri=true", StoreUrlError, "write 'sqlite:///PATH'"),
        ("sqlite:///studies.db?timeout=5", StoreUrlError, "more than a path"),
        ("sqlite://studies.db", StoreUrlError, "write 'sqlite:///PATH'"),
        ("sqlite+aiosqlite:///studies.db", StoreUrlError, "write 'sqlite:///PATH'"),
        ("postgres://ada:s3cret@host/studies", StoreUnreachableError, "Did you mean 'postgresql'"),
        ("postgresql+psycopq://ada:s3cret@host/studies", StoreUnreachableError, "No database 'postgresql.psycopq'"),
        ("postgresql://ada:s3cret@host:port/studies", StoreUrlError, "malformed"),
        ("postgresql://ada:s3cret", StoreUrlError, "malformed"),
        ("postgresql://ada:s3c@ret@host/studies", StoreUrlError, "%40"),
        ("postgresql://ada:s3c/ret@host/studies", StoreUrlError, "%2F"),
        ("://ada:s3cret@host", StoreUrlError, "malformed"),
        ("ada:s3cret@host:5432/studies", StoreUrlError, "^'ada:...' .* 'postgresql.psycopg://USER@HOST:PORT/NAME'"),
        ("postgresql:/ada:s3cret@host/studies", StoreUrlError, "'postgresql.psycopg://USER@HOST:PORT/NAME'"),
    ],
)
def test_bad_url_ends_in_one_line_without_the_password(url: str, error: type[StorageError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        parse_url(url)
    assert "\n" not in str(caught.value)
    assert "s3c" not in str(caught.value)
    assert "ret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        (SERVER, "postgresql+psycopg://ada:***@db.example.org:5432/studies"),
        ("postgresql://ada@host/studies", "postgresql://ada@host/studies"),
        ("postgresql://host:5432/studies", "postgresql://host:5432/studies"),
        ("postgresql://[::1]:5432/studies", "postgresql://[::1]:5432/studies"),
        ("postgresql://h1:5432,h2:5433/studies", "postgresql://h1:5432,h2:5433/studies"),
        ("postgresql://:s3cret@host/studies", "postgresql://:***@host/studies"),
        ("postgresql://ada:s3@c/r:e?t@host/studies", "postgresql://ada:***@host/studies"),
        ("postgresql://ada:s3cret", "postgresql://ada:***"),
        ("postgresql://host/db?user=ada&password=s3cret", "postgresql://host/db?user=ada&password=***"),
        ("mysql://host/db?ssl_key=k&PASSWD=s3cret&x=1", "mysql://host/db?ssl_key=k&PASSWD=***&x=1"),
        ("sqlite:////data/a:b@c/studies.db", "sqlite:////data/a:b@c/studies.db"),
        ("studies.db", "studies.db"),
        ("folder:/data/me@home", "folder:/data/me@home"),  # any argument of a command
    ],
)
def test_mask_password(url: str, masked: str) -> None:
    assert mask_password(url) == masked


@pytest.mark.parametrize(
    ("url", "bare"),
    [
        (SERVER, "postgresql+psycopg://db.example.org:5432/studies"),
        ("postgresql://ada:s3@c/r?e@host/studies", "postgresql://host/studies"),
        ("postgresql://host/db?user=ada&password=s3cret&x=1", "postgresql://host/db?x=1"),
        ("postgresql://host/db?password=s3cret", "postgresql://host/db"),
        ("https://ada:s3cret@host/page", "https://host/page"),
        ("sqlite:////data/a:b@c/studies.db", "sqlite:////data/a:b@c/studies.db"),
    ],
)
def test_without_user_information(url: str, bare: str) -> None:
    assert without_user_information(url) == bare
