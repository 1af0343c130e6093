"""Pruning rates, read as decimals: floor(0.29 * 100) is 29, not 28."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from objectives.errors import ObjectiveError

__all__ = ["DEFAULT_RATES", "PruningRatesError", "n_pruned", "parse_rates"]

DEFAULT_RATES = "0:0.95:0.05"


class PruningRatesError(ObjectiveError, ValueError):
    """Rates that don't increase strictly from 0 to below 1."""


def parse_rates(text: str) -> tuple[float, ...]:
    """Rates from `START:STOP:STEP` (both ends included) or from a comma-separated list.

    >>> parse_rates("0:0.2:0.05")
    (0.0, 0.05, 0.1, 0.15, 0.2)

    Raises:
        PruningRatesError: the rates don't start at 0, don't increase strictly, reach 1, or number fewer than two.
    """
    try:
        if ":" in text:
            start, stop, step = (Decimal(part) for part in text.split(":"))
            if not step > 0:
                raise PruningRatesError(f"The step of `--rates {text}` must be positive.")
            if not stop.is_finite() or stop >= 1:
                raise PruningRatesError(f"`--rates {text}` must end below 1.")
            rates = [start + index * step for index in range(int((stop - start) / step) + 1)]
        else:
            rates = [Decimal(part) for part in text.split(",")]
    except (InvalidOperation, ValueError) as error:
        if isinstance(error, PruningRatesError):
            raise
        raise PruningRatesError(
            f"`--rates {text}` isn't START:STOP:STEP or a comma-separated list; try 0:0.95:0.05."
        ) from None
    return check_rates(tuple(float(rate) for rate in rates))


def check_rates(rates: tuple[float, ...]) -> tuple[float, ...]:
    """The rates, if they increase strictly from 0 and stay below 1."""
    increasing = all(low < high for low, high in zip(rates, rates[1:], strict=False))
    if len(rates) < 2 or rates[0] != 0 or not increasing or not rates[-1] < 1:
        raise PruningRatesError(
            f"Pruning rates must increase strictly from 0 and stay below 1, but got {', '.join(map(str, rates))}."
        )
    return rates


def n_pruned(rate: float, n_components: int) -> int:
    """Components pruned at a rate: floor(rate * n), the rate read as the decimal it is printed as."""
    return int(Decimal(str(rate)) * n_components)
