"""Folders of image files: `--data folder:DIR` with DIR/train/CLASS/* and DIR/val/CLASS/*."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from objectives.datasets.labels import LabelSet
from objectives.datasets.sources import SourcePair, decode_image, register_source
from objectives.errors import DataError

__all__ = ["FolderSource", "open_folder"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class FolderSource:
    """Image files, decoded when asked for.

    Attributes:
        paths: In the order of class, then file name.
        labels: Output index of each.
    """

    paths: tuple[Path, ...]
    labels: NDArray[np.int64]

    def image(self, index: int) -> Image.Image:
        """The decoded file."""
        return decode_image(self.paths[index])

    def name(self, index: int) -> str:
        """For messages."""
        return str(self.paths[index])


@register_source("folder")
def open_folder(argument: str, labels: LabelSet) -> SourcePair:
    """Lists the image files of DIR/train and DIR/val, in every format that Pillow reads.

    Folders stand for outputs as `LabelSet.assign` says, in sorted order.

    Raises:
        DataError: A directory is missing or empty, `val` has a class that `train` lacks, or a folder's name stands for
            no output.
    """
    if not argument:
        raise DataError("The data `folder` needs a directory; write --data folder:DIR.")
    root = Path(argument).expanduser()
    train, evaluation = (_classes(root / split) for split in ("train", "val"))
    if (root / "train").resolve() == (root / "val").resolve():
        raise DataError(
            f"'{root}/train' and '{root}/val' are the same directory, so reference images would be evaluated on; "
            "put other images into val."
        )
    for name in evaluation:
        if name not in train:
            raise DataError(
                f"The class {name!r} is in '{root}/val', but '{root}/train' lacks it; "
                "add its images there or remove it from val."
            )
    outputs = labels.assign(list(train), str(root))
    return SourcePair(
        _source(train, outputs), _source(evaluation, outputs), {output: name for name, output in outputs.items()}
    )


def _classes(directory: Path) -> dict[str, list[Path]]:
    """Image files by class, both sorted."""
    if not directory.is_dir():
        raise DataError(
            f"{str(directory)!r} isn't a directory; --data folder:DIR reads DIR/train/CLASS/* and DIR/val/CLASS/*."
        )
    extensions = Image.registered_extensions().keys()
    folders = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    classes = {}
    for folder in folders:
        # Of a million files, scandir knows the kind without asking for each.
        files = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))
        classes[folder.name] = [folder / name for name in files if os.path.splitext(name)[1].lower() in extensions]
        if len(classes[folder.name]) < len(files):
            _logger.info("%s: %d files are no images", folder, len(files) - len(classes[folder.name]))
    if not any(classes.values()):
        raise DataError(f"{str(directory)!r} has no images in sub-folders; put them into {directory}/CLASS/.")
    return classes


def _source(classes: dict[str, list[Path]], outputs: dict[str, int]) -> FolderSource:
    paths = tuple(path for files in classes.values() for path in files)
    labels = [outputs[name] for name, files in classes.items() for _ in files]
    return FolderSource(paths, np.asarray(labels, dtype=np.int64))
