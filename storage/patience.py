"""Patience with a database that is away: a server that restarts, a network that drops, a file that is held."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeVar

from tenacity import Retrying, retry_if_exception_type, wait_exponential

from storage.errors import StorageError, StoreUnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable

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

    Thread-safe. Every call has its own time, which begins with its first failure: what others can still do, as who
    reads where writes are held up, does not prolong it. The time of a call within another is that of the outer one.
    An outage is told once for all threads. Where patience has ended, none waits again before something has succeeded.

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
        self._within = threading.local()
        self._n_waiting = 0
        self._told_since = 0.0
        self._has_ended = False

    def wait_out(self, attempt: Callable[[bool], _T]) -> _T:
        """What an attempt returns, made again for as long as the store is away and patience lasts.

        Args:
            attempt: Called with whether it is made again; then the former may have been carried out all the same,
                because an answer can be lost too.

        Raises:
            StoreUnreachableError: The store was away for too long.
            StorageError: Whatever else an attempt raises, or what it last raised where the waiting was stopped.
        """
        if getattr(self._within, "a_call", False):
            return attempt(False)
        call = _Call()
        attempts = Retrying(
            retry=retry_if_exception_type(self._passing),
            wait=wait_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S),
            stop=lambda state: self._stop.is_set() or self._has_ended or call.away_s >= self._patience.timeout_s,
            sleep=lambda seconds: self._sleep(call, seconds),
            retry_error_callback=lambda state: self._too_long(call),
        )
        self._within.a_call = True
        try:
            result: _T = attempts(self._once, attempt, call)
        finally:
            self._within.a_call = False
            self._leave(call)
        return result

    def _once(self, attempt: Callable[[bool], _T], call: _Call) -> _T:
        again = call.since is not None
        try:
            result = attempt(again)
        except self._passing as failure:
            call.failure = failure
            if not again:
                call.since = time.monotonic()
                self._enter(failure)
            raise
        except Exception:
            call.failure = None
            raise
        call.failure = None
        return result

    def _sleep(self, call: _Call, seconds: float) -> None:
        if self._stop.wait(seconds):
            assert call.failure is not None, "only failures are retried"
            raise call.failure

    def _enter(self, failure: Exception) -> None:
        with self._lock:
            self._n_waiting += 1
            if self._n_waiting > 1 or self._has_ended:
                return
            self._told_since = time.monotonic()
        if self._patience.timeout_s > 0:
            self._patience.notify(f"{failure} Waiting for it, at most {self._patience.timeout_s:g} s.")

    def _leave(self, call: _Call) -> None:
        """Tell that the store is back, if it is and nobody waits any more."""
        with self._lock:
            if call.failure is None:
                self._has_ended = False
            if call.since is None:
                return
            self._n_waiting -= 1
            is_back = call.failure is None and self._n_waiting == 0
            away_s = time.monotonic() - self._told_since
        if is_back and self._patience.timeout_s > 0:
            self._patience.notify(f"The store {self._where} is back after {away_s:.1f} s; the study goes on.")

    def _too_long(self, call: _Call) -> NoReturn:
        """Raise what patience ends in."""
        assert call.failure is not None, "patience ends with a failure"
        if self._stop.is_set() or self._patience.timeout_s <= 0:
            raise call.failure
        with self._lock:
            self._has_ended = True
        raise StoreUnreachableError(
            f"The store {self._where} has been away for longer than --store-timeout ({self._patience.timeout_s:g} s); "
            "finished trials are kept: launch again once it is back."
        ) from call.failure


@dataclass(slots=True)
class _Call:
    """An outermost call of `wait_out`.

    Attributes:
        since: When its first attempt failed, in seconds of the monotonic clock; None before.
        failure: What its last attempt failed with, if that may pass.
    """

    since: float | None = None
    failure: StorageError | None = None

    @property
    def away_s(self) -> float:
        return 0.0 if self.since is None else time.monotonic() - self.since
