"""Data of a task split: the images of T, P and F that networks are trained on, stopped by and measured on.

>>> split = read_split("splits.toml")
>>> task = load_split_task("digits", model, split, references_per_class=100)
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from objectives.datasets.labels import read_class_map
from objectives.datasets.sources import ImageSource, SourcePair, image_name
from objectives.datasets.tasks import LabelledImages, OpenedData, Task, load_task, open_data
from objectives.errors import DataError
from objectives.preprocessing import RawImage
from search_spaces.choices import ReferenceSampling
from search_spaces.suggestions import did_you_mean
from search_spaces.task_splits import SPLIT_SETS, TaskSplit

if TYPE_CHECKING:
    from objectives.models import LoadedModel

__all__ = ["SplitData", "SplitImages", "joined", "load_split_task", "split_data", "split_task"]

# What images of each class of a set are needed for; what confirms, and what T's accuracy is measured on, may lack some.
_NEEDED = {
    "T": ("training", "validation"),
    "P": ("training", "validation", "evaluation"),
    "F": ("training", "validation", "evaluation"),
}


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
class SplitData:
    """What networks of a split are trained on, stopped by and measured on.

    Attributes:
        split: whose.
        outputs: names of the networks' outputs.
        training: images that are trained on, and that relevance is computed on.
        validation: images by which training stops, held out of the training images.
        evaluation: images that accuracy is measured on; of T there may be none.
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
    validation_share: float = 0.1,
    seed: int = 0,
) -> SplitData:
    """Divides images among the sets of a split, and training images into those trained on and those validated on.

    Args:
        split: by class.
        training: on the CPU, labelled by position in `class_names`.
        evaluation: likewise.
        class_names: of all classes.
        validation_share: of the training images of each class, rounded up; in (0, 1).
        seed: of which images are held out.

    Raises:
        DataError: the split names a class that is unknown or lacks images, or the share is out of range.
    """
    if not 0 < validation_share < 1:
        raise DataError(f"`validation_share` of a split's images must lie in (0, 1), but got {validation_share!r}.")
    # Unknown names first: of a class that doesn't exist, images aren't what is missing.
    _divided(split, training, class_names, "training")
    held_out = _held_out(training.labels, validation_share, seed)
    for key in SPLIT_SETS:
        for name in getattr(split, key):
            of_name = training.labels == list(class_names).index(name)
            if not bool((of_name & ~held_out).any()):
                raise DataError(
                    f"The class {name!r} in {key} of a split has {int(of_name.sum())} training images, too few to "
                    "train on and to hold out for validation; add some."
                )
    trained, validated = (
        _divided(split, LabelledImages(training.images[rows], training.labels[rows]), class_names, what)
        for rows, what in ((~held_out, "training"), (held_out, "validation"))
    )
    return SplitData(
        split,
        split.outputs(class_names),
        trained,
        validated,
        _divided(split, evaluation, class_names, "evaluation"),
    )


def load_split_task(
    source: str | SourcePair,
    model: LoadedModel,
    split: TaskSplit,
    *,
    references_per_class: int,
    evaluation_images: int | None = None,
    confirmation_share: float = 0.5,
    seed: int = 0,
    class_map: str | Path | Mapping[str, int] | None = None,
    sample: ReferenceSampling = "random",
    allow_imports: bool = True,
) -> Task:
    """As `load_task`, of the classes of a split; of T no evaluation images are taken.

    Args:
        source: See `load_task`.
        model: Likewise; its outputs are those of the split.
        split: By class, or by domain where the source tells each image's.
        references_per_class: Training images of each class (of each domain), a tenth of which are held out for
            validation; those of P are the references.
        evaluation_images: See `load_task`.
        confirmation_share: Likewise.
        seed: Likewise; of the images that are held out, too.
        class_map: See `load_task`; of new subclasses it maps to classes of the data, which have no outputs.
        sample: See `load_task`.
        allow_imports: Likewise.

    Raises:
        DataError: As `load_task`, the split names a class or domain that is unknown or lacks images, the source knows
            no domains, or the network has other outputs.
    """
    mapping = read_class_map(class_map) if isinstance(class_map, str | Path) else class_map
    data, labelled, by_class = source, model, split
    if split.by == "domain":
        opened = open_data(source, model, mapping, allow_imports)
        data, labelled, by_class = _by_subclass(opened, model, split)
        mapping = None  # it has told the classes
    elif split.superclasses:
        labelled = _of_subclasses(model, split, mapping or {})
    try:
        task = load_task(
            data,
            labelled,
            classes=[*by_class.T, *by_class.P, *by_class.F],
            references_per_class=references_per_class,
            evaluation_images=evaluation_images,
            confirmation_share=confirmation_share,
            seed=seed,
            class_map=mapping,
            sample=sample,
            unevaluated=by_class.T,
            allow_imports=allow_imports,
        )
    except DataError as error:
        raise DataError(str(error).replace("--classes", "--splits")) from error
    if mapping:  # the names that the split goes by, where the network and the data have others or none
        own = {output: name for name, output in mapping.items()}
        named = zip(task.classes, task.class_names, strict=True)
        task = replace(task, class_names=tuple(own.get(output, name) for output, name in named))
    task = split_task(task, by_class, n_outputs=model.num_classes, seed=seed)
    if split.by == "class":
        return task
    assert task.split is not None, "it has just been made of one"
    return replace(task, source=opened.origin, split=replace(task.split, split=split))


