"""Leftovers: trials that stay RUNNING, files that nothing refers to, measurements that nobody needs any more."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from storage.artifact_files import is_claimed
from storage.artifacts import recorded_ids
from storage.errors import ArtifactsMismatchError
from storage.measurements import Volume, volume
from storage.schema import store_id

if TYPE_CHECKING:
    from storage.artifact_files import StoredFile
    from storage.store import StudyStore

__all__ = ["Leftovers", "OrphanedTrials", "find_leftovers", "release_orphans", "remove_files"]

_HAS_LEASES = {"postgresql", "sqlite"}


@dataclass(frozen=True, slots=True)
class OrphanedTrials:
    """Trials of a study that are RUNNING though nobody drives it.

    Attributes:
        study: The study's name.
        numbers: The trials' numbers, in order.
    """

    study: str
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What may be cleared away.

    Attributes:
        orphans: Of each study that has any.
        files: Files that no study or trial refers to.
        uploads: What interrupted writes of files have left.
        measurements: Those that were written long ago.
        measured_before: When, where somebody has asked for them.
    """

    orphans: tuple[OrphanedTrials, ...]
    files: tuple[StoredFile, ...]
    uploads: tuple[StoredFile, ...]
    measurements: Volume
    measured_before: datetime | None

    def __bool__(self) -> bool:
        return bool(self.orphans or self.files or self.uploads or self.measurements)


def find_leftovers(store: StudyStore, older_than: timedelta, measured_before: datetime | None = None) -> Leftovers:
    """Look for leftovers, and change nothing.

    Orphans are looked for where the lease reaches every machine, or the file can be on one only.

    Args:
        store: Where to look.
        older_than: Files that were written later are left alone: a driver may be about to write their records.
        measured_before: Measurements that were written later are left alone; all are where it is None.

    Raises:
        ArtifactsMismatchError: The files are another store's, or may be: nothing says whose, and the store refers to
            none; or it does refer to some, and not one of them is there.
    """
    # Files first: the record of an artifact is written after its file.
    stored = list(store.artifacts.stored())
    with store.rdb.engine.connect() as connection:
        recorded, identity = recorded_ids(connection), store_id(connection)
        old_measurements = Volume(0, 0) if measured_before is None else volume(connection, measured_before)
    files = store.artifacts
    is_ours = not files.is_placed or (identity is not None and is_claimed(files, identity))
    if stored and (recorded or not is_ours) and recorded.isdisjoint(file.artifact_id for file in stored):
        raise ArtifactsMismatchError(
            f"None of the {len(recorded)} artifacts of {store.url_masked} is in {store.artifacts.location}, but others "
            "are: they belong to another store; correct HPO_ARTIFACTS."
        )
    now = datetime.now(UTC)
    old = [file for file in stored if now - file.written > older_than]
    return Leftovers(
        tuple(_orphans(store)),
        tuple(file for file in old if file.upload is None and file.artifact_id not in recorded),
        tuple(file for file in old if file.upload is not None),
        old_measurements,
        measured_before,
    )


def _orphans(store: StudyStore) -> list[OrphanedTrials]:
    if store.rdb.engine.dialect.name not in _HAS_LEASES:
        return []
    found = []
    for summary in store.summaries():
        if summary.n_trials.get(TrialState.RUNNING) and store.lease_holder(summary.name) is None:
            running = store.load(summary.name).get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            # A driver may have ended in between, or begun.
            if not running or store.lease_holder(summary.name) is not None:
                continue
            found.append(OrphanedTrials(summary.name, tuple(trial.number for trial in running)))
    return found


def release_orphans(store: StudyStore, orphans: OrphanedTrials) -> tuple[int, ...]:
    """Make the orphans of a study WAITING, holding its lease; the numbers of those that were.

    Raises:
        StudyInUseError: Somebody drives the study by now, and has adopted them.
    """
    with store.lease(orphans.study):
        return tuple(store.adopt_orphans(store.load(orphans.study)))


def remove_files(store: StudyStore, files: tuple[StoredFile, ...]) -> tuple[StoredFile, ...]:
    """Remove those of some files that nothing refers to even now; which they were.

    Raises:
        StorageError: A file cannot be removed; those before it have been.
    """
    with store.rdb.engine.connect() as connection:
        recorded = recorded_ids(connection)
    removed = []
    for file in files:
        if file.upload is not None or file.artifact_id not in recorded:
            store.artifacts.delete(file)
            removed.append(file)
    return tuple(removed)
