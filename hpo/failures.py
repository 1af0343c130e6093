"""Failures of trials, and when there are too many to go on."""

from hpo.errors import TrialsFailedError
from hpo.in_flight import Asked

__all__ = ["FailureCount"]

_MOST_IN_A_ROW_PER_WORKER = 3
_MOST_AT_FIRST = 10


class FailureCount:
    """Ends a launch that only fails: a study must not be filled with trials that say nothing of their composites.

    Args:
        n_workers: How many trials can be expected to meet the same misfortune at once.
        some_work: Whether the study has complete trials.
    """

    def __init__(self, n_workers: int, *, some_work: bool) -> None:
        self._most_in_a_row = _MOST_IN_A_ROW_PER_WORKER * n_workers
        self._some_work = some_work
        self._n = 0
        self._n_in_a_row = 0

    def completed(self) -> None:
        """A trial is complete."""
        self._some_work = True
        self._n_in_a_row = 0

    def failed(self, asked: Asked, reason: str, *, by_composite: bool) -> None:
        """A trial has failed.

        Args:
            asked: The trial.
            reason: Why.
            by_composite: Whether the failure is its composite's own. Neighbours on a grid fail together; that alone
                must not end a search.

        Raises:
            TrialsFailedError: It is one too many.
        """
        self._n += 1
        self._n_in_a_row += not by_composite
        none_works = not self._some_work and self._n >= _MOST_AT_FIRST
        if none_works or self._n_in_a_row >= self._most_in_a_row:
            count = self._n if none_works else self._n_in_a_row
            raise TrialsFailedError(
                f"{count} trials in a row failed, the last one (trial {asked.number}, {asked.composite.label}) "
                f"because: {reason}"
            )
