"""The local executor: one worker thread in this process."""

import logging
import queue
import threading
from types import TracebackType
from typing import Self

from hpo.executors import Evaluate, Job, Outcome
from objectives.errors import RelevanceError
from search_spaces.errors import PruningHPOError

__all__ = ["LocalExecutor"]

_log = logging.getLogger(__name__)


class LocalExecutor:
    """Computes one job at a time on a thread of its own.

    The driver's thread stays free for signals: Ctrl-C need not wait for a backward pass to return. A job that runs when
    the executor is left is abandoned; its thread is a daemon and ends with the process.
    """

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="trial-worker", daemon=True)

    @property
    def n_workers(self) -> int:
        """See `Executor.n_workers`."""
        return 1

    def submit(self, job: Job) -> None:
        """See `Executor.submit`."""
        self._jobs.put(job)

    def wait(self, timeout_s: float) -> Outcome | None:
        """See `Executor.wait`."""
        try:
            return self._outcomes.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._outcomes.put(self._outcome(job))

    def _outcome(self, job: Job) -> Outcome:
        try:
            return Outcome(job, evaluation=self._evaluate(job.composite, job.images))
        except RelevanceError as error:
            return Outcome(job, failure=str(error), by_composite=True)
        except PruningHPOError as error:
            return Outcome(job, failure=str(error))
        except BaseException as error:  # whatever a network does, even `sys.exit`, this thread must answer
            _log.debug("Trial %d failed.", job.number, exc_info=True)
            return Outcome(job, failure=f"{type(error).__name__}: {error}")
