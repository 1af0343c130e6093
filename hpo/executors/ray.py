"""The Ray executor: warm workers in processes of their own, on one machine or many."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from hpo.config import LaunchConfiguration
from hpo.executors import Job, Outcome, Worker

__all__ = ["RayExecutor"]


class RayExecutor:
    """Computes batches in Ray actors."""

    def __init__(self, configuration: LaunchConfiguration, factory: Callable[[], Worker]) -> None:
        raise NotImplementedError

    @property
    def n_workers(self) -> int:
        """See `Executor.n_workers`."""
        raise NotImplementedError

    def submit(self, jobs: Sequence[Job]) -> None:
        """See `Executor.submit`."""
        raise NotImplementedError

    def wait(self, timeout_s: float) -> Outcome | None:
        """See `Executor.wait`."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
