"""Executors: where trials are computed. Workers compute, the driver writes."""

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self

from hpo.errors import ConfigurationError
from search_spaces.composites import CompositeSpec
from search_spaces.suggestions import did_you_mean

if TYPE_CHECKING:
    from objectives.objective import Evaluation

__all__ = ["Evaluate", "Executor", "Images", "Job", "Outcome", "make_executor"]

Images = Literal["search", "confirmation"]

Evaluate = Callable[[CompositeSpec, Images], "Evaluation"]
"""What a worker does: from a composite to its evaluation on some images. Not thread-safe."""


@dataclass(frozen=True, slots=True)
class Job:
    """One evaluation to compute.

    Attributes:
        number: Number of the trial that it belongs to.
        composite: What to evaluate.
        images: The images to measure accuracy on.
    """

    number: int
    composite: CompositeSpec
    images: Images = "search"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job: an evaluation, or the reason why there is none.

    Attributes:
        job: What was to be computed.
        evaluation: What was computed.
        failure: Why it was not.
        by_composite: Whether the failure is the composite's own, so that another composite may well succeed.
    """

    job: Job
    evaluation: "Evaluation | None" = None
    failure: str | None = None
    by_composite: bool = False

    def __post_init__(self) -> None:
        if (self.evaluation is None) == (self.failure is None):
            raise ValueError(f"An outcome has either an evaluation or a failure, but got {self!r}.")


class Executor(Protocol):
    """Computes jobs, `n_workers` at a time, and knows no database.

    One thread submits and waits. A context manager: leaving it abandons the jobs that still run, within a second.
    """

    @property
    def n_workers(self) -> int:
        """How many jobs may be submitted before `wait` has to be called."""
        ...

    def submit(self, job: Job) -> None:
        """Start a job; returns at once."""
        ...

    def wait(self, timeout_s: float) -> Outcome | None:
        """The next job that has ended, in the order of ending; None if none has after `timeout_s`."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def make_executor(name: str, evaluate: Evaluate) -> Executor:
    """The executor of this name.

    Raises:
        ConfigurationError: No executor has this name.
    """
    from hpo.executors.local import LocalExecutor

    known = {"local": LocalExecutor}
    if name not in known:
        raise ConfigurationError(f"Unknown executor {name!r}.{did_you_mean(name, known)}")
    return known[name](evaluate)
