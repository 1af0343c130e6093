"""The objective: a composite, or a baseline criterion, becomes an evaluation.

composite -> relevance on the canonical copy -> scores -> ranking -> masks at every rate, and fine-tuned weights where
the procedure trains -> repair -> accuracy -> curve
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from objectives.attribution.composites import check_attention, check_groups, check_shape, fitting
from objectives.attribution.criteria import ReferenceSamples, criterion_scores
from objectives.attribution.engine import Attribution, ZennitAttribution
from objectives.attribution.shared import DEFAULT_MEMORY, SharedAttribution
from objectives.canonization import canonize
from objectives.datasets import LabelledImages, Task
from objectives.devices import on_device, resolve_device
from objectives.errors import (
    DataError,
    ObjectiveError,
    OptionError,
    TrainingError,
    UnsupportedNetworkError,
)
from objectives.layer_groups import group_layers
from objectives.memory import Batches, lacks_memory
from objectives.models import LoadedModel
from objectives.network import CanonicalNetwork
from objectives.procedures import PROCEDURES
from objectives.procedures.path import PruningPath
from objectives.pruning.curve import Curve, weights
from objectives.pruning.evaluation import Evaluator, KnownMeasurement, correct_predictions
from objectives.pruning.fine_tuning import fine_tuned
from objectives.pruning.ranking import Masks, Ranking, n_pruned_by, rank
from objectives.pruning.rates import check_rates
from objectives.pruning.records import StepRecord
from objectives.pruning.slimming import Cost
from objectives.pruning.trained import TrainedWeights
from objectives.pruning.zeroing import zeroed
from objectives.racing import Correctness, GivenUp, Race
from objectives.repair.repairer import Repairer, with_layers
from objectives.training import Epoch, TrainingOptions
from search_spaces.choices import (
    AbsScope,
    AttributionEngine,
    Components,
    Dtype,
    ImageSet,
    OutputRelevance,
    RankingScope,
)
from search_spaces.criteria import CriterionSpec, Ranker
from search_spaces.documents import CompositeDocument
from search_spaces.procedures import Dynamic, OneShot, ProcedureSpec, TaskRelevant
from search_spaces.repairs import NO_REPAIR, RepairSpec
from search_spaces.suggestions import did_you_mean

__all__ = ["Columns", "Evaluation", "Objective", "ObjectiveOptions"]

_CHOICES = {
    "abs_scope": get_args(AbsScope),
    "attribution": get_args(AttributionEngine),
    "dtype": get_args(Dtype),
    "output_relevance": get_args(OutputRelevance),
    "ranking": get_args(RankingScope),
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A canonical copy in float32 differs from its network by rounding only.
_LOGIT_TOLERANCE = 1e-3
# Share of images whose prediction rounding may change.
_BORDER_SHARE = {"fp32": 0.005, "bf16": 0.03}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ObjectiveOptions:
    """What an objective measures and how.

    Attributes:
        rates: pruning rates, increasing from 0.
        procedure: how pruning proceeds.
        components: which are pruned, see `search_spaces.choices.Components`; by default the neurons of a transformer's
            MLPs, and all of another network.
        ranking: components of each `kind`, or of each `layer`, are ranked within themselves and pruned at every rate,
            or all over the whole network (`global`). Only a transformer's heads and neurons together are of two kinds.
        abs_scope: where `abs` is taken, see `search_spaces.choices.AbsScope`.
        output_relevance: relevance starts as `one` at the true class's logit, or as the `logit`.
        dtype: of evaluation during the search; attribution and confirmation are in fp32.
        batch_size: images a pass, in attribution and evaluation.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        layer_groups: a user's own name patterns by group.
        attribution: `shared` attributes many composites together, `zennit` one at a time; their scores agree to
            rounding, as those of two devices do, so neither is part of a study's identity.
        attribution_memory: bytes that the shared engine may take.
        repair: of every pruned network before it is measured, unless a composite brings its own. Where the procedure
            fine-tunes, of what a step has pruned before it is trained, towards the outputs of the network that it was
            pruned from.
        checkpoints: directory for checkpoints of fine-tuning, made where it is missing; an evaluation that was killed
            goes on from them, one that ends removes its own. None keeps none.
    """

    rates: tuple[float, ...]
    procedure: ProcedureSpec = OneShot()  # noqa: RUF009 (frozen)
    components: Components | None = None
    ranking: RankingScope = "kind"
    abs_scope: AbsScope = "sum"
    output_relevance: OutputRelevance = "one"
    dtype: Dtype = "fp32"
    batch_size: int = 100
    device: str = "auto"
    layer_groups: Mapping[str, Sequence[str]] | None = None
    attribution: AttributionEngine = "shared"
    attribution_memory: int = DEFAULT_MEMORY
    repair: RepairSpec = NO_REPAIR
    checkpoints: Path | None = None

    def __post_init__(self) -> None:
        check_rates(self.rates)
        for option, known in _CHOICES.items():
            value = getattr(self, option)
            if value not in known:
                raise OptionError(f"Unknown {option} {value!r}.{did_you_mean(str(value), known)}")
        if self.batch_size < 1:
            raise OptionError(f"`batch_size` must be at least 1, but got {self.batch_size}.")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A composite, evaluated.

    Attributes:
        curve: accuracy at every rate.
        figures: by name, see `objectives.pruning.curve`.
        correct: which images are classified correctly at which rate.
        image_auc: each image's own normalised area (its correctness over the rates); their mean is `auc`.
        seconds: spent on `attribution`, until all masks are known, on `training` where there is any, and on
            `evaluation`.
        remarks: what the user should know about it, a sentence each.
        measured: masks that nothing was known of, for `Objective.learn` elsewhere.
        origin: digest of what these depend on but for the masks, see `Evaluator.origin`.
        n_masks: masks asked for.
        n_known: those that had been measured before, here or elsewhere.
        steps: of the procedure, up to the largest rate, and before them the unpruned network; none of one shot.
    """

    curve: Curve
    figures: dict[str, float]
    correct: Correctness
    image_auc: tuple[float, ...]
    seconds: dict[str, float]
    remarks: tuple[str, ...] = ()
    measured: tuple[KnownMeasurement, ...] = ()
    origin: str = ""
    n_masks: int = 0
    n_known: int = 0
    steps: tuple[StepRecord, ...] = ()


