"""Identity of a study: what must be equal for two launches to continue the same search."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["ABSENT", "Difference", "differences"]

_N_SHOWN = 60


class _Absent:
    """The value of a key that one side doesn't have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT: Final = _Absent()


@dataclass(frozen=True, slots=True)
class Difference:
    """A value in which two identities differ.

    Attributes:
        key: Where, with dots between levels and positions in brackets.
        stored: The store's JSON value, or `ABSENT`.
        asked: The launch's JSON value, or `ABSENT`.
    """

    key: str
    stored: Any
    asked: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.stored)} -> {_shown(self.asked)}"


def differences(stored: Any, asked: Any) -> tuple[Difference, ...]:
    """Where two JSON values differ, in the order of their keys.

    Tuples count as lists, as JSON has them; `true` is not 1, but 1 is 1.0.
    """
    return tuple(_compare("", stored, asked))


def _compare(key: str, stored: Any, asked: Any) -> Iterator[Difference]:
    match stored, asked:
        case Mapping(), Mapping():
            for name in sorted({*stored, *asked}):
                path = f"{key}.{name}" if key else str(name)
                yield from _compare(path, stored.get(name, ABSENT), asked.get(name, ABSENT))
        case (list() | tuple(), list() | tuple()) if len(stored) == len(asked):
            for position, pair in enumerate(zip(stored, asked, strict=True)):
                yield from _compare(f"{key}[{position}]", *pair)
        case _:
            if isinstance(stored, bool) is not isinstance(asked, bool) or stored != asked:
                yield Difference(key, stored, asked)


def _shown(value: Any) -> str:
    if value is ABSENT:
        return repr(value)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _N_SHOWN else f"{text[: _N_SHOWN - 1]}…"