@dataclass(frozen=True, slots=True, eq=False)
class _Relabelled:
    """A source whose images have other labels."""

    source: ImageSource
    labels: NDArray[np.int64]

    def image(self, index: int) -> RawImage:
        """The source's."""
        return self.source.image(index)

    def name(self, index: int) -> str:
        """The source's."""
        return image_name(self.source, index)


def _by_subclass(opened: OpenedData, model: LoadedModel, split: TaskSplit) -> tuple[SourcePair, LoadedModel, TaskSplit]:
    """Data, model and split by domain as if the classes of each domain were subclasses: "sketch/cat" of "cat".

    Raises:
        DataError: the source doesn't tell its domains, or has none of a name.
    """
    pair, sides = opened.pair, (opened.train_labels, opened.evaluation_labels)
    domains_of = [
        _domains(source, labels, opened.origin)
        for source, labels in zip((pair.train, pair.evaluation), sides, strict=True)
    ]
    domains = np.unique(np.concatenate(domains_of)).tolist()
    for key in SPLIT_SETS:
        for name in getattr(split, key):
            if name not in domains:
                raise DataError(f"Unknown domain {name!r} in {key} of a split.{did_you_mean(name, domains)}")
            if name not in domains_of[0]:
                raise DataError(
                    f"The domain {name!r} in {key} of a split has no training images; leave it out or add some."
                )
    own = {output: name for name, output in opened.label_set.class_map.items()} | dict(pair.class_names)
    named = [opened.label_set.name_of(output, own) for output in range(model.num_classes)]
    often = Counter(named)
    classes = [name if often[name] == 1 else f"{name} ({output})" for output, name in enumerate(named)]
    subclasses = tuple(f"{domain}/{name}" for domain in domains for name in classes)
    train, evaluation = (
        _Relabelled(source, np.searchsorted(domains, of) * len(classes) + labels)
        for source, of, labels in zip((pair.train, pair.evaluation), domains_of, sides, strict=True)
    )
    _check_classes(split, classes, domains_of, sides)
    there_are = np.unique(train.labels).tolist()

    def of_domains(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(subclasses[each] for each in there_are if domains[each // len(classes)] in names)

    by_class = TaskSplit(
        split.scenario,
        T=of_domains(split.T),
        P=of_domains(split.P),
        F=of_domains(split.F),
        superclasses={
            name: tuple(subclasses[each] for each in there_are if each % len(classes) == output)
            for output, name in enumerate(classes)
        },
    )
    labelled = replace(model, num_classes=len(subclasses), label_names=subclasses, label_ids=None)
    return SourcePair(train, evaluation), labelled, by_class


def _check_classes(
    split: TaskSplit, classes: Sequence[str], domains_of: Sequence[NDArray[np.str_]], sides: Sequence[NDArray[np.int64]]
) -> None:
    """Refuses classes that a domain of P or F has on one side only, and those that F has but P lacks.

    Args:
        split: by domain.
        classes: names of the outputs.
        domains_of: of each training image, and of each evaluation image.
        sides: their outputs.

    Raises:
        DataError: there is such a class.
    """
    known = set(sides[0][np.isin(domains_of[0], split.P)].tolist())
    for name in (*split.P, *split.F):
        trained, evaluated = (set(of[where == name].tolist()) for of, where in zip(sides, domains_of, strict=True))
        for lacking, side in ((evaluated - trained, "training"), (trained - evaluated, "evaluation")):
            if lacking:
                raise DataError(
                    f"The class {classes[min(lacking)]!r} of the domain {name!r} has no {side} images, but others; add "
                    "some, or remove it from this domain."
                )
        if trained - known:
            raise DataError(
                f"The class {classes[min(trained - known)]!r} has images in the domain {name!r} of F, but in none of "
                "P; add some there, or remove it from F's."
            )


def _domains(source: ImageSource, labels: NDArray[np.int64], origin: str) -> NDArray[np.str_]:
    """(N,), each image's.

    Raises:
        DataError: the source doesn't tell them.
    """
    domains = getattr(source, "domains", None)
    if domains is None:
        raise DataError(
            f"{origin} doesn't tell the domains of its images, so it can't be split by domain; pass --data "
            "domains:DIR, npz files with a `domain` array, or a source of your own with `domains`."
        )
    if len(domains) != len(labels):
        raise DataError(f"{origin} tells {len(domains)} domains of {len(labels)} images; give one for each image.")
    return np.asarray(domains, dtype=np.str_)


def _of_subclasses(model: LoadedModel, split: TaskSplit, class_map: Mapping[str, int]) -> LoadedModel:
    """The model as if its outputs were the classes of the data, by which their labels are read."""
    configuration = getattr(model.network, "pretrained_cfg", None) or {}
    names = None if class_map else configuration.get("label_names")
    n_classes = sum(map(len, split.superclasses.values()))
    if class_map:
        n_classes = max(class_map.values()) + 1
    elif names:
        n_classes = len(names)
    return replace(model, num_classes=n_classes, label_names=tuple(names) if names else None, label_ids=None)


def split_task(task: Task, split: TaskSplit, *, n_outputs: int, seed: int = 0, n_references: int | None = None) -> Task:
    """The task of a split's networks, from a task of its classes.

    Args:
        task: whose references are all training images, labelled by class.
        split: by class.
        n_outputs: of the networks.
        seed: of the images that are held out for validation, and of the draw of references.
        n_references: training images of P that relevance is computed on, drawn; None are all of them, as in the paper.

    Raises:
        DataError: the split names a class that is unknown or lacks images, or has other outputs.
    """
    names, by_class = task.class_names, torch.arange(len(task.classes))
    if not split.superclasses:
        known = dict(zip(task.classes, task.class_names, strict=True))
        names, by_class = tuple(known.get(each, str(each)) for each in range(n_outputs)), torch.tensor(task.classes)
    training, search, confirmation = (
        LabelledImages(images.images, by_class[images.labels])
        for images in (task.references, task.search, task.confirmation)
    )
    data = split_data(split, training, search, names, seed=seed)
    if len(data.outputs) != n_outputs:
        raise DataError(
            f"The network has {n_outputs} outputs, but the split {len(data.outputs)} ({', '.join(data.outputs)}); "
            "build it with as many, of timm by --model-option num_classes=N."
        )
    confirming = confirmation
    if len(confirmation):
        confirming = data.adaptation(_divided(split, confirmation, names, "confirmation"))
    content = [task.fingerprint, split.to_json(), seed, n_references]
    return replace(
        task,
        references=_drawn(data.training.task, n_references, seed),
        search=data.adaptation(data.evaluation),
        confirmation=confirming,
        classes=tuple(range(n_outputs)),
        class_names=data.outputs,
        fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        split=data,
    )


def _drawn(images: LabelledImages, n: int | None, seed: int) -> LabelledImages:
    if n is None or n >= len(images):
        return images
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n].sort().values
    return LabelledImages(images.images[rows], images.labels[rows])


def _divided(split: TaskSplit, images: LabelledImages, names: Sequence[str], what: str) -> SplitImages:
    """The images of T, P and F.

    Args:
        split: by class.
        images: on the CPU, labelled by class, position in `names`.
        names: of all classes.
        what: the images are for, in the user's words.

    Returns:
        Their labels are positions in the outputs of the split's networks.

    Raises:
        DataError: a class is unknown or has no images.
    """
    groups = labels = images.labels
    if split.superclasses:
        place = {name: index for index, classes in enumerate(split.superclasses.values()) for name in classes}
        labels = torch.tensor([place.get(name, -1) for name in names])[groups]
    parts = []
    for key in SPLIT_SETS:
        wanted = torch.zeros(len(names), dtype=torch.bool)
        for name in getattr(split, key):
            if name not in names:
                raise DataError(f"Unknown class {name!r} in {key} of a split.{did_you_mean(name, names)}")
            index = list(names).index(name)
            if what in _NEEDED[key] and not bool((groups == index).any()):
                raise DataError(
                    f"The class {name!r} in {key} of a split has no {what} images; leave it out or add some."
                )
            wanted[index] = True
        rows = wanted[groups].nonzero().flatten()
        parts.append(LabelledImages(images.images[rows], labels[rows]))
    return SplitImages(*parts)


def _held_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """(N,) of bool: at least the share of the images of each class, drawn."""
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        drawn = torch.randperm(len(rows), generator=generator)[: math.ceil(share * len(rows))]
        held_out[rows[drawn]] = True
    return held_out