class _Stopwatch:
    """What an evaluation takes."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._attribution = self._trained = 0.0

    @contextmanager
    def training(self) -> Iterator[None]:
        """What the block takes is a training's."""
        start = time.perf_counter()
        yield
        self._trained += time.perf_counter() - start

    def attributed(self) -> None:
        """All masks are known."""
        self._attribution = time.perf_counter() - self._start - self._trained

    def seconds(self) -> dict[str, float]:
        """Spent on `attribution`, `training` and `evaluation` until now."""
        return {
            "attribution": self._attribution,
            **({"training": self._trained} if self._trained else {}),
            # Networks that only rates or records of steps need are trained when all masks are known.
            "evaluation": time.perf_counter() - self._start - self._attribution - self._trained,
        }


@dataclass(frozen=True, slots=True, eq=False)
class _Lesson:
    """What a pruned network is trained on.

    Attributes:
        name: of the training, in the user's words.
        images: that it is trained on.
        validation: by which it stops early; None trains all epochs.
    """

    name: Literal["fine-tuning", "growth", "retraining", "adaptation"]
    images: LabelledImages
    validation: LabelledImages | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Pruning:
    """See `objectives.procedures.steps.Pruning`.

    Attributes:
        objective: whose network is pruned.
        composite: by which components are ranked.
        stopwatch: of the evaluation.
        checkpoints: directory of this composite's alone; None keeps none.
    """

    objective: Objective
    composite: Ranker
    stopwatch: _Stopwatch
    checkpoints: Path | None

    def rank(self, masks: Masks | None = None, weights: TrainedWeights | None = None) -> Ranking:
        if masks is not None:
            self.objective.stage = self._stage(masks)
        return self.objective.ranking(self.composite, masks, weights)

    def class_accuracies(self, masks: Masks, ahead: Iterable[Masks] = ()) -> tuple[float, ...]:
        evaluator = self.objective.evaluator("references")
        correct = evaluator.measure(masks, ahead=ahead).correct
        evaluator.news()  # of nobody's interest
        return _by_class(correct[None], evaluator.images.labels)[0]

    def fine_tuned(
        self, masks: Masks, weights: TrainedWeights | None, options: TrainingOptions
    ) -> TrainedWeights | None:
        split = self.objective.task.split
        lesson = (
            _Lesson("fine-tuning", self.objective.references)
            if split is None
            else _Lesson("retraining", split.training.task, split.validation.task)
        )
        if repair := self.objective.repair(self.composite):
            self.objective.stage = f"{self._stage(masks)}, repair"
        with self.stopwatch.training():
            start = self.objective.repaired(masks, repair, weights)
        trained = self._trained(masks, start, options, lesson)
        return weights if trained is None else trained

    def adapted(self, masks: Masks, weights: TrainedWeights | None, options: TrainingOptions) -> TrainedWeights | None:
        split = self.objective.task.split
        assert split is not None, "the objective checks it"
        images, validation = split.adaptation(split.training), split.adaptation(split.validation)
        start = self.objective.repaired(masks, NO_REPAIR, weights)
        trained = self._trained(masks, start, options, _Lesson("adaptation", images, validation))
        return weights if trained is None else trained

    def grown(self, masks: Masks, core: TrainedWeights, options: TrainingOptions) -> TrainedWeights:
        lesson = _Lesson("growth", self.objective.references)
        start = self.objective.repaired(masks, NO_REPAIR, core)
        grown = self._trained(masks, start, options, lesson, frozen=core)
        return core if grown is None else grown

    def _trained(
        self,
        masks: Masks,
        network: CanonicalNetwork,
        options: TrainingOptions,
        lesson: _Lesson,
        frozen: TrainedWeights | None = None,
    ) -> TrainedWeights | None:
        objective, pruned = self.objective, self._stage(masks)
        stage = f"{pruned}, {lesson.name}"
        most = "" if options.patience is None else "at most "

        def report(epoch: Epoch) -> None:
            objective.stage = f"{stage}, epoch {epoch.number} of {most}{epoch.n_epochs}"

        objective.stage = stage
        try:
            with self.stopwatch.training():
                return fine_tuned(
                    network,
                    masks,
                    lesson.images,
                    options,
                    frozen=frozen,
                    validation=lesson.validation,
                    checkpoint=self._checkpoint(f"{lesson.name}-{n_pruned_by(masks)}.safetensors"),
                    on_epoch=report,
                )
        except TrainingError as error:
            reason = str(error).removesuffix(".")
            raise TrainingError(
                f"{lesson.name.capitalize()}, {pruned}: {reason} (`--finetune-learning-rate`)."
            ) from error

    def _checkpoint(self, name: str) -> Path | None:
        """File of a training."""
        if self.checkpoints is None:
            return None
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _log.warning("Fine-tuning keeps no checkpoints: %s can't be made (%s)", self.checkpoints, error)
            return None
        return self.checkpoints / name

    def _stage(self, masks: Masks) -> str:
        return f"{100 * n_pruned_by(masks) / self.objective.n_components:.0f} % pruned"


