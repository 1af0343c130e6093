"""The task of a study: its reference, search and confirmation images, selected by a seed and prepared in memory."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from objectives.datasets.factory import open_factory
from objectives.datasets.labels import LabelSet, read_class_map
from objectives.datasets.sources import SOURCES, ImageSource, SourcePair, image_name
from objectives.datasets.splits import split_images
from objectives.errors import DataError
from objectives.fingerprints import pixels_fingerprint, selection_fingerprint
from objectives.preprocessing import Preprocessing
from search_spaces.choices import ReferenceSampling
from search_spaces.imports import is_import_path, runs_code
from search_spaces.reasons import reason_of
from search_spaces.suggestions import did_you_mean

if TYPE_CHECKING:
    from objectives.datasets.task_splits import SplitData
    from objectives.models import LoadedModel

__all__ = ["LabelledImages", "OpenedData", "Task", "known_classes", "load_task", "open_data"]

_logger = logging.getLogger(__name__)

_MAX_THREADS = 8


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImages:
    """Prepared images and their labels.

    Attributes:
        images: float32 (N, C, H, W), normalised.
        labels: int64 (N,), positions in the task's `classes`.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> LabelledImages:
        """A copy on a device, its images in a dtype."""
        return LabelledImages(self.images.to(device=device, dtype=dtype), self.labels.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What a composite is judged by: images to attribute, images to search on, images to confirm with.

    No image is both a reference and evaluated on.

    Attributes:
        references: The same number for each class that the training images have, class by class.
        search: Evaluation images that the search sees, stratified.
        confirmation: Evaluation images that it never sees, stratified; may be empty.
        classes: Outputs of the full network that the task keeps, ascending.
        class_names: One for each of `classes`.
        source: What the user gave as data.
        fingerprint: SHA-256 of the selected images' pixels, labels and positions in the source.
        preprocessing: Of every image.
        reference_indices: Positions of the references in the training source.
        split: What networks are trained on, where they are adapted to new data: the evaluation images are then of what
            they are adapted to, and the references are of the task P.
    """

    references: LabelledImages
    search: LabelledImages
    confirmation: LabelledImages
    classes: tuple[int, ...]
    class_names: tuple[str, ...]
    source: str
    fingerprint: str
    preprocessing: Preprocessing
    reference_indices: tuple[int, ...]
    split: SplitData | None = None


def load_task(
    source: str | SourcePair,
    model: LoadedModel,
    *,
    classes: Sequence[str | int] | None = None,
    references_per_class: int = 10,
    evaluation_images: int | None = None,
    confirmation_share: float = 0.5,
    seed: int = 0,
    class_map: str | Path | Mapping[str, int] | None = None,
    sample: ReferenceSampling = "random",
    unevaluated: Sequence[str | int] = (),
    allow_imports: bool = True,
) -> Task:
    """Opens the data, selects the study's images and prepares them; only selected images are decoded.

    Without `classes` the task keeps all outputs of the network, though the data may hold images of a few only.

    Args:
        source: `digits`, `folder:DIR`, `domains:DIR`, `npz:TRAIN.npz,EVAL.npz`, `timm:NAME?root=DIR`,
            `package.module:factory`, or two opened sources.
        model: Its preprocessing, outputs and label names are used.
        classes: Restricts the task to these, by output index or name.
        references_per_class: Drawn from the training images of each class.
        evaluation_images: How many to search on; by default all that confirmation leaves, at most 1,000.
        confirmation_share: Share of the evaluation images that confirm, in [0, 1).
        seed: Of the draw of references and of the split.
        class_map: JSON file or mapping from class name to output index.
        sample: "first" takes the first references of each class in the source's order instead of a draw.
        unevaluated: Classes of which only references are taken.
        allow_imports: False refuses what runs code of the source's choice; pass it for sources that come from a
            document or a store.

    Raises:
        DataError: The data can't be read, a class has too few images, or a reference is also evaluated on.
    """
    opened = open_data(source, model, class_map, allow_imports)
    pair, origin, label_set = opened.pair, opened.origin, opened.label_set
    train_labels, evaluation_labels = opened.train_labels, opened.evaluation_labels
    kept = tuple(range(model.num_classes)) if classes is None else label_set.select(classes, pair.class_names)
    names = tuple(label_set.name_of(output, pair.class_names) for output in kept)

    split = split_images(
        train_labels,
        evaluation_labels,
        dict(zip(kept, names, strict=True)),
        every_class=classes is not None,
        references_per_class=references_per_class,
        evaluation_images=evaluation_images,
        confirmation_share=confirmation_share,
        seed=seed,
        sample=sample,
        unevaluated=[label_set.output_of(name, pair.class_names) for name in unevaluated],
    )
    _check_memory(len(split.references) + len(split.search) + len(split.confirmation), model.preprocessing)
    references, search, confirmation = (
        _select(images, labels, indices, kept, model.preprocessing)
        for images, labels, indices in (
            (pair.train, train_labels, split.references),
            (pair.evaluation, evaluation_labels, split.search),
            (pair.evaluation, evaluation_labels, split.confirmation),
        )
    )
    for evaluated in (search, confirmation):
        _refuse_shared(references, evaluated)
    n_shared = len(set(search.fingerprints) & set(confirmation.fingerprints))
    if n_shared:
        _logger.warning("%s: %d images are both searched on and confirmed with", origin, n_shared)
    return Task(
        references=references.prepared,
        search=search.prepared,
        confirmation=confirmation.prepared,
        classes=kept,
        class_names=names,
        source=origin,
        fingerprint=selection_fingerprint(
            kept, [(part.indices, part.labels, part.fingerprints) for part in (references, search, confirmation)]
        ),
        preprocessing=model.preprocessing,
        reference_indices=references.indices,
    )


def known_classes(
    source: str | SourcePair,
    model: LoadedModel,
    *,
    classes: Sequence[str | int] | None = None,
    class_map: str | Path | Mapping[str, int] | None = None,
    allow_imports: bool = True,
) -> tuple[int, ...]:
    """The network's outputs that have both training and evaluation images, ascending; no image is decoded.

    Args:
        source: See `load_task`.
        model: Likewise.
        classes: Only these, which may lack images; by default all that have some.
        class_map: See `load_task`.
        allow_imports: Likewise.

    Raises:
        DataError: The data can't be read, or a class is unknown.
    """
    opened = open_data(source, model, class_map, allow_imports)
    if classes is not None:
        return opened.label_set.select(classes, opened.pair.class_names)
    return tuple(np.intersect1d(opened.train_labels, opened.evaluation_labels).tolist())


@dataclass(frozen=True, slots=True, eq=False)
class OpenedData:
    """Data, without any image.

    Attributes:
        pair: The sources.
        origin: What they are called.
        label_set: Names of the network's outputs.
        train_labels: (N,) output of each training image.
        evaluation_labels: (M,) output of each evaluation image.
    """

    pair: SourcePair
    origin: str
    label_set: LabelSet
    train_labels: NDArray[np.int64]
    evaluation_labels: NDArray[np.int64]


def open_data(
    source: str | SourcePair,
    model: LoadedModel,
    class_map: str | Path | Mapping[str, int] | None,
    allow_imports: bool,
) -> OpenedData:
    """Opens data and checks their labels; see `load_task`.

    Raises:
        DataError: The data can't be read, or a label is no output of the model.
    """
    if isinstance(source, str) and not allow_imports and runs_code("data", source):
        raise DataError(f"The data {source!r} are not opened from here; pass them as `--data` on the command line.")
    mapping = read_class_map(class_map) if isinstance(class_map, str | Path) else class_map
    label_set = LabelSet.of(model, mapping)
    pair = _open(source, label_set) if isinstance(source, str) else source
    origin = source if isinstance(source, str) else type(pair.train).__name__
    if pair.train is pair.evaluation:
        raise DataError(f"{origin}: references and evaluation images come from one source; give two.")
    return OpenedData(
        pair,
        origin,
        label_set,
        _checked_labels(pair.train, label_set, f"training images of {origin}"),
        _checked_labels(pair.evaluation, label_set, f"evaluation images of {origin}"),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Selected:
    """Images taken from a source: positions there, outputs, fingerprints of the raw pixels, and prepared."""

    source: ImageSource
    indices: tuple[int, ...]
    labels: tuple[int, ...]
    fingerprints: tuple[str, ...]
    prepared: LabelledImages


def _open(source: str, labels: LabelSet) -> SourcePair:
    name, _, argument = source.partition(":")
    if name in SOURCES:
        return SOURCES[name](argument, labels)
    if is_import_path(source):
        try:
            return open_factory(source)
        except DataError as error:
            if isinstance(error.__cause__, ImportError):  # `floder:DIR` has the form of an import
                raise DataError(f"{error}{did_you_mean(name, SOURCES)}") from error
            raise
    raise DataError(
        f"Unknown data {source!r}; write NAME or NAME:ARGUMENT, or your own as package.module:factory."
        f"{did_you_mean(name, SOURCES)}"
    )


def _checked_labels(source: ImageSource, label_set: LabelSet, origin: str) -> NDArray[np.int64]:
    labels = np.asarray(source.labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise DataError(f"The {origin} have labels of {labels.dtype} {labels.shape}; give integers of shape (N,).")
    outside = np.flatnonzero((labels < 0) | (labels >= label_set.n_outputs))
    if len(outside):
        raise DataError(
            f"The {origin} have the label {labels[outside[0]]} (image {image_name(source, int(outside[0]))}), but the "
            f"network's outputs are 0 to {label_set.n_outputs - 1}; labels must be output indices."
        )
    return labels.astype(np.int64)


def _check_memory(n_images: int, preprocessing: Preprocessing) -> None:
    n_bytes = n_images * math.prod(preprocessing.input_shape) * 4
    try:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return
    if n_bytes > available:
        raise DataError(
            f"{n_images} images of {preprocessing.input_shape} take {n_bytes / 2**30:.1f} GiB, but the machine has "
            f"{available / 2**30:.1f} GiB of memory; lower --confirmation-share or --evaluation-images."
        )


def _select(
    source: ImageSource,
    labels: NDArray[np.int64],
    indices: NDArray[np.intp],
    classes: Sequence[int],
    preprocessing: Preprocessing,
) -> _Selected:
    """Decodes and prepares images in threads."""

    def prepare(index: int) -> tuple[Tensor, str]:
        try:
            image = source.image(index)
            return preprocessing(image), pixels_fingerprint(image)
        except Exception as error:  # damaged files make decoders raise nearly anything
            raise DataError(
                f"The image {image_name(source, index)} can't be read ({reason_of(error)}); replace or remove it."
            ) from error

    images = torch.empty(len(indices), *preprocessing.input_shape)
    fingerprints = []
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        for row, (tensor, fingerprint) in enumerate(threads.map(prepare, indices.tolist())):
            images[row] = tensor
            fingerprints.append(fingerprint)
    positions = torch.from_numpy(np.searchsorted(classes, labels[indices]).astype(np.int64))
    return _Selected(
        source=source,
        indices=tuple(indices.tolist()),
        labels=tuple(labels[indices].tolist()),
        fingerprints=tuple(fingerprints),
        prepared=LabelledImages(images, positions),
    )


def _refuse_shared(references: _Selected, evaluated: _Selected) -> None:
    index_of = dict(zip(evaluated.fingerprints, evaluated.indices, strict=True))
    shared = [
        (index, index_of[fingerprint])
        for index, fingerprint in zip(references.indices, references.fingerprints, strict=True)
        if fingerprint in index_of
    ]
    if shared:
        reference, index = shared[0]
        raise DataError(
            f"The reference image {image_name(references.source, reference)} is also the evaluation image "
            f"{image_name(evaluated.source, index)} ({len(shared)} such); remove it from one side, or draw other "
            "references by --seed."
        )
