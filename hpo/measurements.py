"""Measurements between the store, which keeps them, and the objective, which makes them."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from storage.measurements import MeasurementRecord

if TYPE_CHECKING:
    from objectives.objective import Evaluation
    from objectives.pruning.evaluation import KnownMeasurement

__all__ = ["known_by_origin", "records"]


def records(evaluation: "Evaluation", subject: str) -> tuple[MeasurementRecord, ...]:
    """What an evaluation has measured, as the store keeps it.

    Args:
        evaluation: Of a trial.
        subject: `Problem.subject` of the images that it is of.
    """
    return tuple(
        MeasurementRecord(
            subject,
            evaluation.origin,
            known.mask,
            known.n_images,
            known.correct,
            known.cost.parameters,
            known.cost.flops,
        )
        for known in evaluation.measured
    )


def known_by_origin(records: Iterable[MeasurementRecord]) -> "Mapping[str, list[KnownMeasurement]]":
    """What the store knows, as `Objective.learn` takes it."""
    from objectives.pruning.evaluation import KnownMeasurement
    from objectives.pruning.slimming import Cost

    known: dict[str, list[KnownMeasurement]] = {}
    for record in records:
        measurement = KnownMeasurement(
            record.mask, record.n_images, record.correct, Cost(record.parameters, record.flops)
        )
        known.setdefault(record.origin, []).append(measurement)
    return known
