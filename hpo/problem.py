"""The problem of a study: the network, the images and the objective that a configuration names."""

import hashlib
import json
import platform
import shlex
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

from hpo.config import LaunchConfiguration
from hpo.errors import ConfigurationError, ImportRefusedError
from hpo.executors import Worker
from hpo.measurements import known_by_origin
from search_spaces.choices import ImageSet
from search_spaces.imports import Named, is_import_path, runs_code
from search_spaces.procedures import TaskRelevant

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping, Sequence

    from objectives.datasets import LabelledImages, Task
    from objectives.models import LoadedModel
    from objectives.objective import Evaluation, Objective, ObjectiveOptions
    from objectives.pruning.evaluation import KnownMeasurement
    from objectives.racing import GivenUp, Race
    from search_spaces.criteria import Ranker
    from search_spaces.documents import CompositeDocument
    from search_spaces.spaces import SearchSpace
    from storage.measurements import MeasurementRecord

__all__ = [
    "LoadedProblem",
    "Problem",
    "default_space",
    "load_model_and_task",
    "load_network",
    "load_problem",
    "load_training_images",
    "refuse_imports",
    "refuse_space",
]

# Of trials that were killed and never asked for again.
_CHECKPOINTS_KEPT = timedelta(days=7)
_VERSIONED = ("numpy", "optuna", "pruning-hpo", "timm", "torch", "zennit")


class Problem(Worker, Protocol):
    """What a study optimises. As a worker it is used by one thread; everything else is fixed."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class that has search images, in the order of a curve's class accuracies."""
        ...

    @property
    def n_confirmation_images(self) -> int:
        """Number of images that the search never sees."""
        ...

    @property
    def has_attention(self) -> bool:
        """Whether composites need a rule for attention."""
        ...

    def identity(self) -> dict[str, Any]:
        """Everything about the problem that a value depends on, as JSON."""
        ...

    def describe(self) -> dict[str, Any]:
        """The part of an export document that all trials of a study share, as JSON."""
        ...

    def subject(self, images: ImageSet) -> str:
        """By what measurements on these images are looked for in the store: the same on every machine."""
        ...

    def worker(self) -> "Callable[[], Worker]":
        """What makes a worker of this problem in another process; can be pickled."""
        ...


class LoadedProblem:
    """The problem of a real network on real images."""

    def __init__(
        self, configuration: LaunchConfiguration, objective: "Objective", document: "CompositeDocument | None" = None
    ) -> None:
        self.configuration = configuration
        self.objective = objective
        self.document = document
        self.model: LoadedModel = objective.model
        self.task: Task = objective.task
        self._known: Mapping[str, Sequence[KnownMeasurement]] = {}
        self._subjects: dict[ImageSet, str] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """See `Problem.class_names`."""
        return self.objective.present_classes

    @property
    def n_confirmation_images(self) -> int:
        """See `Problem.n_confirmation_images`."""
        return len(self.task.confirmation)

    @property
    def has_attention(self) -> bool:
        """See `Problem.has_attention`."""
        return self.objective.network.is_transformer

    @property
    def stage(self) -> str | None:
        """See `Worker.stage`."""
        return self.objective.stage

    def identity(self) -> dict[str, Any]:
        """See `Problem.identity`."""
        identity = self.objective.identity()
        # Where images lie is not what they are: a folder may be moved.
        return {**identity, "data": identity["data"]["fingerprint"]}

    def describe(self) -> dict[str, Any]:
        """See `Problem.describe`."""
        configuration, model, task = self.configuration, self.model, self.task
        indices = json.dumps(list(task.reference_indices)).encode()
        return {
            "layer_groups": dict(self.objective.layer_groups),
            "abs_scope": configuration.abs_scope,
            "output_relevance": configuration.output_relevance,
            "procedure": self.objective.options.procedure.name,
            "procedure_options": self.objective.options.procedure.options,
            "components": self.objective.network.choice,
            "ranking": self.objective.ranking_scope,
            "rates": list(configuration.rates),
            "repair": configuration.repair_spec().to_json(),
            "preprocessing": task.preprocessing.to_json(),
            "references": {
                "per_class": configuration.references_per_class,
                "sample": configuration.sample,
                "seed": configuration.seed,
                "sha256": hashlib.sha256(indices).hexdigest(),
                "source": configuration.data,
                "batch_size": configuration.batch_size,
            },
            "model": {
                "name": model.name,
                "options": dict(model.options),
                "fingerprint": model.fingerprint,
                "num_classes": model.num_classes,
                "classes": None if model.label_names is None else list(model.label_names),
                "component_widths": dict(self.objective.component_widths),
            },
            "data": {
                "source": configuration.data,
                "fingerprint": task.fingerprint,
                "classes": list(task.classes),
                **({} if configuration.splits is None else {"split": configuration.splits.to_json()}),
                "evaluation_images": configuration.evaluation_images,
                "confirmation_share": configuration.confirmation_share,
                "n_search_images": len(task.search),
                "n_confirmation_images": len(task.confirmation),
            },
            "versions": {name: version(name) for name in _VERSIONED} | {"python": platform.python_version()},
        }

    def subject(self, images: ImageSet) -> str:
        """See `Problem.subject`; of the network, these images and the dtype.

        Device and threads are left out, as the driver may have others than its workers. What a measurement depends on
        beyond this, its `Evaluator.origin` says.
        """
        if images not in self._subjects:
            from objectives.fingerprints import state_fingerprint

            labelled: LabelledImages = getattr(self.task, images)
            content = [
                self.model.fingerprint,
                list(self.task.classes),
                state_fingerprint({"images": labelled.images, "labels": labelled.labels}),
                self.objective.options.dtype if images == "search" else "fp32",
            ]
            self._subjects[images] = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
        return self._subjects[images]

    def learn(self, records: "Iterable[MeasurementRecord]") -> None:
        """Take over what the store knows of this problem's subjects, also for the workers made from now on."""
        self._known = known_by_origin(records)
        self.objective.learn(self._known)

    def worker(self) -> "Callable[[], Worker]":
        """See `Problem.worker`; network, images and what is known travel with it, so that a worker reads no file.

        Nothing else does: the configuration may hold the store's password.
        """
        # The driver's own machine may lack the device.
        options = replace(self.objective.options, device=self.configuration.device)
        return partial(_worker, self._known, self.model, self.task, options, self.document)

    def prepare(self, composites: "Sequence[Ranker]") -> None:
        """See `Worker.prepare`."""
        self.objective.prepare(composites)

    def evaluate(self, composite: "Ranker", images: ImageSet) -> "Evaluation":
        """See `Worker.evaluate`."""
        return self.objective.evaluate(composite, images)

    def race(self, composite: "Ranker", race: "Race") -> "Evaluation | GivenUp":
        """See `Worker.race`."""
        return self.objective.race(composite, race)


