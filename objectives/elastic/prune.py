"""Prune and grow: from a ranking to an elastic network on disk, with a report.

The ranking prunes to the smallest level, the core. Then larger levels are rebuilt from it: what they have beyond the
next smaller one returns to its places with its original weights. With training the core is repaired and fine-tuned
first, unless the procedure has done so on the way, and what returns is trained, while all that is smaller stays frozen
(see `objectives.elastic.rebuild`). Without, every level is the exact slim network of its masks.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from objectives.datasets import LabelledImages
from objectives.elastic.figures import LevelFigures, figures
from objectives.elastic.files import Origin, save_elastic
from objectives.elastic.model import ElasticModel
from objectives.elastic.rebuild import rebuild
from objectives.errors import OptionError, TrainingError
from objectives.network import CanonicalNetwork
from objectives.objective import Objective
from objectives.pruning.evaluation import correct_predictions
from objectives.pruning.prune import differences
from objectives.pruning.ranking import Masks, n_pruned_by
from objectives.pruning.slim_files import new_directory
from objectives.pruning.slimming import depends_on_images, draft
from objectives.pruning.structured import coupled_masks
from objectives.pruning.trained import TrainedWeights
from objectives.training import Epoch, TrainingOptions, train
from search_spaces.choices import ImageSet
from search_spaces.criteria import Ranker
from search_spaces.documents import CompositeDocument
from search_spaces.procedures import OneShot
from search_spaces.repairs import NO_REPAIR, RepairSpec

__all__ = ["ElasticReport", "Growth", "check_levels", "check_masks", "parse_levels", "prune_elastic"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Growth:
    """How an elastic network is trained.

    Attributes:
        images: on the CPU or the network's device.
        options: of the core's training where its procedure trains nothing, and then of each larger level's.
        repair: of the core before its training, where its procedure trains nothing; larger levels share what it
            changes, and their training makes up for it.
    """

    images: LabelledImages
    options: TrainingOptions
    repair: RepairSpec = NO_REPAIR


@dataclass(frozen=True, slots=True)
class ElasticReport:
    """Result of `prune_elastic`.

    Attributes:
        sparsities: share of the components that each level is without, 0 first.
        levels: each of them, measured.
        ungrown_accuracies: of each level after pruning, before growth; None without growth.
        ranker: label of the composite or criterion that ranked.
        procedure: how pruning proceeded, with its options.
        n_components: of the whole network.
        growth: number of images and options of the training; None without.
        repair: of the smallest level before its training, here or by the procedure.
        images: which images accuracy was measured on, and how many.
        size_bytes: of the weights of all levels together.
        warnings: what the user should know, a sentence each.
        files: written.
    """

    sparsities: tuple[float, ...]
    levels: tuple[LevelFigures, ...]
    ungrown_accuracies: tuple[float, ...] | None
    ranker: str
    procedure: str
    n_components: int
    growth: dict[str, Any] | None
    repair: str
    images: dict[str, Any]
    size_bytes: int
    warnings: tuple[str, ...]
    files: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def parse_levels(text: str) -> tuple[float, ...]:
    """Levels from a comma-separated list.

    >>> parse_levels("0.3,0.5,0.7")
    (0.3, 0.5, 0.7)

    Raises:
        OptionError: they aren't numbers above 0 and below 1 that increase.
    """
    try:
        return check_levels(tuple(float(part) for part in text.split(",")))
    except ValueError as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"`--elastic {text}` isn't a comma-separated list of shares; try 0.3,0.5,0.7.") from error


def check_levels(levels: tuple[float, ...]) -> tuple[float, ...]:
    """The sparsities of all levels but the whole network, if they increase strictly between 0 and 1.

    Raises:
        OptionError: they don't, or there are none.
    """
    increasing = all(low < high for low, high in itertools.pairwise(levels))
    if not levels or not increasing or not (levels[0] > 0 and levels[-1] < 1):
        raise OptionError(
            f"Levels of `--elastic` must increase strictly, above 0 and below 1, but got {', '.join(map(str, levels))}."
        )
    return levels


def prune_elastic(
    objective: Objective,
    ranker: Ranker,
    *,
    levels: Sequence[float],
    output: Path,
    coupled: bool = False,
    growth: Growth | None = None,
    document: CompositeDocument | None = None,
    on_epoch: Callable[[int, Epoch], None] | None = None,
) -> ElasticReport:
    """Makes an elastic network, and writes `elastic.safetensors` and `report.json`.

    Args:
        objective: of the network; its procedure prunes.
        ranker: composite or criterion.
        levels: share of the components that each level is without, increasing; the whole network is a level besides.
        output: directory to write; it must not exist, or be empty. A training that is killed leaves its checkpoints
            beside it, from which the same call goes on.
        coupled: remove whole coupled groups of channels, found by torch-pruning, up to each share.
        growth: training; without, all levels have the weights that pruning left.
        document: that the composite is from; what differs from it is warned of.
        on_epoch: called with the level, 0 for the whole network, after each epoch that is computed.

    Raises:
        OptionError: levels don't increase between 0 and 1, prune the same components, or lose a whole layer; or coupled
            groups are to be removed of a vision transformer, or in another way than in one shot.
        UnsupportedNetworkError: torch-pruning can't follow the network.
        RelevanceError: the composite's relevance can't be used.
        RepairError: a pruned network can't be repaired.
        TrainingError: a level's training diverged, or the procedure's.
        OutOfMemoryError: the device has no room for a batch.
        SlimFileError: the output exists or can't be written.
    """
    checked = check_levels(tuple(levels))
    with new_directory(output) as directory, objective.ending(ranker):
        sparsities = (0.0, *checked)
        trained = None
        if coupled:
            masks = _coupled(objective, ranker, sparsities)
            check_masks(sparsities, masks)
        else:
            path = objective.path(ranker)
            masks = [path.masks(path.n_pruned(share)) for share in sparsities]
            check_masks(sparsities, masks)
            trained = path.weights(path.n_pruned(checked[-1]))
        model = ElasticModel(objective.network if trained is None else trained.on(objective.network), masks)
        report = _Elastic(objective, ranker, document, sparsities, coupled, model)
        ungrown = None
        if growth is not None:
            ungrown = report.accuracies()
            if trained is None:
                model = ElasticModel(_with_repaired_core(objective, masks[-1], growth.repair), masks)
                report = replace(report, model=model)
            _grow(model, growth, output, trained is None, on_epoch)
        repair = NO_REPAIR if growth is None else growth.repair
        content = report.measured(growth, ungrown, objective.repair(ranker) if trained is not None else repair, output)
        save_elastic(model, directory / "elastic.safetensors", report.origin())
        (directory / "report.json").write_text(json.dumps(content.to_json(), indent=2) + "\n")
    return content


def check_masks(shares: Sequence[float], masks: Sequence[Masks]) -> None:
    """Refuses levels that a network can't have.

    Args:
        shares: of the components that each level is without, 0 first.
        masks: of each level.

    Raises:
        OptionError: a level prunes what the one before it does, or all components of a layer.
    """
    numbers = [n_pruned_by(of_level) for of_level in masks]
    n_components = sum(len(mask) for mask in masks[0].values())
    for (low, larger), (high, smaller) in itertools.pairwise(zip(shares, numbers, strict=True)):
        if larger == smaller:
            raise OptionError(
                f"The levels {low:g} and {high:g} of `--elastic` both prune {larger} of {n_components} components; "
                "leave one out."
            )
    for share, of_level in zip(shares, masks, strict=True):
        if gone := [name for name, mask in of_level.items() if not bool(mask.any())]:
            others = f" and {len(gone) - 1} others" if len(gone) > 1 else ""
            raise OptionError(
                f"The level {share:g} of `--elastic` removes the whole layer {gone[0]!r}{others}; choose smaller "
                "levels, or rank every layer within itself (`--ranking layer`)."
            )


def _coupled(objective: Objective, ranker: Ranker, shares: Sequence[float]) -> Sequence[Masks]:
    """Masks without whole coupled groups; where each layer is ranked within itself, each group loses its share."""
    if objective.network.is_transformer:
        raise OptionError("Nothing is coupled in a vision transformer's levels; leave `--coupled` out.")
    procedure = objective.options.procedure
    if procedure.name != OneShot.name:
        raise OptionError(f"Coupled groups are removed in one shot, not by {procedure}; leave `--coupled` out.")
    return coupled_masks(
        objective.model.network,
        objective.network,
        objective.scores(ranker),
        shares,
        by_group=objective.ranking_scope == "layer",
    )


def _with_repaired_core(objective: Objective, masks: Masks, repair: RepairSpec) -> CanonicalNetwork:
    """The network whose core is repaired; all that masks prune has its original weights."""
    # In an order of their own dead rows of groups that aren't wholly dead keep their weights.
    core = draft(objective.repaired(masks, repair), masks, orders={}).written()
    return TrainedWeights.of(core, masks).on(objective.network)


def _grow(
    model: ElasticModel,
    growth: Growth,
    output: Path,
    trains_core: bool,
    on_epoch: Callable[[int, Epoch], None] | None,
) -> None:
    """Trains the core, unless pruning has done so, then what each larger level has beyond it."""
    checkpoints = output.absolute().with_name(f".{output.name}.growing")
    checkpoints.mkdir(parents=True, exist_ok=True)
    core = model.n_levels - 1
    report = None if on_epoch is None else partial(on_epoch, core)
    checkpoint = checkpoints / f"level-{core}.safetensors"
    try:
        if trains_core:
            train(model.at(core), growth.images, growth.options, checkpoint=checkpoint, on_epoch=report)
        rebuild(model, growth.images, growth.options, checkpoints=checkpoints, on_epoch=on_epoch)
    except TrainingError as error:
        shutil.rmtree(checkpoints)  # with other options it begins anew
        raise TrainingError(f"Growing: {str(error).removesuffix('.')} (`--grow-learning-rate`).") from error
    shutil.rmtree(checkpoints)


@dataclass(frozen=True, slots=True, eq=False)
class _Elastic:
    """An elastic network, and what it was made from."""

    objective: Objective
    ranker: Ranker
    document: CompositeDocument | None
    sparsities: tuple[float, ...]
    coupled: bool
    model: ElasticModel

    @property
    def procedure(self) -> str:
        """How pruning proceeded."""
        return f"{self.objective.options.procedure}{' of coupled groups' if self.coupled else ''}"

    def origin(self) -> Origin:
        original, network = self.objective.model, self.objective.network
        return Origin(
            model={"name": original.name, "options": dict(original.options), "num_classes": original.num_classes},
            input_shape=network.input_shape,
            components=network.choice,
            classes=self.objective.kept_outputs,
            preprocessing=self.objective.task.preprocessing.to_json(),
            levels=self.sparsities,
            ranker=self.ranker.to_json(),
            procedure=self.procedure,
        )

    def measured(
        self, growth: Growth | None, ungrown: tuple[float, ...] | None, repair: RepairSpec, output: Path
    ) -> ElasticReport:
        images = self._images()
        return ElasticReport(
            sparsities=self.sparsities,
            levels=figures(self.model, images, self.objective.batches),
            ungrown_accuracies=ungrown,
            ranker=self.ranker.label,
            procedure=self.procedure,
            n_components=self.objective.n_components,
            growth=None if growth is None else {"n_images": len(growth.images), **asdict(growth.options)},
            repair=str(repair),
            images={"set": self._image_set(), "n_images": len(images)},
            size_bytes=sum(tensor.nbytes for tensor in self.model.state_dict().values()),
            warnings=tuple(self._warnings()),
            files=tuple(str(output / name) for name in ("elastic.safetensors", "report.json")),
        )

    def accuracies(self) -> tuple[float, ...]:
        """Of every level as it is."""
        images, batches = self._images(), self.objective.batches
        levels = range(self.model.n_levels)
        correct = [correct_predictions(self.model.at(level), images, batches) for level in levels]
        return tuple(float(each.double().mean()) for each in correct)

    def _image_set(self) -> ImageSet:
        return "confirmation" if len(self.objective.task.confirmation) else "search"

    def _images(self) -> LabelledImages:
        images: LabelledImages = getattr(self.objective.task, self._image_set())
        return images.to(self.objective.device)

    def _warnings(self) -> list[str]:
        warnings = [] if self.document is None else differences(self.objective, self.document)
        for level, sparsity in enumerate(self.sparsities):
            if not depends_on_images(self.model.at(level)):
                warnings.append(
                    f"No path from the image to the logits is left at the level {sparsity:g}: it always gives the same "
                    "answer."
                )
        for warning in warnings:
            _log.warning(warning)
        return warnings
