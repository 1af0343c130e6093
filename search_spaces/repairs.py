"""A repair: how a pruned network gets accuracy back from the reference images alone."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from search_spaces.errors import RepairSpecError
from search_spaces.suggestions import did_you_mean

__all__ = ["NO_REPAIR", "REPAIRS", "RepairSpec"]

REPAIRS: Mapping[str, str] = {
    "none": "pruned weights stay as they are",
    "bn": "mean and standard deviation of each channel as in the original network",
    "refit": "weights and biases of each layer by ridge regression on the original network's outputs",
}
"""What each repair does."""

_WRITTEN = re.compile(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*")


@dataclass(frozen=True, slots=True)
class RepairSpec:
    """A repair and its strength; equal specs are equal repairs.

        >>> str(RepairSpec("refit", 0.1)), str(RepairSpec("refit"))
        ('refit(0.1)', 'refit')

    Attributes:
        method: Of `REPAIRS`.
        strength: Of the pull towards the old weights, above 0; None chooses it from the reference images, and is the
            only one of `none`.

    Raises:
        RepairSpecError: No repair has this name, or the strength is out of range.
    """

    method: str = "none"
    strength: float | None = None

    def __post_init__(self) -> None:
        if self.method not in REPAIRS:
            raise RepairSpecError(f"Unknown repair {self.method!r}.{did_you_mean(str(self.method), REPAIRS)}")
        if self.strength is None:
            return
        if self.method == "none":
            raise RepairSpecError(
                f"Repair none takes no strength, but got {self.strength!r}; choose bn or refit, or omit it."
            )
        strength = self.strength
        is_number = isinstance(strength, int | float) and not isinstance(strength, bool)
        if not (is_number and 0 < strength < math.inf):
            raise RepairSpecError(f"The strength of a repair must be a number above 0, but got {strength!r}.")
        object.__setattr__(self, "strength", float(strength))

    def __bool__(self) -> bool:
        return self.method != "none"

    def to_json(self) -> dict[str, Any]:
        """JSON form, as `{"method": "refit", "strength": null}`."""
        return {"method": self.method, "strength": self.strength}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "RepairSpec":
        """Inverse of `to_json`.

        Raises:
            RepairSpecError: `value` is no repair.
        """
        if not isinstance(value, Mapping) or not {"method"} <= set(value) <= {"method", "strength"}:
            raise RepairSpecError(f"A repair is an object with 'method' and 'strength', but got {value!r}.")
        return cls(**value)

    @classmethod
    def parse(cls, text: str) -> "RepairSpec":
        """Inverse of `str`.

        Raises:
            RepairSpecError: The text can't be read.
        """
        match = _WRITTEN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise RepairSpecError(f"Unknown repair {text!r}.{did_you_mean(str(text), REPAIRS)}")
        method, strength = match.groups()
        try:
            return cls(method, None if strength is None else float(strength))
        except ValueError as error:
            if isinstance(error, RepairSpecError):
                raise
            raise RepairSpecError(f"Repair {text.strip()!r} has a strength that is no number.") from error

    def __str__(self) -> str:
        return self.method if self.strength is None else f"{self.method}({repr(self.strength).removesuffix('.0')})"


NO_REPAIR = RepairSpec()
"""Pruned networks stay as they are."""
