"""The task of a study: its reference, search and confirmation images, selected by a seed and prepared in memory."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from objectives.datasets.factory import open_factory
from objectives.datasets.labels import LabelSet, read_class_map
from objectives.datasets.sources import SOURCES, ImageSource, SourcePair, image_name
from objectives.errors import DataError
from objectives.models import LoadedModel
from objectives.preprocessing import Preprocessing, RawImage
from search_spaces.suggestions import did_you_mean

__all__ = ["LabelledImages", "Task", "load_task"]

_logger = logging.getLogger(__name__)

_MOST_SEARCHED = 1000
_N_THREADS = 8
_IMPORT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


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
    sample: Literal["first", "random"] = "random",
) -> Task:
    """Opens the data, selects the study's images and prepares them; only selected images are decoded.

    Without `classes` the task keeps all outputs of the network, though the data may hold images of a few only.

    Args:
        source: `digits`, `folder:DIR`, `npz:TRAIN.npz,EVAL.npz`, `timm:NAME?root=DIR`, `package.module:factory`, or two
            opened sources.
        model: Its preprocessing, outputs and label names are used.
        classes: Restricts the task to these, by output index or name.
        references_per_class: Drawn from the training images of each class.
        evaluation_images: How many to search on; by default all that confirmation leaves, at most 1,000.
        confirmation_share: Share of the evaluation images that confirm, in [0, 1).
        seed: Of the draw of references and of the split.
        class_map: JSON file or mapping from class name to output index.
        sample: "first" takes the first references of each class in the source's order instead of a draw.

    Raises:
        DataError: The data can't be read, a class has too few images, or a reference is also evaluated on.
    """
    _check_numbers(references_per_class, evaluation_images, confirmation_share, seed)
    mapping = read_class_map(class_map) if isinstance(class_map, str | Path) else class_map
    label_set = LabelSet.of(model, mapping)
    pair = _open(source, label_set) if isinstance(source, str) else source
    origin = source if isinstance(source, str) else type(pair.train).__name__
    if pair.train is pair.evaluation:
        raise DataError(f"{origin}: references and evaluation images come from one source; give two.")
    train_labels = _checked_labels(pair.train, label_set, f"training images of {origin}")
    evaluation_labels = _checked_labels(pair.evaluation, label_set, f"evaluation images of {origin}")
    kept = tuple(range(model.num_classes)) if classes is None else label_set.select(classes, pair.class_names)
    names = tuple(label_set.name_of(output, pair.class_names) for output in kept)
    name_of = dict(zip(kept, names, strict=True))

    if classes is None:
        _refuse_missing(np.setdiff1d(evaluation_labels, train_labels), "training", name_of)
        referenced = tuple(np.unique(train_labels).tolist())
    else:
        _refuse_missing(np.setdiff1d(kept, evaluation_labels), "evaluation", name_of)
        referenced = kept
    reference_indices = _draw(train_labels, referenced, references_per_class, seed, sample, name_of)
    candidates = np.flatnonzero(np.isin(evaluation_labels, kept))
    order = candidates[_stratified_order(evaluation_labels[candidates], seed)]
    confirmation_indices, search_indices = _split(order, confirmation_share, evaluation_images)

    position = np.full(model.num_classes, -1, dtype=np.int64)
    position[list(kept)] = np.arange(len(kept))
    parts = [
        (pair.train, train_labels, reference_indices),
        (pair.evaluation, evaluation_labels, search_indices),
        (pair.evaluation, evaluation_labels, confirmation_indices),
    ]
    _check_memory(sum(len(indices) for *_, indices in parts), model.preprocessing)
    prepared = [_prepare(images, labels, indices, position, model.preprocessing) for images, labels, indices in parts]
    (references, reference_digests), (search, search_digests), (confirmation, confirmation_digests) = prepared
    _refuse_shared_images(pair, reference_indices, reference_digests, order, [*confirmation_digests, *search_digests])
    n_shared = len(set(search_digests) & set(confirmation_digests))
    if n_shared:
        _logger.warning("%s: %d images are both searched on and confirmed with", origin, n_shared)
    return Task(
        references=references,
        search=search,
        confirmation=confirmation,
        classes=kept,
        class_names=names,
        source=origin,
        fingerprint=_fingerprint(
            kept,
            [
                (indices, labels[indices], digests)
                for (_, labels, indices), (_, digests) in zip(parts, prepared, strict=True)
            ],
        ),
        preprocessing=model.preprocessing,
        reference_indices=tuple(reference_indices.tolist()),
    )


def _open(source: str, labels: LabelSet) -> SourcePair:
    name, _, argument = source.partition(":")
    if name in SOURCES:
        return SOURCES[name](argument, labels)
    if _IMPORT.fullmatch(source):
        return open_factory(source)
    raise DataError(
        f"Unknown data {source!r}; write NAME or NAME:ARGUMENT, or your own as package.module:factory."
        f"{did_you_mean(name, SOURCES)}"
    )


def _check_numbers(
    references_per_class: int, evaluation_images: int | None, confirmation_share: float, seed: int
) -> None:
    if references_per_class < 1:
        raise DataError(f"--references-per-class must be at least 1, not {references_per_class}.")
    if evaluation_images is not None and evaluation_images < 1:
        raise DataError(f"--evaluation-images must be at least 1, not {evaluation_images}.")
    if not 0 <= confirmation_share < 1:
        raise DataError(f"--confirmation-share must lie in [0, 1), not {confirmation_share}.")
    if not 0 <= seed < 2**32:
        raise DataError(f"--seed must lie in 0 to {2**32 - 1}, not {seed}.")


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


def _draw(
    labels: NDArray[np.int64],
    classes: Sequence[int],
    n_per_class: int,
    seed: int,
    sample: Literal["first", "random"],
    name_of: Mapping[int, str],
) -> NDArray[np.int64]:
    """Positions of the references, class by class and ascending inside a class.

    A class's draw depends on the seed and the class alone, so restricting the classes leaves the others' references.
    """
    chosen = []
    for output in classes:
        members = np.flatnonzero(labels == output)
        if len(members) < n_per_class:
            raise DataError(
                f"The class {name_of[output]!r} (output {output}) has {len(members)} training images, fewer than the "
                f"{n_per_class} references wanted; add images, lower --references-per-class or leave the class out by "
                "--classes."
            )
        if sample == "random":
            # RandomState's streams are frozen for good, those of default_rng are not.
            members = np.sort(np.random.RandomState([seed, output]).permutation(members)[:n_per_class])
        chosen.append(members[:n_per_class])
    return np.concatenate(chosen)


def _refuse_missing(lacking: NDArray[np.int64], side: str, name_of: Mapping[int, str]) -> None:
    if len(lacking):
        output = int(lacking[0])
        raise DataError(
            f"The class {name_of[output]!r} (output {output}) has no {side} images; "
            "add some or leave the class out by --classes."
        )


def _stratified_order(labels: NDArray[np.int64], seed: int) -> NDArray[np.intp]:
    """A random order in which every prefix has the classes in proportion, to within one image."""
    random = np.random.RandomState(seed)
    shuffled = random.permutation(len(labels))
    place = np.empty(len(labels))  # of an image inside its class, in (0, 1)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(place[shuffled], kind="stable")]


def _split(
    order: NDArray[np.intp], confirmation_share: float, evaluation_images: int | None
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    n_confirmation = math.floor(confirmation_share * len(order))
    n_left = len(order) - n_confirmation
    if evaluation_images is not None and evaluation_images > n_left:
        raise DataError(
            f"--evaluation-images {evaluation_images} are more than the {n_left} that confirmation leaves of "
            f"{len(order)}; ask for fewer or lower --confirmation-share ({confirmation_share})."
        )
    n_searched = min(n_left, _MOST_SEARCHED) if evaluation_images is None else evaluation_images
    return order[:n_confirmation], order[n_confirmation : n_confirmation + n_searched]


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


def _prepare(
    source: ImageSource,
    labels: NDArray[np.int64],
    indices: NDArray[np.intp] | NDArray[np.int64],
    position: NDArray[np.int64],
    preprocessing: Preprocessing,
) -> tuple[LabelledImages, list[str]]:
    """Decodes and prepares images in threads; also returns the digest of each one's raw pixels."""

    def prepare(index: int) -> tuple[Tensor, str]:
        try:
            image = source.image(index)
            return preprocessing(image), _digest(image)
        except Exception as error:  # damaged files make decoders raise nearly anything
            raise DataError(
                f"The image {image_name(source, index)} can't be read "
                f"({type(error).__name__}: {' '.join(str(error).split())}); replace or remove it."
            ) from error

    images = torch.empty(len(indices), *preprocessing.input_shape)
    digests = []
    with ThreadPoolExecutor(min(_N_THREADS, os.cpu_count() or 1)) as threads:
        for row, (tensor, digest) in enumerate(threads.map(prepare, indices.tolist())):
            images[row] = tensor
            digests.append(digest)
    return LabelledImages(images, torch.from_numpy(position[labels[indices]])), digests


