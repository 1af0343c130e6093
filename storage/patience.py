"""Patience with a database that is away: a server that restarts, a network that drops, a file that is held."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, NoReturn, TypeVar

from tenacity import Retrying, retry_if_exception_type, wait_exponential

from storage.errors import StorageError, StoreUnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tenacity import RetryCallState

__all__ = ["IMPATIENT", "Outages", "Patience"]

_T = TypeVar("_T")
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0
_log = logging.getLogger("hpo")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a store that is away.

    Attributes:
        timeout_s: The longest outage to wait out; 0 waits for none.
        stop: Ends the waiting at once; what failed is raised then.
        notify: Told in a sentence when an outage begins, and when it is over.
    """

    timeout_s: float = 0.0
    stop: threading.Event | None = None
    notify: Callable[[str], None] = _log.warning


IMPATIENT = Patience()
"""Waits for nothing."""


class Outages:
    """Waits out the outages of a store, with longer and longer pauses.

    Thread-safe: an outage is one for all threads, and told once.

    Args:
        patience: How long.
        where: The store's URL with its password masked.
        passing: The errors that may pass by themselves.
    """

    def __init__(self, patience: Patience, where: str, passing: tuple[type[StorageError], ...]) -> None:
        self._patience = patience
        self._where = where
        self._passing = passing
        self._stop = patience.stop or threading.Event()
        self._lock = threading.Lock()
        self._since: float | None = None

    def wait_out(self, attempt: Callable[[bool], _T]) -> _T:
        """What an attempt returns, made again for as long as the store is away and patience lasts.

        Args:
            attempt: Called with whether it is made again; then the former may have been carried out all the same,
                because an answer can be lost too.

        Raises:
            StoreUnreachableError: The store was away for too long.
            StorageError: Whatever else an attempt raises, or what it last raised where the waiting was stopped.
        """
        failures: list[BaseException] = []

        def sleep(seconds: float) -> None:
            if self._stop.wait(seconds):
                raise failures[-1]

        def note(state: RetryCallState) -> None:
            assert state.outcome is not None
            failure = state.outcome.exception()
            assert failure is not None, "only failures are retried"
            failures.append(failure)

        attempts = Retrying(
            retry=retry_if_exception_type(self._passing),
            wait=wait_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S),
            stop=self._give_up,
            before_sleep=note,
            sleep=sleep,
            retry_error_callback=self._too_long,
        )
        result: _T = attempts(self._once, attempt, count())
        return result

    def _once(self, attempt: Callable[[bool], _T], numbers: Iterator[int]) -> _T:
        try:
            result = attempt(next(numbers) > 0)
        except self._passing as failure:
            self._begin(failure)
            raise
        except Exception:
            self._end()
            raise
        self._end()
        return result

    def _begin(self, failure: Exception) -> None:
        with self._lock:
            if self._since is not None:
                return
            self._since = time.monotonic()
        if self._patience.timeout_s > 0:
            self._patience.notify(f"{failure} Waiting for it, at most {self._patience.timeout_s:g} s.")

    def _end(self) -> None:
        with self._lock:
            since, self._since = self._since, None
        if since is not None and self._patience.timeout_s > 0:
            away_s = time.monotonic() - since
            self._patience.notify(f"The store {self._where} is back after {away_s:.1f} s; the study goes on.")

    def _away_s(self) -> float:
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def _give_up(self, state: RetryCallState) -> bool:
        return self._stop.is_set() or self._away_s() >= self._patience.timeout_s

    def _too_long(self, state: RetryCallState) -> NoReturn:
        """Raise what patience ends in."""
        assert state.outcome is not None
        failure = state.outcome.exception()
        assert failure is not None, "patience ends with a failure"
        if self._stop.is_set() or self._patience.timeout_s <= 0:
            raise failure
        raise StoreUnreachableError(
            f"The store {self._where} has been away for longer than --store-timeout ({self._patience.timeout_s:g} s); "
            "finished trials are kept: launch again once it is back."
        ) from failure