class Objective:
    """Evaluates composites for one model, task and set of options.

    Not thread-safe; one objective a worker. The model's own network is never changed.

    Args:
        model: loaded.
        task: reference samples and evaluation images.
        options: what to measure.
        document: an export document that the network must fit; layers have its groups, not the options'.

    Attributes:
        stage: how far the procedure is where it ranks more than once, for another thread to read; None between.
        references: the task's, on the objective's device.

    Raises:
        UnsupportedNetworkError: the network can't be attributed correctly, or isn't of the document's shape.
        OptionError: the options' components aren't the document's, or only one of procedure and task needs a split.
        DeviceError: the device doesn't exist.
    """

    def __init__(
        self, model: LoadedModel, task: Task, options: ObjectiveOptions, document: CompositeDocument | None = None
    ) -> None:
        if (options.procedure.name == TaskRelevant.name) != (task.split is not None):
            raise OptionError(
                "Procedure task_relevant and a split of the data go together: pass `--procedure task_relevant --splits "
                "FILE.toml`, or neither."
            )
        if document is not None and options.components not in (None, document.components):
            raise OptionError(
                f"The document was made for `--components {document.components}`, but got {options.components}; leave "
                "the option out."
            )
        self.stage: str | None = None
        self.model = model
        self.task = task
        self.options = options
        self.device = resolve_device(options.device)
        self.batches = Batches("evaluation", options.batch_size)
        original = on_device(model.network, self.device)
        channels = task.references.images.shape[1]
        canonical = canonize(original, (channels, *task.preprocessing.size), self.kept_outputs)
        self.network: CanonicalNetwork = (
            canonical.choosing(options.components) if document is None else fitting(canonical, document)
        )
        self.ranking_scope: RankingScope = options.ranking
        if len(set(self._kinds.values())) == 1:
            self.ranking_scope = "global"  # the same, under its usual name
        if options.procedure.name == Dynamic.name and self.ranking_scope != "global":
            raise OptionError(
                f"Procedure dynamic ranks over the whole network, but the ranking is by {self.ranking_scope}; pass "
                "`--ranking global`."
            )
        self.layer_groups: dict[str, str]
        if document is None:
            self.layer_groups = group_layers(self.network, options.layer_groups)
        else:
            # Before the groups: of another network these would be refused by a less telling message.
            check_shape(self.network, model.num_classes, document)
            check_groups(self.network, document.layer_groups)
            check_attention(self.network, document.composite)
            self.layer_groups = {name: document.layer_groups[name] for name in self.network.layers}
        self.references = references = task.references.to(self.device)
        self._check_copy(original, references)
        settings = (references, options.batch_size, options.abs_scope, options.output_relevance)
        self.attribution: Attribution = (
            ZennitAttribution(self.network, self.layer_groups, *settings)
            if options.attribution == "zennit"
            else SharedAttribution(self.network, self.layer_groups, *settings, options.attribution_memory)
        )
        self._samples = ReferenceSamples(self.network, references, self.attribution.batches, options.abs_scope)
        self.repairer = Repairer(self.network, references.images, Batches("repair", options.batch_size))
        self._evaluators: dict[str, Evaluator] = {}
        self._learnt: dict[str, tuple[KnownMeasurement, ...]] = {}
        self.unpruned_accuracy: float = self._unpruned(original)

    @property
    def kept_outputs(self) -> tuple[int, ...] | None:
        """The network's outputs that the task keeps; `None` where it keeps all."""
        return None if self.task.classes == tuple(range(self.model.num_classes)) else self.task.classes

    @property
    def component_widths(self) -> dict[str, int]:
        """Components of every layer, in forward order."""
        return self.network.components

    @property
    def n_components(self) -> int:
        """Components of the whole network."""
        return sum(self.network.components.values())

    @property
    def present_classes(self) -> tuple[str, ...]:
        """Names of the classes that have search images, in the order of a curve's class accuracies."""
        return tuple(self.task.class_names[label] for label in self.task.search.labels.unique().tolist())

    def identity(self) -> dict[str, Any]:
        """What two objectives must share for their values to be comparable."""
        options = self.options
        return {
            "model": {
                "name": self.model.name,
                "options": dict(self.model.options),
                "fingerprint": self.model.fingerprint,
            },
            "data": {"source": self.task.source, "fingerprint": self.task.fingerprint},
            "classes": list(self.task.classes),
            **({} if self.task.split is None else {"split": self.task.split.split.to_json()}),
            "preprocessing": self.task.preprocessing.to_json(),
            "layer_groups": dict(self.layer_groups),
            "components": dict(self.network.components),
            **({} if self.ranking_scope == "global" else {"ranking": self.ranking_scope}),
            "procedure": options.procedure.name,
            **({"procedure_options": options.procedure.options} if options.procedure.options else {}),
            "rates": list(options.rates),
            "references": len(self.task.references),
            "abs_scope": options.abs_scope,
            "output_relevance": options.output_relevance,
            "dtype": options.dtype,
            "batch_size": options.batch_size,
        }

    def prepare(self, composites: Sequence[Ranker]) -> None:
        """Computes together what attributions of composites that will be evaluated soon share."""
        self.attribution.prepare([each for each in composites if not isinstance(each, CriterionSpec)])

    def scores(
        self, composite: Ranker, masks: Masks | None = None, weights: TrainedWeights | None = None
    ) -> dict[str, Tensor]:
        """Score of every component, layer -> (components,); all rankings of one attribution share it.

        Args:
            composite: or criterion.
            masks: of a pruned network, on which the scores of kept components are computed, see `of_kept`; by default
                nothing is pruned.
            weights: of the pruned network; by default the unpruned one's.

        Raises:
            RelevanceError: the composite's relevance can't be used.
            OutOfMemoryError: the device has no room for a single image.
        """
        if masks is not None and all(bool(mask.all()) for mask in masks.values()):
            masks = None
        network = self.network if weights is None else weights.on(self.network)
        if masks is not None:
            network = zeroed(network, masks)
        if isinstance(composite, CriterionSpec):
            return criterion_scores(composite, replace(self._samples, network=network), masks)
        # Composites share what is attributed on the unpruned network; pruned ones are all different.
        engine = self.attribution if masks is None else self.attribution.on(network)
        relevance = engine.attribute(composite)
        return relevance.scores(
            absolute=composite.abs, aggregate=composite.aggregate, normalize=composite.normalize, masks=masks
        )

    def ranking(self, composite: Ranker, masks: Masks | None = None, weights: TrainedWeights | None = None) -> Ranking:
        """The order in which a composite prunes components, on the network under masks."""
        scores = self.scores(composite, masks, weights)
        return rank(scores, None if self.ranking_scope == "global" else self._kinds, masks)

    def path(self, composite: Ranker) -> PruningPath:
        """All networks that the procedure comes to with a composite; made as far as they are asked for."""
        return self._path(composite, _Stopwatch())

    def _path(self, composite: Ranker, stopwatch: _Stopwatch) -> PruningPath:
        procedure = self.options.procedure
        pruning = _Pruning(self, composite, stopwatch, self._checkpoints(composite))
        return PruningPath(PROCEDURES[procedure.name](pruning, procedure))

    def _checkpoints(self, composite: Ranker) -> Path | None:
        """Directory of one composite's evaluations."""
        if self.options.checkpoints is None or not self.options.procedure.fine_tunes:
            return None
        repair = self.repair(composite)
        repaired = [str(repair), self.repairer.fingerprint] if repair else [str(repair)]
        content = json.dumps([self.identity(), composite.key, *repaired], sort_keys=True).encode()
        return self.options.checkpoints / hashlib.blake2b(content, digest_size=16).hexdigest()

    @contextmanager
    def ending(self, composite: Ranker) -> Iterator[None]:
        """When the block ends, well or not, a composite's `path` leaves nothing; one that is killed its checkpoints.

        Evaluations do so themselves.
        """
        try:
            yield
        except ObjectiveError:
            self._forget(composite)
            raise
        finally:
            self.stage = None
        self._forget(composite)

    def _forget(self, composite: Ranker) -> None:
        if (checkpoints := self._checkpoints(composite)) is not None:
            shutil.rmtree(checkpoints, ignore_errors=True)

    @property
    def _kinds(self) -> dict[str, str]:
        """What is ranked within itself, of all that has components."""
        by_layer = self.options.ranking == "layer"
        return {name: name if by_layer else self.network.kinds[name] for name in self.network.components}

    def repair(self, composite: Ranker) -> RepairSpec:
        """How the networks that a composite prunes are repaired."""
        return self.options.repair if composite.repair is None else composite.repair

    def repaired(
        self, masks: Masks, repair: RepairSpec = NO_REPAIR, weights: TrainedWeights | None = None
    ) -> CanonicalNetwork:
        """The network with weights that make up for what masks prune, or for what they prune beyond trained weights'.

        Args:
            masks: by which it will be pruned.
            repair: on the reference images, towards the outputs of the network under the masks of `weights`.
            weights: that were trained; by default the unpruned network's.

        Raises:
            RepairError: a layer can't be repaired.
            OutOfMemoryError: the device has no room for a single image.
        """
        network = self.network if weights is None else weights.on(self.network)
        if not repair:
            return network
        repairer = self.repairer if weights is None else self.repairer.on(zeroed(network, weights.masks))
        return with_layers(network, repairer.layers(masks, repair))

    def evaluate(self, composite: Ranker, images: ImageSet = "search") -> Evaluation:
        """Attributes, prunes, repairs and counts.

        Args:
            composite: to evaluate.
            images: `search` in the options' dtype, or `confirmation` in float32.

        Raises:
            RelevanceError: the composite's relevance can't be used.
            RepairError: a pruned network can't be repaired.
            TrainingError: fine-tuning diverged.
            OutOfMemoryError: the device has no room for a single image.
        """
        stopwatch = _Stopwatch()
        repair = self.repair(composite)
        with self.ending(composite):
            path = self._path(composite, stopwatch)
            numbers = self._numbers(path, stopwatch)
            return self._count(path, numbers, repair, images, stopwatch)

    def race(self, composite: Ranker, race: Race) -> Evaluation | GivenUp:
        """As `evaluate` on the search images, unless the composite loses a race on the way.

        Raises:
            RelevanceError: the composite's relevance can't be used.
            RepairError: a pruned network can't be repaired.
            TrainingError: fine-tuning diverged.
            OutOfMemoryError: the device has no room for a single image.
        """
        stopwatch = _Stopwatch()
        repair = self.repair(composite)
        evaluator = self.evaluator("search")
        with self.ending(composite):
            path = self._path(composite, stopwatch)
            numbers = self._numbers(path, stopwatch)

            def measure(index: int, n_images: int) -> NDArray[np.bool_]:
                n = numbers[index]
                ahead = self._ahead(path, reversed(numbers[1:index]))
                measurement = evaluator.measure(path.masks(n), n_images, repair, path.weights(n), ahead=ahead)
                correct: NDArray[np.bool_] = measurement.correct.cpu().numpy()
                return correct

            given_up = race.run(measure)
            if given_up is None:
                return self._count(path, numbers, repair, "search", stopwatch)  # of what has been measured
        evaluator.news()  # of nobody's interest: most masks were measured on few images
        return replace(given_up, seconds=stopwatch.seconds())

    def _numbers(self, path: PruningPath, stopwatch: _Stopwatch) -> list[int]:
        """Components pruned at every rate, whose masks are known then; what the rates alone need isn't trained yet."""
        numbers = [path.n_pruned(rate) for rate in self.options.rates]
        path.masks(numbers[-1])
        self.stage = None
        stopwatch.attributed()
        return numbers

    def _ahead(self, path: PruningPath, numbers: Iterable[int]) -> Iterator[Masks]:
        """Masks that will be measured next, with these numbers of components pruned; none of trained networks."""
        return iter(()) if self.options.procedure.fine_tunes else map(path.masks, numbers)

    def _count(
        self,
        path: PruningPath,
        numbers: Sequence[int],
        repair: RepairSpec,
        images: ImageSet,
        stopwatch: _Stopwatch,
    ) -> Evaluation:
        """On all images."""
        evaluator = self.evaluator(images)
        nothing = {name: torch.zeros(width, dtype=torch.bool) for name, width in self.component_widths.items()}
        measurements = []
        for index, n in enumerate(numbers):
            ahead = itertools.chain(self._ahead(path, numbers[index + 1 :]), [nothing])
            measurements.append(evaluator.measure(path.masks(n), repair=repair, weights=path.weights(n), ahead=ahead))
        collapsed = evaluator.measure(nothing, repair=repair)
        costs = [measurement.cost for measurement in measurements]
        # The one time that the device is waited for.
        correct = torch.stack([measurement.correct for measurement in (*measurements, collapsed)]).cpu()
        labels: Tensor = getattr(self.task, images).labels
        steps = self._records(path, repair, evaluator)
        evaluation = self._summary(correct, costs, labels, stopwatch.seconds())
        unadapted = steps[0].accuracy_task if steps else None
        if unadapted is not None or images == "search":
            self._check_start(evaluation.curve.accuracies[0] if unadapted is None else unadapted)
        news = evaluator.news()
        return replace(
            evaluation,
            measured=news.measurements,
            origin=evaluator.origin,
            n_masks=news.n_masks,
            n_known=news.n_known,
            steps=steps,
        )

    def _records(self, path: PruningPath, repair: RepairSpec, evaluator: Evaluator) -> tuple[StepRecord, ...]:
        """Of the steps up to the largest rate; most of their networks are those of rates, and measured already."""
        ends = path.ends(path.n_pruned(self.options.rates[-1]))
        records = []
        for n_pruned in [0, *ends] if ends else []:
            masks, weights = path.masks(n_pruned), path.weights(n_pruned)
            measurement = evaluator.measure(masks, repair=repair, weights=weights)
            accuracy_task = None
            if self.task.split is not None:
                before = self.evaluator("task").measure(masks, weights=path.unadapted(n_pruned))
                self.evaluator("task").news()  # of nobody's interest
                accuracy_task = float(before.correct.double().mean())
            record = StepRecord(
                n_pruned=n_pruned,
                accuracy=float(measurement.correct.double().mean()),
                loss=self.evaluator("references").loss(masks, repair, weights),
                parameters=measurement.cost.parameters,
                flops=measurement.cost.flops,
                left={name: int(mask.sum()) for name, mask in masks.items()},
                accuracy_task=accuracy_task,
            )
            records.append(record)
        return tuple(records)

    def learn(self, measurements: Mapping[str, Iterable[KnownMeasurement]]) -> None:
        """Takes over measurements made elsewhere, so that their masks need not be measured again.

        Args:
            measurements: `Evaluation.measured` by `Evaluation.origin`, that is by what they depend on but for the
                masks; those of another origin than one of this objective's evaluators are of no use, and of no effect.
        """
        self._learnt = {origin: tuple(known) for origin, known in measurements.items()}
        for evaluator in self._evaluators.values():
            self._teach(evaluator)

    def evaluator(self, images: ImageSet | Literal["references", "task"]) -> Evaluator:
        """Measures masks on one set of images, `task` being P's of a split; made at first use and kept."""
        if images not in self._evaluators:
            labelled: LabelledImages = self._known if images == "task" else getattr(self.task, images)
            if len(labelled) == 0:  # only confirmation may have none
                raise DataError(f"There are no {images} images; change `--confirmation-share`.")
            dtype = _DTYPES[self.options.dtype] if images == "search" else torch.float32
            here = self._resident(labelled, dtype)
            evaluator = Evaluator(self.network, here, self.batches, dtype, self.repairer)
            self._teach(evaluator)
            self._evaluators[images] = evaluator
        return self._evaluators[images]

    def _teach(self, evaluator: Evaluator) -> None:
        if self._learnt:
            evaluator.learn(self._learnt.get(evaluator.origin, ()))

    def _resident(self, labelled: LabelledImages, dtype: torch.dtype) -> LabelledImages:
        """The images on the device, or in this machine's memory where the device has no room for all of them."""
        here = labelled.images.to(dtype=dtype, memory_format=torch.channels_last)
        labels = labelled.labels.to(self.device)
        try:
            return LabelledImages(here.to(self.device), labels)
        except Exception as error:
            if not lacks_memory(error):
                raise
            _log.info("The %s has no room for all images; each batch is moved there.", self.device)
            return LabelledImages(here, labels)

    def _summary(self, correct: Tensor, costs: Sequence[Cost], labels: Tensor, seconds: dict[str, float]) -> Evaluation:
        """Of predictions (rates + 1, N) being correct; the last row is of the network without any component."""
        packed = Correctness.of(correct[:-1].numpy())
        collapsed = correct[-1].double()
        correct = correct[:-1].double()
        rates = self.options.rates
        curve = Curve(
            rates=rates,
            accuracies=tuple(correct.mean(dim=1).tolist()),
            class_accuracies=_by_class(correct, labels),
            parameters=tuple(cost.parameters for cost in costs),
            flops=tuple(cost.flops for cost in costs),
            collapsed_accuracy=float(collapsed.mean()),
        )
        image_auc = torch.tensor(weights("auc", rates), dtype=torch.float64) @ correct
        return Evaluation(curve, curve.figures(), packed, tuple(image_auc.tolist()), seconds, self._remarks())

    def _remarks(self) -> tuple[str, ...]:
        remarks = (self.attribution.batches.remark, self.repairer.batches.remark, self.batches.remark)
        return tuple(remark for remark in remarks if remark is not None)

    # Ways to be wrong without noticing.

    def _check_copy(self, original: nn.Module, references: LabelledImages) -> None:
        def compare(batch_size: int) -> tuple[float, float]:
            batch = references.images[:batch_size]
            expected = original(batch)[:, list(self.task.classes)]
            return float((self.network.module(batch) - expected).abs().max()), float(expected.abs().max())

        with torch.inference_mode():
            difference, scale = self.batches.run(compare)
        if not difference <= _LOGIT_TOLERANCE * max(scale, 1.0):
            raise UnsupportedNetworkError(
                f"The canonical copy's logits differ from the network's by {difference:.3g} (of {scale:.3g}); the "
                "network computes something that its graph doesn't show."
            )

    @property
    def _known(self) -> LabelledImages:
        """Search images of what the unpruned network has learnt: of a split P's."""
        return self.task.search if self.task.split is None else self.task.split.evaluation.task

    def _unpruned(self, original: nn.Module) -> float:
        """Accuracy of the user's own network on search images; warns where it looks broken.

        That is below twice chance over the classes that have images; with two classes, where that is 100 %, not above
        the larger class's share.
        """
        images = self._known.to(self.device)
        restricted = Columns(original, self.task.classes).to(self.device)
        accuracy = float(correct_predictions(restricted, images, self.batches).double().mean())
        counts = torch.bincount(images.labels)
        n_classes = int((counts > 0).sum())
        chance = 1 / n_classes if n_classes > 2 else float(counts.max()) / len(images)
        looks_broken = accuracy < 2 * chance if n_classes > 2 else accuracy <= chance < 1
        if looks_broken:
            _log.warning(
                "The unpruned network classifies only %.1f %% of the search images (chance is %.1f %%): check the "
                "preprocessing (--mean, --std, --size), the order of the classes (--class-map) and the --checkpoint.",
                100 * accuracy,
                100 * chance,
            )
        return accuracy

    def _check_start(self, accuracy: float) -> None:
        """The curve begins at the user's network's accuracy, but for images on the border of two classes."""
        n_images = len(self._known)
        tolerance = max(1.0, _BORDER_SHARE[self.options.dtype] * n_images)
        if abs(accuracy - self.unpruned_accuracy) * n_images > tolerance:
            raise UnsupportedNetworkError(
                f"The curve starts at accuracy {accuracy:.4f}, but the unpruned network has "
                f"{self.unpruned_accuracy:.4f}; try `--dtype fp32`."
            )


def _by_class(correct: Tensor, labels: Tensor) -> tuple[tuple[float, ...], ...]:
    """Accuracies of each class that has images, from predictions (rows, N) being correct."""
    in_class = nn.functional.one_hot(labels.unique(return_inverse=True)[1]).double()
    return tuple(map(tuple, (correct.double() @ in_class / in_class.sum(dim=0)).tolist()))


class Columns(nn.Module):
    """A network whose other outputs are left out."""

    def __init__(self, network: nn.Module, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("classes", torch.tensor(classes))

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, classes)."""
        logits: Tensor = self.network(images).index_select(1, self.classes)
        return logits
