"""Files of artifacts by their id: in a directory, or in a bucket of an S3-compatible service."""

from __future__ import annotations

import io
import json
import os
import re
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

from storage.errors import ArtifactsMismatchError, StorageError, StoreUnreachableError
from storage.failures import file_failures
from storage.urls import Bucket, artifact_location, artifacts_are_placed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

__all__ = [
    "ArtifactFiles",
    "DirectoryFiles",
    "StoredFile",
    "claim",
    "is_artifact_id",
    "is_claimed",
    "open_artifact_files",
]

_ARTIFACT_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MARK = "store.json"
_PART = re.compile(rf"\.({_ARTIFACT_ID.pattern})\.part")


def is_artifact_id(name: str) -> bool:
    """Whether a file of this name may be an artifact; others are left alone."""
    return _ARTIFACT_ID.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An artifact's file, or what an interrupted write has left of one.

    Attributes:
        artifact_id: Its name.
        written: When it was written last, in UTC by the clock of the machine that keeps it.
        n_bytes: Its size; 0 where that of a leftover is not known.
        upload: What a write that has not ended is known by; None for a whole file.
    """

    artifact_id: str
    written: datetime
    n_bytes: int
    upload: str | None = None


class ArtifactFiles(Protocol):
    """Files of artifacts: Optuna's `ArtifactStore`, and what it takes to look after them.

    A file is there whole or not at all, whenever the process that writes it dies. Thread-safe, because no two artifacts
    share an id. What fails raises a `StorageError` that names the location: `StoreFullError` where no space is left,
    else `StoreUnreachableError`.

    Attributes:
        location: Where the files are, fit for messages.
        is_placed: Whether `HPO_ARTIFACTS` says so, which could say it to several stores.
    """

    location: str
    is_placed: bool

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """A file's content; Optuna's `ArtifactNotFound` where there is none."""
        ...

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Write a file."""
        ...

    def write_bytes(self, artifact_id: str, content: bytes) -> None:
        """`write` a file of which the content is at hand."""
        ...

    def remove(self, artifact_id: str) -> None:
        """Remove a file; Optuna's `ArtifactNotFound` may be raised where there is none."""
        ...

    def discard(self, artifact_id: str) -> None:
        """Remove a file if it is there and can be removed: what stays is unreferenced, and `hpo gc` finds it."""
        ...

    def stored(self) -> Iterator[StoredFile]:
        """Every file, then what interrupted writes have left, in no order; files that are no artifacts are left out."""
        ...

    def delete(self, file: StoredFile) -> None:
        """Remove a file or a leftover that `stored` has named; one that is gone meanwhile is no error."""
        ...

    def try_writing(self) -> None:
        """Raise what a write would raise now; leaves nothing."""
        ...


def open_artifact_files(url: str) -> ArtifactFiles:
    """The artifact files of the store at a URL; nothing is created before the first is written.

    Raises:
        StoreUrlError: `HPO_ARTIFACTS` cannot be read.
        StoreUnreachableError: They are in a bucket, and boto3 or its settings are missing.
    """
    location = artifact_location(url)
    if isinstance(location, Bucket):
        from storage.s3 import BucketFiles

        return BucketFiles(location)
    return DirectoryFiles(location, is_placed=artifacts_are_placed())


def is_claimed(files: ArtifactFiles, store_id: str) -> bool:
    """Whether a place says that it is this store's; one that no store has written to since the mark exists does not.

    Raises:
        ArtifactsMismatchError: It says that it is another store's.
    """
    try:
        with files.open_reader(_MARK) as mark:
            owner = json.load(mark)["store"]
    except ArtifactNotFound:
        return False
    except (ValueError, TypeError, KeyError):
        owner = None
    if owner != store_id:
        raise ArtifactsMismatchError(
            f"The artifacts in {files.location} are another store's; set HPO_ARTIFACTS to a place of this one's own, "
            f"or remove {_MARK} there if that store is gone."
        )
    return True


def claim(files: ArtifactFiles, store_id: str) -> None:
    """Mark a place as a store's, if `HPO_ARTIFACTS` names it: another store would take the files there for leftovers.

    Raises:
        ArtifactsMismatchError: It is another store's.
        StorageError: It cannot be written.
    """
    if not files.is_placed or is_claimed(files, store_id):
        return
    try:
        files.write_bytes(_MARK, json.dumps({"store": store_id}).encode())
    except StorageError:
        # Another process of this store may have been in between.
        if not is_claimed(files, store_id):
            raise
    # Another store may have been.
    is_claimed(files, store_id)


class DirectoryFiles(FileSystemArtifactStore):
    """Artifact files in a directory, which is created with the first of them."""

    def __init__(self, directory: Path, *, is_placed: bool = False) -> None:
        super().__init__(directory)
        self.is_placed = is_placed
        self.directory = directory
        self.location = str(directory)

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """A file's content; Optuna's `ArtifactNotFound` where there is none."""
        with file_failures(self.directory, "read"):
            return super().open_reader(artifact_id)

    def remove(self, artifact_id: str) -> None:
        """Remove a file; Optuna's `ArtifactNotFound` where there is none."""
        with file_failures(self.directory):
            super().remove(artifact_id)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Write a file under another name first, so that none is ever there in part."""
        with file_failures(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            part = _part_name(artifact_id)
            try:
                super().write(part, content_body)
                # Else a power failure could leave an empty file, of which the database has the record.
                with open(self.directory / part, "rb") as written:
                    os.fsync(written.fileno())
                os.replace(self.directory / part, self.directory / artifact_id)
            except BaseException:
                self.discard(part)
                raise

    def write_bytes(self, artifact_id: str, content: bytes) -> None:
        """`write` a file of which the content is at hand."""
        self.write(artifact_id, io.BytesIO(content))

    def discard(self, artifact_id: str) -> None:
        """Remove a file, if it is there and can be removed."""
        with suppress(ArtifactNotFound, StorageError):
            self.remove(artifact_id)

    def stored(self) -> Iterator[StoredFile]:
        """Every file, then what interrupted writes have left; none where the directory is not there yet."""
        with file_failures(self.directory, "read"):
            try:
                names = sorted(os.listdir(self.directory))
            except FileNotFoundError:
                return
        whole = [(name, name, None) for name in names if is_artifact_id(name)]
        parts = [(name, match[1], name) for name in names if (match := _PART.fullmatch(name))]
        for name, artifact_id, upload in [*whole, *parts]:
            with file_failures(self.directory, "read"):
                try:
                    status = os.stat(self.directory / name)
                except FileNotFoundError:
                    continue
            yield StoredFile(artifact_id, datetime.fromtimestamp(status.st_mtime, UTC), status.st_size, upload)

    def delete(self, file: StoredFile) -> None:
        """Remove a file or a leftover; one that is gone meanwhile is no error."""
        with suppress(ArtifactNotFound):
            self.remove(file.upload or file.artifact_id)

    def try_writing(self) -> None:
        """Raise what a write would raise now; leaves nothing, not even the directory."""
        with file_failures(self.directory):
            parent = next(each for each in (self.directory, *self.directory.parents) if each.exists())
        if parent == self.directory:
            probe = str(uuid.uuid4())
            self.write_bytes(probe, b"probe")
            self.remove(probe)
            return
        if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
            raise StoreUnreachableError(
                f"Cannot create {self.directory}: {parent} is not a directory that you may write to; "
                "check its permissions, or set HPO_ARTIFACTS."
            )


def _part_name(artifact_id: str) -> str:
    return f".{artifact_id}.part"
