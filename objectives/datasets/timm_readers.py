"""The data sets that timm reads: `--data timm:NAME?root=DIR&train_split=train&validation_split=validation`.

NAME is what timm's `create_dataset` takes: empty or `folder` for folders and tar files, `torch/cifar10` and the like
for torchvision, `hfds/NAME` for Hugging Face data sets, `tfds/NAME`, `wds/NAME`. Other keys go to `create_dataset` as
they are, for example `download=true`; `train_root` and `validation_root` replace `root` for one side. Streams
(`hfids/`, `tfds/`, `wds/`) are read once and kept in memory, decoded.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data.dataset import ImageDataset
from timm.data.dataset_factory import create_dataset
from torch.utils.data import IterableDataset

from objectives.datasets.labels import LabelSet
from objectives.datasets.sources import SourcePair, decode_image, register_source
from objectives.errors import DataError
from objectives.options import parse_option
from objectives.preprocessing import RawImage
from search_spaces.reasons import reason_of

__all__ = ["TimmSource", "open_timm"]


@dataclass(frozen=True, slots=True, eq=False)
class TimmSource:
    """One of timm's data sets.

    Attributes:
        samples: Pairs of an image, an open image file or a decoded image, and a label, by index.
        labels: Output index of each.
        origin: Data set and split, for messages.
    """

    samples: Any
    labels: NDArray[np.int64]
    origin: str
    # Readers share file handles between calls.
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def image(self, index: int) -> RawImage:
        """The decoded image."""
        with self._lock:
            image = self.samples[index][0]
            if isinstance(image, Image.Image | np.ndarray):
                return image
            with image:
                content = image.read()
        return decode_image(content)

    def name(self, index: int) -> str:
        """For messages."""
        return f"{self.origin}[{index}]"


@dataclass(frozen=True, slots=True, eq=False)
class _Split:
    """One side of the data, with timm's own labels."""

    samples: Any
    labels: NDArray[np.int64]
    names: Mapping[int, str]
    origin: str


@register_source("timm")
def open_timm(argument: str, labels: LabelSet) -> SourcePair:
    """Opens both splits of a data set that timm reads.

    A data set with as many classes as the network has outputs keeps timm's labels; otherwise the names of its classes
    stand for outputs as `LabelSet.assign` says. Labels without names are output indices.

    Raises:
        DataError: timm can't open it, or its evaluation images have a class that the training images lack.
    """
    name, _, query = argument.partition("?")
    try:
        options: dict[str, Any] = dict(parse_option(part) for part in query.split("&") if part)
    except ValueError as error:
        raise DataError(f"--data timm:{argument}: an option {error}.") from error
    root = options.pop("root", None)
    sides = [
        (options.pop(f"{side}_root", root), str(options.pop(f"{side}_split", side))) for side in ("train", "validation")
    ]
    train, evaluation = (_open(name, side_root, split, options) for side_root, split in sides)
    files = getattr(train.samples, "samples", None)
    if isinstance(files, list) and files == getattr(evaluation.samples, "samples", None):
        raise DataError(
            f"{train.origin} and {evaluation.origin} are the same files, so reference images would be evaluated on; "
            "give the sides' folders by train_split and validation_split, or train_root and validation_root."
        )
    for class_name in evaluation.names.values():
        if train.names and class_name not in train.names.values():
            raise DataError(
                f"The class {class_name!r} is in {evaluation.origin}, but {train.origin} lacks it; "
                "add its images there or remove it."
            )
    names = [train.names[index] for index in sorted(train.names)]
    if not names or (len(names) == labels.n_outputs and not labels.class_map):
        outputs = {class_name: index for index, class_name in train.names.items()}
    else:
        outputs = labels.assign(names, train.origin)
    return SourcePair(
        _mapped(train, outputs), _mapped(evaluation, outputs), {output: key for key, output in outputs.items()}
    )


def _open(name: str, root: Any, split: str, options: Mapping[str, Any]) -> _Split:
    origin = f"timm:{name} split {split!r}"
    try:
        dataset: Any = create_dataset(name, root=None if root is None else str(root), split=split, **options)
        if isinstance(dataset, IterableDataset):
            samples: Any = list(dataset)
            targets: Sequence[int] = [target for _, target in samples]
        else:
            # timm's own `ImageDataset` puts another image in the place of one that it can't read; its reader doesn't.
            samples = dataset.reader if isinstance(dataset, ImageDataset) else dataset
            targets = _targets(samples)
        labels = np.asarray(targets, dtype=np.int64)
    except Exception as error:  # every reader has errors of its own, and many are assertions
        raise DataError(
            f"{origin} can't be read ({reason_of(error)}); check the name, give its folder as timm:NAME?root=DIR "
            "and install the package that its reader needs."
        ) from error
    return _Split(samples, labels, _class_names(samples), origin)


def _targets(samples: Any) -> Sequence[int]:
    """Labels of all samples, without decoding images where the reader tells them."""
    for attribute in ("targets", "labels"):
        if hasattr(samples, attribute):
            return [int(target) for target in getattr(samples, attribute)]
    if hasattr(samples, "iter_targets"):
        return list(samples.iter_targets())
    if hasattr(samples, "samples"):
        return [sample[1] for sample in samples.samples]
    return [samples[index][1] for index in range(len(samples))]


def _class_names(samples: Any) -> dict[int, str]:
    indices = getattr(samples, "class_to_idx", None) or getattr(samples, "class_name_to_idx", None) or {}
    names: dict[int, str] = {}
    for name, index in indices.items():
        names.setdefault(int(index), str(name))
    return names


def _mapped(split: _Split, outputs: Mapping[str, int]) -> TimmSource:
    if not split.names:
        return TimmSource(split.samples, split.labels, split.origin)
    lookup = np.full(max(split.names) + 1, -1, dtype=np.int64)
    for index, name in split.names.items():
        lookup[index] = outputs[name]
    return TimmSource(split.samples, lookup[split.labels], split.origin)
