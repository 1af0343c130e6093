"""Downstream pruning: from an export document to a smaller network on disk, with a report.

Relevance is computed anew from the document's composite, the pruned components are removed physically, what is left is
repaired from the reference images, and three things are reported apart: the user's network with the components masked,
the exact slim network, and, if wanted, the coupled network of the user's own class, which isn't repaired.
"""

from __future__ import annotations

import bisect
import copy
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn

from objectives.canonization import canonize
from objectives.datasets import LabelledImages, Task
from objectives.devices import on_device
from objectives.errors import OptionError
from objectives.models import LoadedModel
from objectives.objective import Columns, Objective, ObjectiveOptions
from objectives.procedures.path import PruningPath
from objectives.pruning.curve import keeps
from objectives.pruning.evaluation import correct_predictions
from objectives.pruning.latency import latency_ms
from objectives.pruning.masking import masked
from objectives.pruning.slim_files import new_directory, write_program, write_state, write_weights
from objectives.pruning.slimming import cost, depends_on_images, draft, slim
from objectives.pruning.structured import prune_coupled, resize_transformer
from objectives.pruning.zeroing import zeroed
from objectives.repair.own import repaired
from objectives.repair.repairer import with_layers
from search_spaces.choices import ImageSet
from search_spaces.documents import CompositeDocument
from search_spaces.procedures import OneShot
from search_spaces.repairs import NO_REPAIR, RepairSpec

__all__ = ["AmountKind", "NetworkFigures", "PruneAmount", "PruneReport", "RepairFigures", "differences", "prune"]

AmountKind = Literal["rate", "keep_accuracy", "parameters", "flops"]

_OPTIONS: dict[AmountKind, str] = {
    "rate": "--rate",
    "keep_accuracy": "--keep-accuracy",
    "parameters": "--params",
    "flops": "--flops",
}
_ACCURACY_STEPS = 100

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PruneAmount:
    """How much to prune.

    Attributes:
        kind: `rate`: this share of the components; `keep_accuracy`: as many as leave this share of the unpruned
            accuracy up to every whole percent, on the search images; `parameters`, `flops`: until at most this share is
            left.
        value: a share.
    """

    kind: AmountKind
    value: float

    def __post_init__(self) -> None:
        lowest_fits = self.value >= 0 if self.kind == "rate" else self.value > 0
        highest_fits = self.value < 1 if self.kind == "rate" else self.value <= 1
        if not (lowest_fits and highest_fits):
            bounds = "at least 0 and below 1" if self.kind == "rate" else "above 0 and at most 1"
            raise OptionError(f"{_OPTIONS[self.kind]} must be {bounds}, but got {self.value}.")


@dataclass(frozen=True, slots=True)
class NetworkFigures:
    """What one network costs and achieves.

    Sizes are of its canonical form, so that all networks of a report are counted alike: batch norm folded, and the
    classifier restricted to the task's classes.

    Attributes:
        accuracy: on the report's images.
        parameters: weights and biases.
        flops: multiply-adds for one image.
        size_bytes: of the weights, and of a slim network's indices.
        latency_ms: median for one image, of the network as it is run.
    """

    accuracy: float
    parameters: int
    flops: int
    size_bytes: int
    latency_ms: float


@dataclass(frozen=True, slots=True)
class RepairFigures:
    """What the repair of the exact slim network did.

    Agreement is the share of the report's images whose prediction is the unpruned network's; no labels are used for it.

    Attributes:
        method: of `search_spaces.repairs.REPAIRS`.
        strength: given, or chosen from the reference images, of a transformer's refit for each layer; None of `none`.
        n_references: images that it was made with; 0 of `none`.
        seconds: that it took once its strength was chosen; None of `none` and where it is part of a training.
        accuracy_without: of the slim network without it, on the report's images; None where the repaired network was
            trained, as without it another training would have followed.
        agreement: of the slim network.
        agreement_without: of the slim network without it; None likewise.
    """

    method: str
    strength: float | dict[str, float] | None
    n_references: int
    seconds: float | None
    accuracy_without: float | None
    agreement: float
    agreement_without: float | None


