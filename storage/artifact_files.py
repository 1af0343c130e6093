"""Files of artifacts by their id: in a directory, or in a bucket of an S3-compatible service."""

from __future__ import annotations

import io
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

from storage.errors import StoreUnreachableError
from storage.failures import file_failures
from storage.urls import Bucket, artifact_location

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

__all__ = ["ArtifactFiles", "DirectoryFiles", "StoredFile", "is_artifact_id", "open_artifact_files"]

_ARTIFACT_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
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
    """

    location: str

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
    return DirectoryFiles(location)


class DirectoryFiles(FileSystemArtifactStore):
    """Artifact files in a directory, which is created with the first of them."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.directory = directory
        self.location = str(directory)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Write a file under another name first, so that none is ever there in part."""
        with file_failures(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            part = _part_name(artifact_id)
            try:
                super().write(part, content_body)
                os.replace(self.directory / part, self.directory / artifact_id)
            except BaseException:
                self.discard(part)
                raise

    def write_bytes(self, artifact_id: str, content: bytes) -> None:
        """`write` a file of which the content is at hand."""
        self.write(artifact_id, io.BytesIO(content))

    def discard(self, artifact_id: str) -> None:
        """Remove a file, if it is there and can be removed."""
        with suppress(ArtifactNotFound, OSError):
            self.remove(artifact_id)

    def stored(self) -> Iterator[StoredFile]:
        """Every file, then what interrupted writes have left; none where the directory is not there yet."""
        try:
            names = sorted(os.listdir(self.directory))
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreUnreachableError(
                f"Cannot read {self.directory}: {error.strerror}; check the path and its permissions."
            ) from error
        whole = [(name, name, None) for name in names if is_artifact_id(name)]
        parts = [(name, match[1], name) for name in names if (match := _PART.fullmatch(name))]
        for name, artifact_id, upload in [*whole, *parts]:
            with suppress(FileNotFoundError):
                status = os.stat(self.directory / name)
                yield StoredFile(artifact_id, datetime.fromtimestamp(status.st_mtime, UTC), status.st_size, upload)

    def delete(self, file: StoredFile) -> None:
        """Remove a file or a leftover; one that is gone meanwhile is no error."""
        with file_failures(self.directory), suppress(ArtifactNotFound):
            self.remove(file.upload or file.artifact_id)

    def try_writing(self) -> None:
        """Raise what a write would raise now; leaves nothing, not even the directory."""
        if self.directory.exists():
            probe = str(uuid.uuid4())
            self.write_bytes(probe, b"probe")
            self.remove(probe)
            return
        parent = next(each for each in self.directory.parents if each.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
            raise StoreUnreachableError(
                f"Cannot create {self.directory}: {parent} is not a directory that you may write to; "
                "check its permissions, or set HPO_ARTIFACTS."
            )


def _part_name(artifact_id: str) -> str:
    return f".{artifact_id}.part"
