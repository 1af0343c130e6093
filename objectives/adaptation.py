"""Adaptation: how well the networks that task-relevant pruning leaves learn new data (Avé et al. 2025).

A network is trained on T and P of a split, a composite or criterion prunes it to what P needs, and each size is
adapted: to P and F where F holds new classes (replay of all of P, so that it isn't forgotten), to F where it holds new
subclasses. The figure is accuracy after adaptation over size; its area is that of `objectives.pruning.curve`
(`auc_parameters` over parameters, `auc_flops` over multiply-adds).

    >>> data = split_data(split, training, evaluation, class_names)
    >>> pretrain(network, data, TrainingOptions(n_epochs=50, patience=4))
    >>> Adaptation(model, data).evaluate(heuristic("epsilon-abs")).curve.figures()["auc_parameters"]

Training, early stopping and measuring are on images of their own. Batch norm is trained in the unpruned network only
and folded into the layers afterwards, as everywhere else where pruned networks are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from objectives.datasets import LabelledImages, Task
from objectives.datasets.task_splits import SplitData
from objectives.errors import DataError, OptionError, RepairError, TrainingError
from objectives.fingerprints import state_fingerprint
from objectives.models import LoadedModel
from objectives.objective import Objective, ObjectiveOptions
from objectives.procedures.task_relevant import AdaptedStep, TaskRelevant, task_relevant
from objectives.pruning.curve import Curve
from objectives.pruning.fine_tuning import fine_tuned
from objectives.pruning.ranking import Masks, Ranking, n_pruned_by
from objectives.pruning.trained import TrainedWeights
from objectives.training import Epoch, TrainingOptions, TrainingResult, train
from search_spaces.choices import AbsScope, ImageSet, OutputRelevance
from search_spaces.criteria import Ranker

__all__ = ["Adaptation", "AdaptationEvaluation", "AdaptationOptions", "AdaptationRecord", "pretrain"]


@dataclass(frozen=True, slots=True)
class AdaptationOptions:
    """What is pruned, how networks are trained, and on what relevance is computed.

    Attributes:
        procedure: steps and trainings.
        n_references: training images of P that relevance is computed on, drawn by the training's seed; None are all of
            them, as in the paper.
        abs_scope: see `ObjectiveOptions`; by default of every element before any sum, which of our ways is next to the
            paper's l1 norm of a component. The paper sums images before it takes magnitudes, so that images of opposite
            relevance cancel.
        output_relevance: see `ObjectiveOptions`; by default the network's output, as in the paper.
        batch_size: images a pass, in attribution and evaluation.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        OptionError: a value is out of its range.
    """

    procedure: TaskRelevant = TaskRelevant()  # noqa: RUF009 (frozen)
    n_references: int | None = None
    abs_scope: AbsScope = "element"
    output_relevance: OutputRelevance = "logit"
    batch_size: int = 100
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.n_references is not None and self.n_references < 1:
            raise OptionError(f"`n_references` must be at least 1, but got {self.n_references!r}.")


@dataclass(frozen=True, slots=True)
class AdaptationRecord:
    """One size, before and after it was adapted.

    Attributes:
        share: of the components, pruned; the same of each layer but for rounding.
        n_pruned: components that are gone.
        parameters: of the exact slim network.
        flops: its multiply-adds for one image.
        accuracy_pruned: on P's evaluation images, pruned and retrained, before adaptation.
        accuracy: after adaptation, on the evaluation images of what it was adapted to: F, or P and F with replay.
        accuracy_task: after adaptation, on P.
        accuracy_new: after adaptation, on F.
        class_accuracies: `accuracy` of each output that has images.
    """

    share: float
    n_pruned: int
    parameters: int
    flops: int
    accuracy_pruned: float
    accuracy: float
    accuracy_task: float
    accuracy_new: float
    class_accuracies: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> AdaptationRecord:
        """Inverse of `to_json`."""
        return cls(**{**document, "class_accuracies": tuple(document["class_accuracies"])})


@dataclass(frozen=True, slots=True)
class AdaptationEvaluation:
    """A composite or criterion, evaluated.

    Attributes:
        curve: accuracy after adaptation at each size; its rates are shares of components pruned.
        records: of each size, the unpruned one first.
    """

    curve: Curve
    records: tuple[AdaptationRecord, ...]


def pretrain(
    network: nn.Module,
    data: SplitData,
    options: TrainingOptions,
    *,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> TrainingResult:
    """Trains the unpruned network on T and P, in place; M_0 of Algorithm 1.

    Args:
        network: maps images (N, C, H, W) to logits of `data.outputs`.
        data: of the split.
        options: of the training, which validation images of T and P stop early where it has patience.
        checkpoint: see `objectives.training.train`.
        on_epoch: likewise.

    Raises:
        TrainingError: the training diverged.
        OutOfMemoryError: the device has no room for a batch.
    """
    try:
        return train(
            network,
            data.pretraining(data.training),
            options,
            validation=data.pretraining(data.validation),
            checkpoint=checkpoint,
            on_epoch=on_epoch,
        )
    except TrainingError as error:
        raise TrainingError(f"Training on T and P: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class _Pruning:
    """See `objectives.procedures.task_relevant.AdaptivePruning`.

    Attributes:
        adaptation: whose network is pruned.
        composite: by which components are ranked.
        checkpoints: directory of this composite's alone; None keeps none.
    """

    adaptation: Adaptation
    composite: Ranker
    checkpoints: Path | None

    def rank(self, masks: Masks | None = None, weights: TrainedWeights | None = None) -> Ranking:
        return self.adaptation.objective.ranking(self.composite, masks, weights)

    def fine_tuned(
        self, masks: Masks, weights: TrainedWeights | None, options: TrainingOptions
    ) -> TrainedWeights | None:
        data = self.adaptation.data
        return self._trained("retraining", data.training.task, data.validation.task, masks, weights, options)

    def adapted(self, masks: Masks, weights: TrainedWeights | None, options: TrainingOptions) -> TrainedWeights | None:
        data = self.adaptation.data
        images, validation = data.adaptation(data.training), data.adaptation(data.validation)
        return self._trained("adaptation", images, validation, masks, weights, options)

    def _trained(
        self,
        purpose: str,
        images: LabelledImages,
        validation: LabelledImages,
        masks: Masks,
        weights: TrainedWeights | None,
        options: TrainingOptions,
    ) -> TrainedWeights | None:
        adaptation, objective = self.adaptation, self.adaptation.objective
        n_pruned = n_pruned_by(masks)
        stage = f"{100 * n_pruned / objective.n_components:.0f} % pruned, {purpose}"

        def report(epoch: Epoch) -> None:
            adaptation.stage = f"{stage}, epoch {epoch.number} of at most {epoch.n_epochs}"

        adaptation.stage = stage
        try:
            trained = fine_tuned(
                objective.network if weights is None else weights.on(objective.network),
                masks,
                images,
                options,
                validation=validation,
                checkpoint=None if self.checkpoints is None else self.checkpoints / f"{n_pruned}-{purpose}.safetensors",
                on_epoch=report,
            )
        except TrainingError as error:
            raise TrainingError(f"{purpose.capitalize()}, {stage.split(',')[0]}: {error}") from error
        return weights if trained is None else trained


class Adaptation:
    """Evaluates composites and criteria on one split with one network that is trained on its T and P.

    Not thread-safe. The model's own network is never changed.

    Args:
        model: trained, see `pretrain`; its outputs are those of the data.
        data: of the split.
        options: what to do.

    Attributes:
        objective: that ranks on P, whose `search` images are P's evaluation images and whose `confirmation` images F's.
        stage: how far an evaluation is, for another thread to read; None between.

    Raises:
        DataError: the network has other outputs than the split.
        UnsupportedNetworkError: the network can't be attributed correctly.
        DeviceError: the device doesn't exist.
    """

    def __init__(
        self,
        model: LoadedModel,
        data: SplitData,
        options: AdaptationOptions = AdaptationOptions(),
    ) -> None:
        n_outputs = len(data.outputs)
        if model.num_classes != n_outputs:
            raise DataError(
                f"The network has {model.num_classes} outputs, but the split {n_outputs} ({', '.join(data.outputs)}); "
                "build it with as many."
            )
        self.data = data
        self.options = options
        self.stage: str | None = None
        references = _drawn(data.training.task, options.n_references, options.procedure.training.seed)
        evaluation = data.evaluation
        task = Task(
            references=references,
            search=evaluation.task,
            confirmation=evaluation.new,
            classes=tuple(range(n_outputs)),
            class_names=data.outputs,
            source=f"split of {data.split.scenario}",
            fingerprint=_fingerprint(references, evaluation.task, evaluation.new),
            preprocessing=model.preprocessing,
            reference_indices=(),
        )
        self.objective = Objective(
            model,
            task,
            ObjectiveOptions(
                rates=options.procedure.shares,
                ranking="layer",
                abs_scope=options.abs_scope,
                output_relevance=options.output_relevance,
                batch_size=options.batch_size,
                device=options.device,
            ),
        )

    def steps(self, composite: Ranker, checkpoints: Path | None = None) -> Iterator[AdaptedStep]:
        """The sizes that pruning comes to, made one by one; each is adapted when its `record` is asked for.

        Args:
            composite: or criterion.
            checkpoints: an existing directory of this composite's alone; one that was killed goes on from them. They
                aren't removed at the end.

        Raises:
            RepairError: the composite repairs networks.
            RelevanceError: its relevance can't be used.
            TrainingError: a training diverged.
            OutOfMemoryError: the device has no room for a single image, or a batch of a training.
        """
        if composite.repair:
            raise RepairError(
                f"Repair {composite.repair} is for networks that aren't trained after pruning; leave it out of the "
                "composite."
            )
        return task_relevant(_Pruning(self, composite, checkpoints), self.options.procedure)

    def record(self, step: AdaptedStep) -> AdaptationRecord:
        """Adapts a size and measures it, before and after.

        Raises:
            TrainingError: the training diverged.
            OutOfMemoryError: the device has no room for a single image, or a batch of a training.
        """
        masks, adapted = step.ranking.masks(step.n_pruned), step.weights(step.n_pruned)
        before = self._measured("search", masks, step.retrained)
        on_task = self._measured("search", masks, adapted)
        on_new = self._measured("confirmation", masks, adapted)
        size = self.objective.evaluator("search").measure(masks, weights=adapted).cost
        correct, labels = self._of_adaptation(on_task, on_new)
        return AdaptationRecord(
            share=step.share,
            n_pruned=step.n_pruned,
            parameters=size.parameters,
            flops=size.flops,
            accuracy_pruned=_mean(before),
            accuracy=_mean(correct),
            accuracy_task=_mean(on_task),
            accuracy_new=_mean(on_new),
            class_accuracies=tuple(_mean(correct[labels == label]) for label in labels.unique()),
        )

    def curve(self, records: Sequence[AdaptationRecord]) -> Curve:
        """Accuracy after adaptation over size; at size 0 that of the network without any component.

        Args:
            records: of all sizes, the unpruned one first.
        """
        nothing = {
            name: torch.zeros(width, dtype=torch.bool) for name, width in self.objective.component_widths.items()
        }
        collapsed, _ = self._of_adaptation(
            self._measured("search", nothing, None), self._measured("confirmation", nothing, None)
        )
        return Curve(
            rates=tuple(record.share for record in records),
            accuracies=tuple(record.accuracy for record in records),
            class_accuracies=tuple(record.class_accuracies for record in records),
            parameters=tuple(record.parameters for record in records),
            flops=tuple(record.flops for record in records),
            collapsed_accuracy=_mean(collapsed),
        )

    def evaluate(self, composite: Ranker, checkpoints: Path | None = None) -> AdaptationEvaluation:
        """Prunes, retrains, adapts and measures all sizes.

        Args:
            composite: see `steps`.
            checkpoints: likewise.

        Raises:
            RepairError: the composite repairs networks.
            RelevanceError: its relevance can't be used.
            TrainingError: a training diverged.
            OutOfMemoryError: the device has no room for a single image, or a batch of a training.
        """
        try:
            records = tuple(self.record(step) for step in self.steps(composite, checkpoints))
        finally:
            self.stage = None
        return AdaptationEvaluation(self.curve(records), records)

    def _measured(self, images: ImageSet, masks: Masks, weights: TrainedWeights | None) -> Tensor:
        """(N,) of bool on the CPU: which evaluation images are classified correctly."""
        evaluator = self.objective.evaluator(images)
        correct = evaluator.measure(masks, weights=weights).correct.cpu()
        evaluator.news()  # of nobody's interest
        return correct

    def _of_adaptation(self, on_task: Tensor, on_new: Tensor) -> tuple[Tensor, Tensor]:
        """Of what networks are adapted to: which images are classified correctly, and the labels of all."""
        task, new = self.data.evaluation.task.labels.cpu(), self.data.evaluation.new.labels.cpu()
        if self.data.is_replayed:
            return torch.cat([on_task, on_new]), torch.cat([task, new])
        return on_new, new


def _drawn(images: LabelledImages, n: int | None, seed: int) -> LabelledImages:
    if n is None or n >= len(images):
        return images
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n].sort().values
    return LabelledImages(images.images[rows], images.labels[rows])


def _fingerprint(*parts: LabelledImages) -> str:
    tensors: dict[str, Tensor] = {}
    for index, part in enumerate(parts):
        tensors |= {f"images.{index}": part.images, f"labels.{index}": part.labels}
    return state_fingerprint(tensors)


def _mean(correct: Tensor) -> float:
    return float(correct.double().mean())
