"""Pruning rates, read as decimals: floor(0.29 * 100) is 29, not 28."""

from __future__ import annotations

import itertools
from decimal import Decimal, InvalidOperation

from objectives.errors import PruningRatesError

__all__ = ["DEFAULT_RATES", "check_rates", "n_pruned", "parse_rates"]

DEFAULT_RATES = "0:0.95:0.05"

_MOST_RATES = 1000


def parse_rates(text: str) -> tuple[float, ...]:
    """Rates from `START:STOP:STEP` (both ends included) or from a comma-separated list.

    >>> parse_rates("0:0.2:0.05")
    (0.0, 0.05, 0.1, 0.15, 0.2)

    Raises:
        PruningRatesError: the rates don't start at 0, don't increase strictly, reach 1, or number fewer than two.
    """
    separator = ":" if ":" in text else ","
    try:
        values = [Decimal(part) for part in text.split(separator)]
    except InvalidOperation:
        values = []
    if not all(value.is_finite() for value in values) or len(values) < 2 or (separator == ":" and len(values) != 3):
        raise PruningRatesError(
            f"`--rates {text}` isn't START:STOP:STEP or a comma-separated list from 0 on; try {DEFAULT_RATES}."
        )
    return check_rates(tuple(map(float, _steps(text, *values) if separator == ":" else values)))


def _steps(text: str, start: Decimal, stop: Decimal, step: Decimal) -> list[Decimal]:
    if step <= 0:
        raise PruningRatesError(f"The step of `--rates {text}` must be positive.")
    if stop >= 1:
        raise PruningRatesError(f"`--rates {text}` must end below 1.")
    if (stop - start) / step >= _MOST_RATES:
        raise PruningRatesError(f"`--rates {text}` are more than {_MOST_RATES} rates; use a larger step.")
    return [start + index * step for index in range(int((stop - start) / step) + 1)]


def check_rates(rates: tuple[float, ...]) -> tuple[float, ...]:
    """The rates, if they increase strictly from 0 and stay below 1.

    Raises:
        PruningRatesError: they don't, or number fewer than two.
    """
    increasing = all(low < high for low, high in itertools.pairwise(rates))
    if len(rates) < 2 or rates[0] != 0 or not increasing or not rates[-1] < 1:
        raise PruningRatesError(
            f"Pruning rates must increase strictly from 0 and stay below 1, but got {', '.join(map(str, rates))}."
        )
    return rates


def n_pruned(rate: float, n_components: int) -> int:
    """Components pruned at a rate: floor(rate * n), the rate read as the decimal it is printed as."""
    return int(Decimal(str(rate)) * n_components)
