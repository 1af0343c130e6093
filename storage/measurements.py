"""Measurements: which images a pruned network classifies correctly, kept for other trials and studies."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, func, insert, inspect, select, true
from sqlalchemy.dialects import postgresql, sqlite

from storage.schema import MEASUREMENTS

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy.engine import Connection

__all__ = ["MOST_BYTES", "MeasurementRecord", "Volume", "forget", "recall", "remember", "volume"]

MOST_BYTES = 64 * 2**20
"""Of measurements that are read at once: on 1,000 images those of 5,900 trials with 20 rates, on 5,000 images those of
650 trials with 100."""

# Of a measurement, beyond its images: Python's objects.
_BYTES_BESIDE = 420
_N_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class MeasurementRecord:
    """What the store keeps of one pruned network.

    Attributes:
        subject: By which it is looked for: digest of the network, the images and the dtype, up to 32 hexadecimal
            digits, as the others.
        origin: Digest of everything but the masks that it depends on, rounding included; it holds where this is equal.
        mask: Digest of the masks.
        n_images: Evaluation images.
        correct: Whether each image is classified correctly, a bit an image, the first in the highest bit.
        parameters: Of the exact slim network.
        flops: Its multiply-adds for one image.
    """

    subject: str
    origin: str
    mask: str
    n_images: int
    correct: bytes
    parameters: int
    flops: int

    def __post_init__(self) -> None:
        if len(self.correct) != -(-self.n_images // 8):
            raise ValueError(f"`correct` must have a bit an image, but got {len(self.correct)} bytes for {self!r:.200}")


def remember(connection: Connection, records: Collection[MeasurementRecord]) -> None:
    """Write measurements, in a transaction; those that are there stay."""
    if not records:
        return
    created = _stored(datetime.now(UTC))
    # In one order: two studies that write the same ones at once must not wait for each other.
    ordered = sorted(records, key=lambda record: (record.subject, record.origin, record.mask))
    connection.execute(_insert(connection), [{**asdict(record), "created": created} for record in ordered])


def recall(connection: Connection, subjects: Collection[str], most_bytes: int = MOST_BYTES) -> list[MeasurementRecord]:
    """What is known of subjects, the newest first, none where the store is of an earlier release.

    Args:
        connection: To read with.
        subjects: As they were written.
        most_bytes: Older ones are left out beyond this much memory; a study of many images, rates and trials may well
            have written hundreds of megabytes.
    """
    if not inspect(connection).has_table(MEASUREMENTS.name):
        return []
    table = MEASUREMENTS.c
    columns = (table.subject, table.origin, table.mask, table.n_images, table.correct, table.parameters, table.flops)
    newest = select(*columns).where(table.subject.in_(subjects)).order_by(table.created.desc())
    records: list[MeasurementRecord] = []
    # A server must not send more than is taken.
    with connection.execution_options(yield_per=_N_AT_ONCE).execute(newest) as rows:
        for row in rows:
            most_bytes -= len(row.correct) + _BYTES_BESIDE
            if most_bytes < 0:
                break
            records.append(MeasurementRecord(*row))
    return records


@dataclass(frozen=True, slots=True)
class Volume:
    """How much there is.

    Attributes:
        n: Measurements.
        n_bytes: Of what they say about images.
    """

    n: int
    n_bytes: int

    def __bool__(self) -> bool:
        return self.n > 0


def volume(connection: Connection, before: datetime | None = None) -> Volume:
    """How many measurements there are, or have been written before a time; none in a store of an earlier release."""
    if not inspect(connection).has_table(MEASUREMENTS.name):
        return Volume(0, 0)
    n_bytes = func.coalesce(func.sum((MEASUREMENTS.c.n_images + 7) // 8), 0)
    row = connection.execute(select(func.count(), n_bytes).where(_written(before))).one()
    return Volume(row[0], int(row[1]))


def forget(connection: Connection, before: datetime) -> int:
    """Delete the measurements that have been written before a time; how many there were."""
    return connection.execute(delete(MEASUREMENTS).where(_written(before))).rowcount


def _written(before: datetime | None) -> Any:
    return true() if before is None else MEASUREMENTS.c.created < _stored(before)


def _stored(time: datetime) -> datetime:
    """Tables hold UTC without a zone."""
    return time.astimezone(UTC).replace(tzinfo=None)


def _insert(connection: Connection) -> Any:
    """The statement that passes over rows that are there."""
    match connection.dialect.name:
        case "postgresql":
            return postgresql.insert(MEASUREMENTS).on_conflict_do_nothing()
        case "sqlite":
            return sqlite.insert(MEASUREMENTS).on_conflict_do_nothing()
    return insert(MEASUREMENTS).prefix_with("IGNORE")  # MySQL and MariaDB
