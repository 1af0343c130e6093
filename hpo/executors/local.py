"""The local executor: one worker thread in this process."""

import queue
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from hpo.executors import Job, Outcome, Worker
from hpo.executors.computation import compute, prepare

__all__ = ["LocalExecutor"]


class LocalExecutor:
    """Computes one job at a time on a thread of its own.

    The driver's thread stays free for signals: Ctrl-C need not wait for a backward pass to return. A job that runs when
    the executor is left is abandoned; its thread is a daemon and ends with the process.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._batches: queue.SimpleQueue[Sequence[Job] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._at_work: Job | None = None
        self._n_open = 0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._work, name="trial-worker", daemon=True)

    @property
    def n_workers(self) -> int:
        """See `Executor.n_workers`."""
        return 1

    def submit(self, jobs: Sequence[Job]) -> None:
        """See `Executor.submit`."""
        self._n_open += len(jobs)
        self._batches.put(jobs)

    def wait(self, timeout_s: float) -> Outcome | None:
        """See `Executor.wait`."""
        try:
            outcome = self._outcomes.get(timeout=timeout_s)
        except queue.Empty:
            return None
        self._n_open -= 1
        return outcome

    def stages(self) -> Mapping[int, str]:
        """See `Executor.stages`."""
        job, stage = self._at_work, self._worker.stage
        return {} if job is None or stage is None else {job.number: stage}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left.set()
        self._batches.put(None)
        if not self._n_open:
            # A thread that still frees its tensors when the interpreter ends aborts the process.
            self._thread.join()

    def _work(self) -> None:
        while (jobs := self._batches.get()) is not None and not self._left.is_set():
            prepare(self._worker, jobs)
            for job in jobs:
                if self._left.is_set():
                    return
                self._at_work = job
                outcome = compute(self._worker, job)
                self._at_work = None
                self._outcomes.put(outcome)