def _worker(
    known: "Mapping[str, Sequence[KnownMeasurement]]",
    model: "LoadedModel",
    task: "Task",
    options: "ObjectiveOptions",
    document: "CompositeDocument | None",
) -> Worker:
    from objectives.objective import Objective

    objective = Objective(model, task, options, document)
    objective.learn(known)
    return objective


def load_problem(
    configuration: LaunchConfiguration,
    layer_groups: "Mapping[str, tuple[str, ...]] | None",
    given: "Container[str]" = ("model", "data"),
    document: "CompositeDocument | None" = None,
    model: "LoadedModel | None" = None,
) -> LoadedProblem:
    """Load what the configuration names.

    Workers of Ray may have a device that this machine lacks; no part of a problem's identity depends on it.

    Args:
        configuration: A resolved configuration.
        layer_groups: Name patterns of the layers of each group; None groups layers by depth.
        given: As for `load_model_and_task`.
        document: The export document that the network must fit; layers have its groups.
        model: The configuration's network, where it is loaded already.

    Raises:
        ObjectiveError: The network, the images or their combination cannot be used.
        RepairSpecError: There is a strength and nothing is to be repaired.
    """
    repair = configuration.repair_spec()  # loading takes a while
    from objectives.cache import cache_directory, clear_directories
    from objectives.objective import Objective, ObjectiveOptions

    checkpoints = cache_directory() / "fine-tuning"
    clear_directories(checkpoints, _CHECKPOINTS_KEPT)
    model, task = load_model_and_task(configuration, given, model)
    options = ObjectiveOptions(
        rates=configuration.rates,
        components=configuration.components,
        ranking=configuration.ranking,
        abs_scope=configuration.abs_scope,
        output_relevance=configuration.output_relevance,
        dtype=configuration.dtype,
        batch_size=configuration.batch_size,
        device=_device_here(configuration),
        layer_groups=layer_groups,
        attribution=configuration.attribution,
        attribution_memory=configuration.attribution_memory * 2**20,
        repair=repair,
        procedure=configuration.procedure_spec(),
        checkpoints=checkpoints,
    )
    return LoadedProblem(configuration, Objective(model, task, options, document), document)


def _device_here(configuration: LaunchConfiguration) -> str:
    """The device to load a problem on: a CPU where only workers of Ray have the one that is asked for."""
    from objectives.devices import resolve_device
    from objectives.errors import DeviceError

    if configuration.executor == "ray":
        try:
            resolve_device(configuration.device)
        except DeviceError:
            return "cpu"
    return configuration.device


