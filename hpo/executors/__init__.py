"""Executors: where trials are computed. Workers compute, the driver writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self

from search_spaces.choices import ImageSet
from search_spaces.criteria import Ranker

if TYPE_CHECKING:
    from hpo.config import LaunchConfiguration
    from hpo.problem import Problem
    from objectives.objective import Evaluation
    from objectives.racing import GivenUp, Race

__all__ = ["Cause", "Executor", "Job", "Outcome", "Worker", "make_executor"]

Cause = Literal["composite", "objective", "worker", "unstarted"]
"""Why a job has no evaluation.

composite: the composite's own failure, so that another composite may well succeed;
objective: any other error of the evaluation, or it took longer than a trial may;
worker: the process that computed it died;
unstarted: the process died, or was ended, before it began this job; the job is as good as new.
"""


@dataclass(frozen=True, slots=True)
class Job:
    """One evaluation to compute.

    Attributes:
        number: Number of the trial that it belongs to.
        composite: What to evaluate.
        images: The images to measure accuracy on.
        race: Against the best composite so far, on the search images; None evaluates exactly.
    """

    number: int
    composite: Ranker
    images: ImageSet = "search"
    race: "Race | None" = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job: an evaluation, a race that was lost, or the reason why there is neither.

    Attributes:
        job: What was to be computed.
        evaluation: What was computed.
        given_up: How it lost its race.
        failure: Why it was not.
        cause: Whose fault that is; None if nothing failed.
        unexpected: Whether no code of this project has raised the failure, so that it may be the worker's process that
            is broken, such as its CUDA context, and not the composite.
    """

    job: Job
    evaluation: "Evaluation | None" = None
    given_up: "GivenUp | None" = None
    failure: str | None = None
    cause: Cause | None = None
    unexpected: bool = False

    def __post_init__(self) -> None:
        n_given = sum(each is not None for each in (self.evaluation, self.given_up, self.failure))
        if n_given != 1 or (self.failure is None) != (self.cause is None):
            raise ValueError(
                "An outcome has an evaluation, a lost race or a failure, and a cause where it failed, "
                f"but got {self!r}."
            )


class Worker(Protocol):
    """What computes jobs, one at a time. Not thread-safe, but for `stage`."""

    @property
    def stage(self) -> str | None:
        """How far the job at work is, such as `35 % pruned`; None where there is nothing to say."""
        ...

    def prepare(self, composites: Sequence[Ranker]) -> None:
        """Compute what these composites share, if anything; `evaluate` is then called for each, in this order.

        May do nothing: no evaluation depends on it.
        """
        ...

    def evaluate(self, composite: Ranker, images: ImageSet) -> "Evaluation":
        """The composite's curve on these images; on confirmation images always in fp32.

        Raises:
            RelevanceError: The composite's own failure.
            TrainingError: Likewise: what it leaves can't be fine-tuned.
            PruningHPOError: Another failure.
        """
        ...

    def race(self, composite: Ranker, race: "Race") -> "Evaluation | GivenUp":
        """The composite's curve on the search images, unless it loses the race.

        Raises:
            RelevanceError: The composite's own failure.
            TrainingError: Likewise: what it leaves can't be fine-tuned.
            PruningHPOError: Another failure.
        """
        ...


class Executor(Protocol):
    """Computes batches of jobs with `n_workers` workers, and knows no database.

    One thread submits and waits. A context manager: leaving it abandons the jobs that still run; it may take seconds
    until the processes that compute them are gone.
    Every job that was submitted has one outcome, whatever happens to its worker.
    """

    @property
    def n_workers(self) -> int:
        """How many batches are computed at a time, where there is room; known, and fixed, once it is entered."""
        ...

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hand in a batch, which one worker computes in order, knowing all of it from the start; returns at once.

        Idle workers get it first; where there is none, it waits in a queue.
        """
        ...

    def wait(self, timeout_s: float) -> Outcome | None:
        """The next job that has ended, in the order of ending; None if none has after `timeout_s`.

        Raises:
            ExecutorError: No worker can be had any more.
        """
        ...

    def stages(self) -> Mapping[int, str]:
        """How far jobs at work are, by the number of their trials; of jobs of which nothing is known nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def make_executor(configuration: "LaunchConfiguration", problem: "Problem") -> Executor:
    """The executor that a configuration asks for; it starts when its context is entered.

    Raises:
        ExecutorError: It is not installed.
    """
    if configuration.executor == "ray":
        from hpo.executors.ray import RayExecutor

        return RayExecutor(configuration, problem.worker())
    from hpo.executors.local import LocalExecutor

    return LocalExecutor(problem)
