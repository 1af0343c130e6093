"""Elastic networks from the command line: `hpo prune --elastic`."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.errors import ConfigurationError
from hpo.problem import LoadedProblem, load_training_images
from hpo.progress import Progress
from search_spaces.procedures import BATCH_SIZE, LEARNING_RATE
from search_spaces.repairs import NO_REPAIR, RepairSpec

if TYPE_CHECKING:
    from objectives.elastic.prune import ElasticReport
    from objectives.training import Epoch
    from search_spaces.criteria import Ranker

__all__ = ["Growing", "make_elastic"]


@dataclass(frozen=True, slots=True)
class Growing:
    """The training of an elastic network.

    Attributes:
        n_epochs: Of each level; 0 for none.
        learning_rate: The largest of the cosine schedule.
        images_per_class: Training images; None for the reference images.
        repair: Of the smallest level before its training.
    """

    n_epochs: int = 0
    learning_rate: float = LEARNING_RATE
    images_per_class: int | None = None
    repair: RepairSpec = NO_REPAIR


def make_elastic(
    problem: LoadedProblem,
    ranker: "Ranker",
    levels: Sequence[float],
    output: Path,
    coupled: bool,
    growing: Growing,
    given: Container[str],
    progress: Progress,
) -> "ElasticReport":
    """Write an elastic network of a problem.

    Args:
        problem: Its network is pruned by its procedure.
        ranker: Composite or criterion.
        levels: Sparsities of all but the whole network, increasing.
        output: New directory.
        coupled: Remove whole coupled groups.
        growing: Training.
        given: As for `hpo.problem.load_model_and_task`.
        progress: Whom to tell how far it is.

    Raises:
        ConfigurationError: The procedure adapts each size on its own.
        ObjectiveError: Training or output can't be as they are asked for.
    """
    if problem.task.split is not None:
        raise ConfigurationError(
            "`--elastic` makes sizes that share their weights, but procedure task_relevant adapts each of its own; "
            "pass `--rate`, or another procedure."
        )
    from objectives.elastic.prune import Growth, prune_elastic
    from objectives.training import GRADIENT_NORM, TrainingOptions

    growth = None
    if growing.n_epochs:
        images, n = problem.task.references, growing.images_per_class
        if n is not None:
            progress.phase("Loading training images")
            images = load_training_images(problem.configuration, problem.model, n, given)
        options = TrainingOptions(
            growing.n_epochs,
            BATCH_SIZE,
            growing.learning_rate,
            schedule="cosine",
            max_gradient_norm=GRADIENT_NORM,
            seed=problem.configuration.seed,
        )
        growth = Growth(images, options, growing.repair)
    n_levels = len(levels) + 1

    def grown(level: int, epoch: "Epoch") -> None:
        done = (n_levels - 1 - level) * epoch.n_epochs + epoch.number
        progress.phase(f"Growing level {level}", n_levels * epoch.n_epochs, done)

    progress.phase("Pruning")
    return prune_elastic(
        problem.objective,
        ranker,
        levels=levels,
        output=output,
        coupled=coupled,
        growth=growth,
        document=problem.document,
        on_epoch=grown,
    )
