"""Folders of image files: `--data folder:DIR` with DIR/train/CLASS/* and DIR/val/CLASS/*.

Of several domains: `--data domains:DIR` with DIR/train/DOMAIN/CLASS/* and DIR/val/DOMAIN/CLASS/*.
"""

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

__all__ = ["FolderSource", "open_domains", "open_folder"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class FolderSource:
    """Image files, decoded when asked for.

    Attributes:
        paths: In the order of domain, then class, then file name.
        labels: Output index of each.
        domains: Each image's, where they are known.
    """

    paths: tuple[Path, ...]
    labels: NDArray[np.int64]
    domains: tuple[str, ...] | None = None

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
    return _open(argument, labels, _Layout("folder", has_domains=False))


@register_source("domains")
def open_domains(argument: str, labels: LabelSet) -> SourcePair:
    """As `open_folder`, of images of several domains, each of which has folders of classes.

    Raises:
        DataError: Likewise.
    """
    return _open(argument, labels, _Layout("domains", has_domains=True))


@dataclass(frozen=True, slots=True)
class _Layout:
    """How folders are nested: the source's name, and whether folders of classes lie in those of domains."""

    name: str
    has_domains: bool

    @property
    def below(self) -> str:
        """What comes below train and val."""
        return "DOMAIN/CLASS" if self.has_domains else "CLASS"

    def __str__(self) -> str:
        return f"--data {self.name}:DIR reads DIR/train/{self.below}/* and DIR/val/{self.below}/*"

    def files(self, directory: Path) -> dict[str | None, dict[str, list[Path]]]:
        """Image files by domain and class, all sorted; without domains under None."""
        if not self.has_domains:
            return {None: self._classes(directory)}
        domains: dict[str | None, dict[str, list[Path]]] = {
            folder.name: self._classes(folder) for folder in self._folders(directory)
        }
        if not domains:
            raise DataError(f"{str(directory)!r} has no sub-folders; {self}.")
        return domains

    def _folders(self, directory: Path) -> list[Path]:
        if not directory.is_dir():
            raise DataError(f"{str(directory)!r} isn't a directory; {self}.")
        return sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))

    def _classes(self, directory: Path) -> dict[str, list[Path]]:
        extensions = Image.registered_extensions().keys()
        classes = {}
        for folder in self._folders(directory):
            # Of a million files, scandir knows the kind without asking for each.
            files = sorted(
                entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith(".")
            )
            classes[folder.name] = [folder / name for name in files if os.path.splitext(name)[1].lower() in extensions]
            if len(classes[folder.name]) < len(files):
                _logger.info("%s: %d files are no images", folder, len(files) - len(classes[folder.name]))
        if not any(classes.values()):
            raise DataError(f"{str(directory)!r} has no images in sub-folders; put them into {directory}/CLASS/.")
        return classes


def _open(argument: str, labels: LabelSet, layout: _Layout) -> SourcePair:
    if not argument:
        raise DataError(f"The data `{layout.name}` needs a directory; write --data {layout.name}:DIR.")
    root = Path(argument).expanduser()
    train, evaluation = (layout.files(root / split) for split in ("train", "val"))
    if (root / "train").resolve() == (root / "val").resolve():
        raise DataError(
            f"'{root}/train' and '{root}/val' are the same directory, so reference images would be evaluated on; "
            "put other images into val."
        )
    known = sorted({name for classes in train.values() for name in classes})
    for classes in evaluation.values():
        for name in classes:
            if name not in known:
                raise DataError(
                    f"The class {name!r} is in '{root}/val', but '{root}/train' lacks it; "
                    "add its images there or remove it from val."
                )
    outputs = labels.assign(known, str(root))
    return SourcePair(
        _source(train, outputs), _source(evaluation, outputs), {output: name for name, output in outputs.items()}
    )


def _source(files: dict[str | None, dict[str, list[Path]]], outputs: dict[str, int]) -> FolderSource:
    images = [
        (path, outputs[name], domain)
        for domain, classes in files.items()
        for name, paths in classes.items()
        for path in paths
    ]
    paths, labels, domains = zip(*images, strict=True)
    return FolderSource(paths, np.asarray(labels, dtype=np.int64), None if domains[0] is None else domains)
