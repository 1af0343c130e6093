"""Records: what a procedure's steps have come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["StepRecord"]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The network at the end of a step, or before the first one.

    Attributes:
        n_pruned: components that are gone.
        accuracy: on the images that the curve is measured on.
        loss: mean cross entropy on the reference images, from which relevance, and a repair, are computed.
        parameters: of the exact slim network.
        flops: its multiply-adds for one image.
        left: components left, layer -> number, in forward order.
        accuracy_task: on the evaluation images of the task P, before the network was adapted to new data; None where
            the procedure adapts none.
    """

    n_pruned: int
    accuracy: float
    loss: float
    parameters: int
    flops: int
    left: Mapping[str, int]
    accuracy_task: float | None = None

    @property
    def n_components(self) -> int:
        """Of the unpruned network."""
        return self.n_pruned + sum(self.left.values())

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> StepRecord:
        """Inverse of `to_json`."""
        return cls(**document)
