"""The problem of a study: the network, the images and the objective that a configuration names."""

from typing import TYPE_CHECKING, Any, Protocol

from hpo.config import LaunchConfiguration, is_import_path
from hpo.errors import ImportRefusedError
from hpo.executors import Images

if TYPE_CHECKING:
    from collections.abc import Mapping

    from objectives.datasets import Task
    from objectives.models import LoadedModel
    from objectives.objective import Evaluation, Objective
    from search_spaces.composites import CompositeSpec

__all__ = ["LoadedProblem", "Problem", "load_model_and_task", "load_problem", "refuse_imports"]


class Problem(Protocol):
    """What a study optimises. `evaluate` is called by one thread; everything else is fixed."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class of the task, in the order of a curve's class accuracies."""
        ...

    @property
    def n_confirmation_images(self) -> int:
        """Number of images that the search never sees."""
        ...

    @property
    def unpruned_accuracy(self) -> float:
        """Accuracy of the network as it is, on the search images."""
        ...

    def identity(self) -> dict[str, Any]:
        """Everything about the problem that a value depends on, as JSON."""
        ...

    def evaluate(self, composite: "CompositeSpec", images: Images) -> "Evaluation":
        """The composite's curve on these images; on confirmation images always in fp32."""
        ...


class LoadedProblem:
    """The problem of a real network on real images."""

    def __init__(self, model: "LoadedModel", task: "Task", objective: "Objective") -> None:
        self.model = model
        self.task = task
        self.objective = objective

    @property
    def class_names(self) -> tuple[str, ...]:
        """See `Problem.class_names`."""
        return tuple(self.task.class_names)

    @property
    def n_confirmation_images(self) -> int:
        """See `Problem.n_confirmation_images`."""
        return len(self.task.confirmation)

    @property
    def unpruned_accuracy(self) -> float:
        """See `Problem.unpruned_accuracy`."""
        return self.objective.unpruned_accuracy

    def identity(self) -> dict[str, Any]:
        """See `Problem.identity`."""
        identity = self.objective.identity()
        # Where images lie is not what they are: a folder may be moved.
        return {**identity, "data": identity["data"]["fingerprint"]}

    def evaluate(self, composite: "CompositeSpec", images: Images) -> "Evaluation":
        """See `Problem.evaluate`."""
        return self.objective.evaluate(composite, images)


def load_problem(
    configuration: LaunchConfiguration, layer_groups: "Mapping[str, tuple[str, ...]] | None"
) -> LoadedProblem:
    """Load what the configuration names.

    Args:
        configuration: A resolved configuration.
        layer_groups: Name patterns of the layers of each group; None groups layers by depth.

    Raises:
        ObjectiveError: The network, the images or their combination cannot be used.
    """
    from objectives.objective import Objective, ObjectiveOptions

    model, task = load_model_and_task(configuration)
    options = ObjectiveOptions(
        rates=configuration.rates,
        abs_scope=configuration.abs_scope,
        output_relevance=configuration.output_relevance,
        dtype=configuration.dtype,
        batch_size=configuration.batch_size,
        device=configuration.device,
        layer_groups=layer_groups,
    )
    return LoadedProblem(model, task, Objective(model, task, options))


def load_model_and_task(configuration: LaunchConfiguration) -> "tuple[LoadedModel, Task]":
    """The network and the images that the configuration names.

    Raises:
        ObjectiveError: They cannot be used.
    """
    from objectives.datasets import load_task
    from objectives.models import load_model

    model = load_model(
        configuration.model,
        checkpoint=configuration.checkpoint,
        options=dict(configuration.model_options),
        size=configuration.size,
        mean=configuration.mean,
        std=configuration.std,
        crop=configuration.crop,
        interpolation=configuration.interpolation,
    )
    task = load_task(
        configuration.data,
        model,
        classes=configuration.classes,
        references_per_class=configuration.references_per_class,
        evaluation_images=configuration.evaluation_images,
        confirmation_share=configuration.confirmation_share,
        seed=configuration.seed,
        class_map=configuration.class_map,
    )
    return model, task


def refuse_imports(configuration: LaunchConfiguration, origin: str) -> None:
    """Refuse a saved configuration whose loading would import code that this command line does not name.

    Args:
        configuration: A configuration from a store or a document.
        origin: What it is from, such as `study 'digits'`.

    Raises:
        ImportRefusedError: It names an import path.
    """
    for option in ("model", "data", "space"):
        path = getattr(configuration, option)
        if is_import_path(path):
            raise ImportRefusedError(
                f"{origin.capitalize()} names the import path {path!r}, which is not imported from there; "
                f"pass `--{option} {path}` if you trust it."
            )