def load_model_and_task(
    configuration: LaunchConfiguration,
    given: "Container[str]" = ("model", "data"),
    model: "LoadedModel | None" = None,
) -> "tuple[LoadedModel, Task]":
    """The network, trained on the task's split where it has one, and the images that the configuration names.

    Args:
        configuration: A resolved configuration.
        given: Fields that the command line gives; what others name must not run code.
        model: The configuration's network, where it is loaded already.

    Raises:
        ObjectiveError: They cannot be used.
    """
    if model is None:
        model = load_network(configuration, given)
    task, procedure = _load_task(configuration, model, given), configuration.procedure_spec()
    if isinstance(procedure, TaskRelevant) and procedure.pretrain_epochs:
        from objectives.cache import cache_directory
        from objectives.pretraining import pretrained
        from objectives.procedures.task_relevant import training_options

        assert task.split is not None, "checked with the configuration"
        options = replace(training_options(procedure, seed=configuration.seed), n_epochs=procedure.pretrain_epochs)
        directory = cache_directory() / "pretraining"
        model = pretrained(model, task.split, options, directory, _device_here(configuration))
    return model, task


def load_network(configuration: LaunchConfiguration, given: "Container[str]" = ("model", "data")) -> "LoadedModel":
    """The network that the configuration names, with random weights where it is to be trained on a split.

    See `load_model_and_task`.
    """
    from objectives.models import load_model

    options, procedure, split = dict(configuration.model_options), configuration.procedure_spec(), configuration.splits
    is_new = isinstance(procedure, TaskRelevant) and procedure.pretrain_epochs > 0 and configuration.checkpoint is None
    if is_new and split is not None and split.superclasses and not is_import_path(configuration.model):
        options.setdefault("num_classes", len(split.superclasses))
    return load_model(
        configuration.model,
        checkpoint=configuration.checkpoint,
        options=options,
        initial_seed=configuration.seed if is_new else None,
        size=configuration.size,
        mean=configuration.mean,
        std=configuration.std,
        crop=configuration.crop,
        interpolation=configuration.interpolation,
        allow_imports="model" in given,
    )


def load_training_images(
    configuration: LaunchConfiguration, model: "LoadedModel", n_per_class: int, given: "Container[str]"
) -> "LabelledImages":
    """Training images of the configuration's task, as many of each class; no image that is evaluated is among them.

    Args:
        configuration: A resolved configuration; its references are among the images where these are more.
        model: That it names.
        n_per_class: Images of each class.
        given: As for `load_model_and_task`.

    Raises:
        DataError: There are fewer, or they cannot be read.
    """
    from objectives.errors import DataError

    try:
        return _load_task(replace(configuration, references_per_class=n_per_class), model, given).references
    except DataError as error:
        reason = str(error).replace("--references-per-class", "--grow-images")
        raise DataError(f"`--grow-images {n_per_class}`: {reason}") from error


def _load_task(configuration: LaunchConfiguration, model: "LoadedModel", given: "Container[str]") -> "Task":
    from objectives.datasets import load_task
    from objectives.datasets.task_splits import load_split_task

    split, classes = configuration.splits, configuration.classes
    load = partial(load_task, classes=classes) if split is None else partial(load_split_task, split=split)
    return load(
        configuration.data,
        model,
        references_per_class=configuration.references_per_class,
        evaluation_images=configuration.evaluation_images,
        confirmation_share=configuration.confirmation_share,
        seed=configuration.seed,
        class_map=configuration.class_map,
        sample=configuration.sample,
        allow_imports="data" in given,
    )


def default_space(problem: Problem) -> str:
    """The space of a study whose user names none."""
    return "vit" if problem.has_attention else "cnn"


def refuse_space(configuration: LaunchConfiguration, space: "SearchSpace", problem: Problem) -> None:
    """Refuse a space whose composites don't fit the network.

    Raises:
        ConfigurationError: Only one of space and network has attention.
    """
    parameters = space.distributions()
    if ("attention" in parameters) == problem.has_attention:
        return
    wrong, right = ("lack a rule for it", "has") if problem.has_attention else ("have a rule for it", "lacks")
    raise ConfigurationError(
        f"The network {configuration.model!r} {right} attention, but the composites of `--space {configuration.space}` "
        f"{wrong}; pass `--space {default_space(problem)}`."
    )


def refuse_imports(configuration: LaunchConfiguration, given: "Container[str]", origin: str) -> None:
    """Refuse to import what only a store or a document names: code runs when this command line names it.

    Args:
        configuration: What is about to be loaded.
        given: Fields that the command line gives.
        origin: Where the others are from, such as `Study 'digits'`.

    Raises:
        ImportRefusedError: Another field is an import path, or data whose reader runs code.
    """
    fields: tuple[Named, ...] = ("model", "data", "space")
    for field in fields:
        text = getattr(configuration, field)
        if text is not None and field not in given and runs_code(field, text):
            raise ImportRefusedError(
                f"{origin} names {text!r}, which runs code and is not loaded from there; "
                f"pass `--{field} {shlex.quote(text)}` if you trust it."
            )
