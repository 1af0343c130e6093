"""Splits of a data set into extra knowledge T, the task P and new data F, by class or by domain (Avé et al. 2025).

A network is trained on T and P, pruned to what P needs, and adapted to F. A split stands in a TOML table:

    scenario = "new_subclasses"
    T = ["automobile", "dog", "horse"]
    P = ["airplane", "bird", "frog", "ship"]
    F = ["cat", "deer", "truck"]
    [superclasses]
    vehicle = ["airplane", "automobile", "ship", "truck"]
    animal = ["bird", "cat", "deer", "dog", "frog", "horse"]
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from objectives.datasets.tasks import LabelledImages
from objectives.errors import DataError
from search_spaces.suggestions import did_you_mean

__all__ = ["Domains", "Scenario", "SplitData", "SplitImages", "TaskSplit", "joined", "read_splits", "split_data"]

Scenario = Literal["new_classes", "new_subclasses"]
"""What comes after pruning: classes that the network doesn't know, learnt beside those that it does; or other
subclasses (or another domain) of the classes that it knows."""

SplitBy = Literal["class", "domain"]
"""What T, P and F name: classes, or domains of which each has images of all classes."""

_SETS = ("T", "P", "F")


@dataclass(frozen=True, slots=True)
class TaskSplit:
    """Which classes or domains are extra knowledge, the task, and new.

    Attributes:
        scenario: what F is to the network.
        T: that the network is trained on before it is pruned, besides P; may be empty.
        P: that relevance is computed on and pruned networks are retrained on.
        F: that pruned networks are adapted to.
        superclasses: superclass -> its classes, for new subclasses by class: the network's outputs, in this order.
        by: what the three name.

    Raises:
        DataError: a set is empty or shares a name with another, or the superclasses don't fit.
    """

    scenario: Scenario
    T: tuple[str, ...]
    P: tuple[str, ...]
    F: tuple[str, ...]
    superclasses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by: SplitBy = "class"

    def __post_init__(self) -> None:
        for name, known in (("scenario", get_args(Scenario)), ("by", get_args(SplitBy))):
            value = getattr(self, name)
            if value not in known:
                raise DataError(f"Unknown {name} of a split {value!r}.{did_you_mean(str(value), known)}")
        set_of: dict[str, str] = {}
        for key in _SETS:
            for name in getattr(self, key):
                if name in set_of:
                    where = f"twice in {key}" if set_of[name] == key else f"in both {set_of[name]} and {key}"
                    raise DataError(f"The {self.by} {name!r} is {where} of a split; leave it in one place.")
                set_of[name] = key
        for key in ("P", "F"):
            if not getattr(self, key):
                raise DataError(f"{key} of a split is empty; name at least one {self.by}.")
        self._check_superclasses()

    def _check_superclasses(self) -> None:
        if self.by == "domain" and self.scenario == "new_classes":
            raise DataError("A split by domain has no new classes; its scenario is 'new_subclasses'.")
        if self.by == "domain" or self.scenario == "new_classes":
            if self.superclasses:
                raise DataError(
                    f"A split by {self.by} of scenario {self.scenario!r} takes no `superclasses`; leave them out."
                )
            return
        superclass_of: dict[str, str] = {}
        for superclass, classes in self.superclasses.items():
            for name in classes:
                if name in superclass_of:
                    raise DataError(
                        f"The class {name!r} of a split is in the superclasses {superclass_of[name]!r} and "
                        f"{superclass!r}; leave it in one."
                    )
                superclass_of[name] = superclass
        for name in (*self.T, *self.P, *self.F):
            if name not in superclass_of:
                raise DataError(f"The class {name!r} of a split has no superclass; put it into one of `superclasses`.")
        known = {superclass_of[name] for name in self.P}
        for name in self.F:
            if superclass_of[name] not in known:
                raise DataError(
                    f"The class {name!r} in F of a split is of superclass {superclass_of[name]!r}, of which P has no "
                    "class; put one into P, or choose the scenario 'new_classes'."
                )

    @classmethod
    def from_toml(cls, table: Mapping[str, Any]) -> TaskSplit:
        """The split that a TOML table states.

        Raises:
            DataError: it has other keys or values than a split, or the split can't be.
        """
        known = [each.name for each in fields(cls)]
        for key in table:
            if key not in known:
                raise DataError(f"A split takes no {key!r}.{did_you_mean(key, known)}")
        for key in ("scenario", "P", "F"):
            if key not in table:
                raise DataError(f"A split needs {key!r}; add it.")
        superclasses = table.get("superclasses", {})
        if not isinstance(superclasses, Mapping):
            raise DataError(f"`superclasses` of a split are a table of lists of classes, but got {superclasses!r}.")
        return cls(
            scenario=table["scenario"],
            T=_names("T", table.get("T", [])),
            P=_names("P", table["P"]),
            F=_names("F", table["F"]),
            superclasses={key: _names(f"Superclass {key!r}", value) for key, value in superclasses.items()},
            by=table.get("by", "class"),
        )

    def without_extra(self) -> TaskSplit:
        """The baseline whose T is empty."""
        return replace(self, T=())

    def outputs(self, class_names: Sequence[str]) -> tuple[str, ...]:
        """Names of the outputs of the split's networks: the superclasses, or all classes where there are none."""
        return tuple(self.superclasses) or tuple(class_names)

    def divide(self, images: LabelledImages, groups: Tensor, names: Sequence[str], what: str) -> SplitImages:
        """The images of T, P and F.

        Args:
            images: labelled by class.
            groups: (N,) on the CPU, position in `names` of each image's class or domain.
            names: of all classes, or of all domains.
            what: the images are for, in the user's words.

        Returns:
            Their labels are positions in `outputs`.

        Raises:
            DataError: a class or domain is unknown or has no images.
        """
        labels = images.labels
        if self.superclasses:
            place = {name: index for index, classes in enumerate(self.superclasses.values()) for name in classes}
            labels = torch.tensor([place.get(name, -1) for name in names])[groups].to(labels.device)
        parts = []
        for key in _SETS:
            wanted = torch.zeros(len(names), dtype=torch.bool)
            for name in getattr(self, key):
                if name not in names:
                    raise DataError(f"Unknown {self.by} {name!r} in {key} of a split.{did_you_mean(name, names)}")
                index = list(names).index(name)
                if not bool((groups == index).any()):
                    raise DataError(
                        f"The {self.by} {name!r} in {key} of a split has no {what} images; leave it out or add some."
                    )
                wanted[index] = True
            rows = wanted[groups].nonzero().flatten()
            parts.append(LabelledImages(images.images[rows], labels[rows]))
        return SplitImages(*parts)


