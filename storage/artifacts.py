"""Records of artifacts, the files that belong to a study or a trial, in Optuna's format.

An artifact is a file named by its id, and a record of it among the system attributes of its owner.
"""

from __future__ import annotations

import json
import mimetypes
import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from optuna.storages._rdb import models
from sqlalchemy import delete, insert, select

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

__all__ = ["ArtifactRecord", "attach", "recorded_ids", "replace"]

_PREFIX = "artifacts:"
_REMOVED = json.dumps(json.dumps(None))  # what the dashboard leaves of a record
_DEFAULT_MIMETYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class ArtifactRecord:
    """What the store says of an artifact's file; the fields are Optuna's `ArtifactMeta`.

    Attributes:
        artifact_id: The name of its file.
        filename: The name under which it is offered for download.
        mimetype: Its type.
        encoding: Its `Content-Encoding`, such as `gzip`, or None.
    """

    artifact_id: str
    filename: str
    mimetype: str
    encoding: str | None

    @classmethod
    def new(cls, filename: str, mimetype: str | None = None) -> ArtifactRecord:
        """A record with an id of its own; without a type it is the one that the file name suggests."""
        guessed, encoding = mimetypes.guess_type(filename)
        return cls(str(uuid.uuid4()), filename, mimetype or guessed or _DEFAULT_MIMETYPE, encoding)


def attach(connection: Connection, owner: dict[str, int], records: tuple[ArtifactRecord, ...]) -> None:
    """Write records of artifacts, whatever the state of their owner.

    Args:
        connection: Inside a transaction.
        owner: `{"trial_id": ...}` or `{"study_id": ...}`, as Optuna numbers them.
        records: Artifacts of which the files have been written.
    """
    if not records:
        return
    rows = [
        # Optuna stores a JSON text inside a JSON text.
        {**owner, "key": _PREFIX + record.artifact_id, "value_json": json.dumps(json.dumps(asdict(record)))}
        for record in records
    ]
    connection.execute(insert(_attributes_of(owner)), rows)


def replace(connection: Connection, owner: dict[str, int], record: ArtifactRecord) -> tuple[str, ...]:
    """Write a record in place of those with the same file name, and return the ids of these."""
    table = _attributes_of(owner)
    [(id_name, owner_id)] = owner.items()
    of_owner = getattr(table, id_name) == owner_id
    stored = connection.execute(select(table.key, table.value_json).where(of_owner, table.key.startswith(_PREFIX)))
    former = tuple(key.removeprefix(_PREFIX) for key, value in stored if _filename(value) == record.filename)
    if former:
        connection.execute(delete(table).where(of_owner, table.key.in_([_PREFIX + each for each in former])))
    attach(connection, owner, (record,))
    return former


def recorded_ids(connection: Connection) -> set[str]:
    """The ids of all artifacts that some study or trial refers to."""
    ids: set[str] = set()
    for table in (models.StudySystemAttributeModel, models.TrialSystemAttributeModel):
        # Early versions of the dashboard put its name and the trial's id around the prefix.
        named = select(table.key).where(table.key.contains(_PREFIX), table.value_json != _REMOVED)
        ids.update(key.rpartition(":")[2] for key in connection.scalars(named))
    return ids


def _attributes_of(owner: dict[str, int]) -> Any:
    return models.TrialSystemAttributeModel if "trial_id" in owner else models.StudySystemAttributeModel


def _filename(value_json: str) -> str | None:
    record = json.loads(json.loads(value_json))  # null where the dashboard has removed the artifact
    return record["filename"] if record else None