def _digest(image: RawImage) -> str:
    # The pixels of a palette image are positions in its palette.
    pixels = np.asarray(image.convert("RGBA") if isinstance(image, Image.Image) and image.mode == "P" else image)
    return hashlib.sha256(f"{pixels.dtype} {pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def _refuse_shared_images(
    pair: SourcePair,
    reference_indices: NDArray[np.int64],
    reference_digests: Sequence[str],
    evaluation_indices: NDArray[np.intp],
    evaluation_digests: Iterable[str],
) -> None:
    index_of = dict(zip(evaluation_digests, evaluation_indices.tolist(), strict=False))
    shared = [
        (index, index_of[digest])
        for index, digest in zip(reference_indices.tolist(), reference_digests, strict=True)
        if digest in index_of
    ]
    if shared:
        reference, evaluated = shared[0]
        raise DataError(
            f"The reference image {image_name(pair.train, reference)} is also the evaluation image "
            f"{image_name(pair.evaluation, evaluated)} ({len(shared)} such); remove it from one side, or draw other "
            "references by --seed."
        )


def _fingerprint(
    classes: Sequence[int], parts: Iterable[tuple[NDArray[np.integer], NDArray[np.int64], Sequence[str]]]
) -> str:
    content = [
        list(classes),
        *([indices.tolist(), labels.tolist(), list(digests)] for indices, labels, digests in parts),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