@dataclass(frozen=True, slots=True)
class PruneReport:
    """Result of `prune`.

    Attributes:
        amount: what was asked for.
        composite: label of the one that ranked.
        procedure: how pruning proceeded, with its options.
        n_components: of the whole network.
        n_pruned: components removed.
        images: which images accuracy was measured on, and how many.
        preprocessing: which images every network of the report takes.
        unpruned: the user's network.
        masked_accuracy: of the user's network with the components masked and the same repair; where it is fine-tuned,
            of the fine-tuned one in canonical form.
        exact: the exact slim network, repaired.
        repair: what the repair did.
        coupled: the coupled network, if asked for.
        n_removed_coupled: components that it lost.
        warnings: what differs from the document.
        files: written.
    """

    amount: PruneAmount
    composite: str
    procedure: str
    n_components: int
    n_pruned: int
    images: dict[str, Any]
    preprocessing: dict[str, Any]
    unpruned: NetworkFigures
    masked_accuracy: float
    exact: NetworkFigures
    repair: RepairFigures
    coupled: NetworkFigures | None
    n_removed_coupled: int | None
    warnings: tuple[str, ...]
    files: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def prune(
    model: LoadedModel,
    task: Task,
    document: CompositeDocument,
    *,
    amount: PruneAmount,
    output: Path,
    coupled: bool = False,
    device: str = "auto",
    batch_size: int = 100,
    repair: RepairSpec | None = None,
) -> PruneReport:
    """Prunes a network with a document's composite and writes the result.

    Args:
        model: the network that the document was made for.
        task: reference samples and evaluation images.
        document: written by `hpo export`.
        amount: how much to prune.
        output: directory to write; it must not exist, or be empty.
        coupled: also remove coupled groups by torch-pruning.
        device: to compute on.
        batch_size: images a pass.
        repair: of the exact slim network, from the reference images; by default as the document has it, and where that
            has none refitted. A network that the procedure fine-tunes is repaired before each training, by default only
            if the document says so: it is the one that was searched for. The coupled network isn't repaired.

    Raises:
        RepairError: the pruned network can't be repaired.
        UnsupportedNetworkError: the network isn't the document's, or can't be pruned.
        SlimFileError: the output exists or can't be written.
        TrainingError: fine-tuning diverged.
        OptionError: the amount can't be reached, or coupled groups are to be removed in another way than in one shot.
    """
    if coupled and document.procedure != OneShot.name and document.composite.attention is None:
        raise OptionError(
            f"Coupled groups are removed in one shot, but the document's procedure is {document.procedure_spec}; leave "
            "`--coupled` out."
        )
    if repair is None:
        procedure, repair = document.procedure_spec, RepairSpec.from_json(document.repair)
        # What is trained was searched for as the document says.
        repair = repair if repair or procedure.fine_tunes else RepairSpec(procedure.usual_repair)
    options = ObjectiveOptions(
        rates=document.rates,
        procedure=document.procedure_spec,
        components=document.components,
        ranking=document.ranking,
        abs_scope=document.abs_scope,
        output_relevance=document.output_relevance,
        batch_size=batch_size,
        device=device,
        repair=repair,
    )
    with new_directory(output) as directory:
        objective = Objective(model, task, options, document)
        _log.info("Ranking components by %s.", document.composite.label)
        path = objective.path(document.composite)
        if amount.kind == "keep_accuracy":
            _log.info("Measuring how many of %d components can go on %d images.", len(path), len(task.search))
        n = _n_pruned(objective, path, amount)
        return _Pruning(objective, document, path, n).write(directory, output, amount, coupled)


def _n_pruned(objective: Objective, path: PruningPath, amount: PruneAmount) -> int:
    match amount.kind:
        case "rate":
            return path.n_pruned(amount.value)
        case "keep_accuracy":
            return _most_that_keep(objective, path, amount.value)
        case _:
            return _fewest_that_fit(objective, path, amount)


def _most_that_keep(objective: Objective, path: PruningPath, share: float) -> int:
    """The largest number, in steps of 1 %, up to which every step keeps a share of the unpruned accuracy."""
    evaluator, repair = objective.evaluator("search"), objective.options.repair
    kept, least, start = 0, None, None
    for step in range(_ACCURACY_STEPS):
        n = step * len(path) // _ACCURACY_STEPS
        measurement = evaluator.measure(path.masks(n), repair=repair, weights=path.weights(n))
        accuracy = float(measurement.correct.double().mean())
        start = accuracy if start is None else start
        if not keeps(accuracy, share, start):
            break
        kept, least = n, accuracy
    _log.info("Without %d of them accuracy is %.4f there, with all %.4f.", kept, least, start)
    return kept


def _fewest_that_fit(objective: Objective, path: PruningPath, amount: PruneAmount) -> int:
    """The smallest number that leaves at most a share of the parameters or multiply-adds."""

    def size(n: int) -> int:
        return int(getattr(cost(draft(objective.network, path.masks(n))), amount.kind))

    limit = amount.value * size(0)
    n = bisect.bisect_left(range(len(path)), -limit, key=lambda n: -size(n))
    if n == len(path):
        left = size(n - 1) / size(0)
        raise OptionError(
            f"{_OPTIONS[amount.kind]} {amount.value} can't be reached: {left:.3g} is left with one component."
        )
    return n


