"""Artifact files in a bucket of an S3-compatible service, by boto3.

Service, region and credentials are those of boto3's standard settings, such as `AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`; none is stored.
"""

from __future__ import annotations

import io
import logging
import re
import uuid
from contextlib import contextmanager, suppress
from datetime import UTC
from typing import TYPE_CHECKING, Any

from optuna.artifacts import Boto3ArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

from storage.artifact_files import StoredFile, is_artifact_id
from storage.errors import ArtifactsAwayError, StorageError, StoreFullError, StoreUnreachableError
from storage.failures import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from storage.urls import Bucket

__all__ = ["BucketFiles"]

_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60
_N_ATTEMPTS = 3
_NO_ACCESS = {"AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch", "403"}
_HTTP_INSUFFICIENT_STORAGE = 507
_HTTP_SERVER_ERROR = 500
_PASSWORD = re.compile(r"(://[^:/\s]*:)\S*@")

_log = logging.getLogger("hpo")


class BucketFiles:
    """Artifact files under a prefix of a bucket; see `ArtifactFiles`.

    A put is all or nothing; of a large file, which goes in parts, an interrupted upload may be left.

    Raises:
        StoreUnreachableError: boto3 is not installed, or its settings are not usable.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.location = str(bucket)
        self.is_placed = True
        self._bucket = bucket.name
        self._prefix = f"{bucket.prefix}/" if bucket.prefix else ""
        self._client = _client(self.location)
        self._objects = Boto3ArtifactStore(bucket.name, self._client)

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """A file's content; Optuna's `ArtifactNotFound` where there is none."""
        with _failures(self.location):
            try:
                body = self._objects.open_reader(self._key(artifact_id))
            except ArtifactNotFound as error:
                if isinstance(error.__cause__, self._client.exceptions.NoSuchBucket):
                    raise error.__cause__ from None
                raise
            # Read at once: what a connection says that breaks later would reach the reader untranslated.
            with body:
                return io.BytesIO(body.read())

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Write a file."""
        with _failures(self.location):
            self._objects.write(self._key(artifact_id), content_body)

    def write_bytes(self, artifact_id: str, content: bytes) -> None:
        """`write` a file of which the content is at hand."""
        self.write(artifact_id, io.BytesIO(content))

    def remove(self, artifact_id: str) -> None:
        """Remove a file, if it is there."""
        with _failures(self.location):
            self._objects.remove(self._key(artifact_id))

    def discard(self, artifact_id: str) -> None:
        """Remove a file, if it is there and can be removed."""
        with suppress(StorageError):
            self.remove(artifact_id)

    def stored(self) -> Iterator[StoredFile]:
        """Every file, then every upload in parts that has not ended, if one may ask for those."""
        for each in self._listed("list_objects_v2", "Contents"):
            if is_artifact_id(name := self._name(each)):
                yield StoredFile(name, each["LastModified"].astimezone(UTC), each["Size"])
        try:
            uploads = list(self._listed("list_multipart_uploads", "Uploads"))
        except ArtifactsAwayError:
            raise
        except StoreUnreachableError as error:  # files may be listed, so it is this right alone that is missing
            _log.info("Interrupted uploads are not looked for: %s", error)
            return
        for each in uploads:
            if is_artifact_id(name := self._name(each)):
                yield StoredFile(name, each["Initiated"].astimezone(UTC), 0, each["UploadId"])

    def delete(self, file: StoredFile) -> None:
        """Remove a file or an upload that has not ended; one that is gone meanwhile is no error."""
        if file.upload is None:
            self.remove(file.artifact_id)
            return
        with _failures(self.location), suppress(self._client.exceptions.NoSuchUpload):
            self._client.abort_multipart_upload(
                Bucket=self._bucket, Key=self._key(file.artifact_id), UploadId=file.upload
            )

    def try_writing(self) -> None:
        """Raise what a write would raise now; leaves nothing."""
        probe = str(uuid.uuid4())
        self.write_bytes(probe, b"probe")
        self.remove(probe)

    def _key(self, artifact_id: str) -> str:
        return self._prefix + artifact_id

    def _name(self, listed: dict[str, Any]) -> str:
        key: str = listed["Key"]
        return key.removeprefix(self._prefix)

    def _listed(self, operation: str, entries: str) -> Iterator[dict[str, Any]]:
        with _failures(self.location):
            for page in self._client.get_paginator(operation).paginate(Bucket=self._bucket, Prefix=self._prefix):
                yield from page.get(entries, ())


def _client(location: str) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise StoreUnreachableError(
            f"HPO_ARTIFACTS is {location!r}, but boto3 is not installed; install it with: pip install 'pruning-hpo[s3]'"
        ) from None
    settings = Config(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": _N_ATTEMPTS},
    )
    with _failures(location):
        try:
            # A session of its own: the default one keeps the credentials that it has found first.
            return boto3.session.Session().client("s3", config=settings)
        except ValueError as error:  # botocore's word for an endpoint that is no URL
            raise StoreUnreachableError(
                f"Cannot reach {location}: {_reason(error)}; check AWS_ENDPOINT_URL and AWS_DEFAULT_REGION."
            ) from None


@contextmanager
def _failures(location: str) -> Iterator[None]:
    """Translate what boto3 says about a bucket."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )
    from botocore.exceptions import ConnectionError as BotoConnectionError

    # `from None`: what boto3 says may repeat a password in AWS_ENDPOINT_URL.
    try:
        yield
    except ClientError as error:
        raise _refusal(error.response, location, _reason(error)) from None
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise StoreUnreachableError(
            f"Cannot reach {location}: {_reason(error)}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        ) from None
    except (Boto3Error, BotoCoreError) as error:
        may_pass = isinstance(error, BotoConnectionError | HTTPClientError)
        raise (ArtifactsAwayError if may_pass else StoreUnreachableError)(
            f"Cannot reach {location}: {_reason(error).rstrip('.')}; check AWS_ENDPOINT_URL and that the service runs."
        ) from None


def _reason(error: Exception) -> str:
    return _PASSWORD.sub(r"\1***@", one_line(error))


def _refusal(response: dict[str, Any], location: str, reason: str) -> StorageError:
    code = response.get("Error", {}).get("Code", "")
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status == _HTTP_INSUFFICIENT_STORAGE:
        return StoreFullError(f"No space left for {location}; free some and launch again: finished trials are kept.")
    if code == "NoSuchBucket":
        return StoreUnreachableError(f"There is no bucket for {location}; create it, or correct HPO_ARTIFACTS.")
    if code in _NO_ACCESS:
        return StoreUnreachableError(
            f"No access to {location}: {reason}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and their rights."
        )
    failure = ArtifactsAwayError if status >= _HTTP_SERVER_ERROR else StoreUnreachableError
    return failure(f"Cannot use {location}: {reason}; check HPO_ARTIFACTS and AWS_ENDPOINT_URL.")
