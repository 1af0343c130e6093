"""Data of a task split: the images of T, P and F that networks are trained on, stopped by and measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from objectives.datasets.tasks import LabelledImages
from objectives.errors import DataError
from search_spaces.suggestions import did_you_mean
from search_spaces.task_splits import SPLIT_SETS, TaskSplit

__all__ = ["Domains", "SplitData", "SplitImages", "joined", "split_data"]


@dataclass(frozen=True, slots=True, eq=False)
class SplitImages:
    """Images of the three sets of a split, labelled by output.

    Attributes:
        extra: of T; may be none.
        task: of P.
        new: of F.
    """

    extra: LabelledImages
    task: LabelledImages
    new: LabelledImages


@dataclass(frozen=True, slots=True, eq=False)
class Domains:
    """Which domain each image is of.

    Attributes:
        names: of all domains.
        training: (N,) position in `names` of each training image's.
        evaluation: (M,) likewise of each evaluation image's.
    """

    names: tuple[str, ...]
    training: Tensor
    evaluation: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SplitData:
    """What networks of a split are trained on, stopped by and measured on.

    Attributes:
        split: whose.
        outputs: names of the networks' outputs.
        training: images that are trained on, and that relevance is computed on.
        validation: images by which training stops, held out of the training images.
        evaluation: images that accuracy is measured on.
    """

    split: TaskSplit
    outputs: tuple[str, ...]
    training: SplitImages
    validation: SplitImages
    evaluation: SplitImages

    @property
    def is_replayed(self) -> bool:
        """Whether networks are adapted on P and F, so that they don't forget P; otherwise on F alone."""
        return self.split.scenario == "new_classes"

    def pretraining(self, images: SplitImages) -> LabelledImages:
        """What the unpruned network learns: T and P."""
        return joined(images.extra, images.task)

    def adaptation(self, images: SplitImages) -> LabelledImages:
        """What pruned networks are adapted to: P and F with replay, else F."""
        return joined(images.task, images.new) if self.is_replayed else images.new


def joined(first: LabelledImages, second: LabelledImages) -> LabelledImages:
    """All images of both."""
    return LabelledImages(torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels]))


def split_data(
    split: TaskSplit,
    training: LabelledImages,
    evaluation: LabelledImages,
    class_names: Sequence[str],
    *,
    domains: Domains | None = None,
    validation_share: float = 0.1,
    seed: int = 0,
) -> SplitData:
    """Divides images among the sets of a split, and training images into those trained on and those validated on.

    Args:
        split: by class, or by domain.
        training: on the CPU, labelled by position in `class_names`.
        evaluation: likewise.
        class_names: of all classes.
        domains: of the images; needed for splits by domain, and for these only.
        validation_share: of the training images of each class (and domain), rounded up; in (0, 1).
        seed: of which images are held out.

    Raises:
        DataError: the split names a class or domain that is unknown or lacks images, or the options don't fit it.
    """
    if not 0 < validation_share < 1:
        raise DataError(f"`validation_share` of a split's images must lie in (0, 1), but got {validation_share!r}.")
    if (domains is not None) != (split.by == "domain"):
        raise DataError(f"A split by {split.by} {'needs' if domains is None else 'takes no'} `domains` of the images.")
    names = class_names if domains is None else domains.names
    groups, evaluated = (
        (training.labels, evaluation.labels) if domains is None else (domains.training, domains.evaluation)
    )
    # Unknown names first: of a class that doesn't exist, images aren't what is missing.
    _divided(split, training, groups, names, "training")
    held_out = _held_out(training.labels, groups, validation_share, seed)
    for key in SPLIT_SETS:
        for name in getattr(split, key):
            of_name = groups == list(names).index(name)
            if not bool((of_name & ~held_out).any()):
                raise DataError(
                    f"The {split.by} {name!r} in {key} of a split has {int(of_name.sum())} training images, too few to "
                    "train on and to hold out for validation; add some."
                )
    trained, validated = (
        _divided(split, LabelledImages(training.images[rows], training.labels[rows]), groups[rows], names, what)
        for rows, what in ((~held_out, "training"), (held_out, "validation"))
    )
    return SplitData(
        split,
        split.outputs(class_names),
        trained,
        validated,
        _divided(split, evaluation, evaluated, names, "evaluation"),
    )


def _divided(split: TaskSplit, images: LabelledImages, groups: Tensor, names: Sequence[str], what: str) -> SplitImages:
    """The images of T, P and F.

    Args:
        split: by class or domain.
        images: labelled by class.
        groups: (N,) on the CPU, position in `names` of each image's class or domain.
        names: of all classes, or of all domains.
        what: the images are for, in the user's words.

    Returns:
        Their labels are positions in the outputs of the split's networks.

    Raises:
        DataError: a class or domain is unknown or has no images.
    """
    labels = images.labels
    if split.superclasses:
        place = {name: index for index, classes in enumerate(split.superclasses.values()) for name in classes}
        labels = torch.tensor([place.get(name, -1) for name in names])[groups].to(labels.device)
    parts = []
    for key in SPLIT_SETS:
        wanted = torch.zeros(len(names), dtype=torch.bool)
        for name in getattr(split, key):
            if name not in names:
                raise DataError(f"Unknown {split.by} {name!r} in {key} of a split.{did_you_mean(name, names)}")
            index = list(names).index(name)
            if not bool((groups == index).any()):
                raise DataError(
                    f"The {split.by} {name!r} in {key} of a split has no {what} images; leave it out or add some."
                )
            wanted[index] = True
        rows = wanted[groups].nonzero().flatten()
        parts.append(LabelledImages(images.images[rows], labels[rows]))
    return SplitImages(*parts)


def _held_out(labels: Tensor, groups: Tensor, share: float, seed: int) -> Tensor:
    """(N,) of bool: at least the share of the images of each class and domain, drawn."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.stack([labels, groups], dim=1).unique(dim=0, return_inverse=True)[1]
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for kind in range(int(kinds.max()) + 1):
        rows = (kinds == kind).nonzero().flatten()
        drawn = torch.randperm(len(rows), generator=generator)[: math.ceil(share * len(rows))]
        held_out[rows[drawn]] = True
    return held_out
