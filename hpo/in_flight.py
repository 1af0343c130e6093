"""Trials in flight: asked of the study, and not told yet."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import Trial

from search_spaces.criteria import Ranker

__all__ = ["Asked", "InFlight"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A running trial; `heuristic` is its heuristic's name, None for a search trial."""

    trial: Trial
    composite: Ranker
    heuristic: str | None = None

    @property
    def number(self) -> int:
        """The trial's number in the study."""
        return self.trial.number

    @property
    def label(self) -> str:
        """The composite, and which heuristic it is."""
        return self.composite.label if self.heuristic is None else f"{self.heuristic}: {self.composite.label}"

    @property
    def attributes(self) -> dict[str, Any]:
        """User attributes that say what the trial is."""
        role = {"role": "search"} if self.heuristic is None else {"role": "heuristic", "heuristic": self.heuristic}
        return {**role, "composite": self.composite.to_json()}


class InFlight:
    """The trials that workers compute, in batches, and those parked behind one that has the same composite.

    No composite is computed twice at a time: the parked trials are told what the first one finds. Not thread-safe.
    """

    def __init__(self) -> None:
        self._computed: dict[int, Asked] = {}
        self._parked: dict[str, list[Asked]] = {}
        self._batches: list[set[int]] = []

    def __bool__(self) -> bool:
        return bool(self._computed)

    def __getitem__(self, number: int) -> Asked:
        """The trial of this number that is computed."""
        return self._computed[number]

    @property
    def n_batches(self) -> int:
        """How many batches have trials that are still to be computed."""
        return len(self._batches)

    @property
    def n_parked(self) -> int:
        """How many trials wait for one of the same composite."""
        return sum(map(len, self._parked.values()))

    def add(self, asked: Asked) -> bool:
        """Take a trial in; whether it is to be computed, and not parked."""
        if asked.composite.key in self._parked:
            self._parked[asked.composite.key].append(asked)
            return False
        self._parked[asked.composite.key] = []
        self._computed[asked.number] = asked
        return True

    def submit(self, batch: Sequence[Asked]) -> None:
        """Note that these trials go to one worker."""
        self._batches.append({asked.number for asked in batch})

    def remove(self, asked: Asked) -> list[Asked]:
        """Let go of a trial that is computed no more, and of those parked behind it, which are returned."""
        del self._computed[asked.number]
        for batch in self._batches:
            batch.discard(asked.number)
        self._batches = [batch for batch in self._batches if batch]
        return self._parked.pop(asked.composite.key)