def read_splits(path: str | Path) -> dict[str, TaskSplit]:
    """The splits of a TOML file, one table each, by name.

    Raises:
        DataError: the file can't be read, or a table is no split.
    """
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"The splits {str(path)!r} can't be read ({error.strerror}); give an existing file.") from error
    except ValueError as error:  # tomllib.TOMLDecodeError, UnicodeDecodeError
        raise DataError(f"The splits {str(path)!r} aren't TOML ({error}).") from error
    splits = {}
    for name, table in document.items():
        if not isinstance(table, Mapping):
            raise DataError(f"{name!r} in {str(path)!r} is no table; a file of splits has one for each: [NAME].")
        try:
            splits[name] = TaskSplit.from_toml(table)
        except DataError as error:
            raise DataError(f"Split {name!r} of {str(path)!r}: {error}") from error
    return splits


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
    split.divide(training, groups, names, "training")
    held_out = _held_out(training.labels, groups, validation_share, seed)
    for key in _SETS:
        for name in getattr(split, key):
            of_name = groups == list(names).index(name)
            if not bool((of_name & ~held_out).any()):
                raise DataError(
                    f"The {split.by} {name!r} in {key} of a split has {int(of_name.sum())} training images, too few to "
                    "train on and to hold out for validation; add some."
                )
    trained, validated = (
        split.divide(LabelledImages(training.images[rows], training.labels[rows]), groups[rows], names, what)
        for rows, what in ((~held_out, "training"), (held_out, "validation"))
    )
    return SplitData(
        split,
        split.outputs(class_names),
        trained,
        validated,
        split.divide(evaluation, evaluated, names, "evaluation"),
    )


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


def _names(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise DataError(f"{key} of a split is a list of names, but got {value!r}.")
    return tuple(value)