@dataclass(frozen=True, slots=True, eq=False)
class _Pruning:
    objective: Objective
    document: CompositeDocument
    path: PruningPath
    n_pruned: int

    def write(self, directory: Path, target: Path, amount: PruneAmount, coupled: bool) -> PruneReport:
        objective, network = self.objective, self.objective.network
        masks, weights = self.path.masks(self.n_pruned), self.path.weights(self.n_pruned)
        trained = network if weights is None else weights.on(network)
        repair, repairer = objective.options.repair, objective.repairer
        # What is trained was repaired before.
        repaired_now = repair if weights is None else NO_REPAIR
        unrepaired = slim(trained, masks)
        if repaired_now:
            _log.info("Repairing the network on %d reference images.", len(repairer.images))
        layers = repairer.layers(masks, repaired_now)
        slim_network = slim(with_layers(trained, layers), masks)
        input_shape = network.input_shape
        _log.info("Writing the network without %d of %d components.", self.n_pruned, len(self.path))
        write_program(_on_cpu(slim_network), input_shape, directory / "slim.pt2")
        strength = repairer.strength(repair)
        used = RepairSpec(repair.method, None if isinstance(strength, dict) else strength)
        biased = layers if weights is None else weights.biased
        write_weights(
            slim_network, masks, self.document, objective.kept_outputs, directory / "slim.safetensors", used, biased
        )
        _log.info("Measuring accuracy and latency on %d %s images.", len(self._images()), self._image_set())
        own = on_device(objective.model.network, objective.device)
        original = self._restricted(own)
        if weights is None:
            with (
                repaired(own, network.layers, layers, objective.kept_outputs),
                masked(own, network.prunable, masks),
            ):
                masked_accuracy = self._accuracy(original)
        else:
            masked_accuracy = self._accuracy(zeroed(trained, masks).module)
        coupled_figures, n_removed = None, None
        if coupled:
            if network.is_transformer:
                result = resize_transformer(own, network, masks)
            else:
                result = prune_coupled(own, network, objective.scores(self.document.composite), self.n_pruned)
            write_state(result.network, directory / "coupled.safetensors")
            restricted = self._restricted(result.network)
            write_program(_on_cpu(restricted), input_shape, directory / "coupled.pt2")
            coupled_figures = self._figures(
                restricted, canonize(result.network, input_shape, objective.kept_outputs).module
            )
            n_removed = result.n_removed
        is_measured = repair == repaired_now
        report = PruneReport(
            amount=amount,
            composite=self.document.composite.label,
            procedure=str(objective.options.procedure),
            n_components=len(self.path),
            n_pruned=self.n_pruned,
            images={"set": self._image_set(), "n_images": len(self._images())},
            preprocessing=objective.task.preprocessing.to_json(),
            unpruned=self._figures(original, network.module),
            masked_accuracy=masked_accuracy,
            exact=self._figures(slim_network, slim_network),
            repair=RepairFigures(
                method=repair.method,
                strength=strength,
                n_references=len(repairer.images) if repair else 0,
                seconds=repairer.seconds(masks, repaired_now) if repaired_now else None,
                accuracy_without=self._accuracy(unrepaired) if is_measured else None,
                agreement=self._agreement(slim_network),
                agreement_without=self._agreement(unrepaired) if is_measured else None,
            ),
            coupled=coupled_figures,
            n_removed_coupled=n_removed,
            warnings=tuple(self._warnings(slim_network)),
            files=(*(str(target / path.name) for path in sorted(directory.iterdir())), str(target / "report.json")),
        )
        (directory / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n")
        return report

    def _restricted(self, network: nn.Module) -> nn.Module:
        kept = self.objective.kept_outputs
        return network if kept is None else Columns(network, kept)

    def _image_set(self) -> ImageSet:
        return "confirmation" if len(self.objective.task.confirmation) else "search"

    def _images(self) -> LabelledImages:
        images: LabelledImages = getattr(self.objective.task, self._image_set())
        return images

    def _accuracy(self, network: nn.Module) -> float:
        images = self._images().to(self.objective.device)
        correct = correct_predictions(network, images, self.objective.batches)
        return float(correct.double().mean())

    def _agreement(self, network: nn.Module) -> float:
        """Share of the report's images on which a network predicts what the unpruned one does.

        Not of the references: what is fitted to them agrees there.
        """
        images = self._images().images.to(self.objective.device)
        with torch.inference_mode():
            batches = images.split(self.objective.batches.size)
            predictions = torch.cat([self.objective.network.module(batch).argmax(dim=1) for batch in batches])
        wanted = LabelledImages(images, predictions)
        return float(correct_predictions(network, wanted, self.objective.batches).double().mean())

    def _figures(self, network: nn.Module, canonical: fx.GraphModule) -> NetworkFigures:
        size = cost(canonical)
        return NetworkFigures(
            accuracy=self._accuracy(network),
            parameters=size.parameters,
            flops=size.flops,
            size_bytes=sum(tensor.nbytes for tensor in canonical.state_dict().values()),
            latency_ms=latency_ms(network, self._images().images[:1].to(self.objective.device)),
        )

    def _warnings(self, slim_network: fx.GraphModule) -> list[str]:
        warnings = differences(self.objective, self.document)
        if not depends_on_images(slim_network):
            warnings.append("No path from the image to the logits is left: the network always gives the same answer.")
        for warning in warnings:
            _log.warning(warning)
        return warnings


def differences(objective: Objective, document: CompositeDocument) -> list[str]:
    """What isn't as it was when a document was made, a sentence each."""
    warnings = []
    if objective.model.fingerprint != document.model["fingerprint"]:
        warnings.append("The weights aren't those that the document was made for.")
    if objective.task.fingerprint != document.data["fingerprint"]:
        warnings.append("The images aren't those that the document was made for.")
    if objective.task.preprocessing.to_json() != document.preprocessing:
        warnings.append("The preprocessing isn't the document's.")
    return warnings


def _on_cpu(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).cpu()
