"""The source of images: what each kind of data offers, and the registry of the kinds."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from objectives.datasets.labels import LabelSet
from objectives.preprocessing import RawImage

__all__ = [
    "ArraySource",
    "ImageSource",
    "SOURCES",
    "SourceLoader",
    "SourcePair",
    "decode_image",
    "image_name",
    "register_source",
]


class ImageSource(Protocol):
    """Labelled images by index.

    `image` is called from several threads at once, and for selected indices only. A source may also have
    `name(index) -> str`, which messages then use, and `domains`, the name of each image's domain, by which splits may
    go. What `image` raises becomes a `DataError` that names the image.
    """

    @property
    def labels(self) -> NDArray[np.integer]:
        """Output index of the full network of each image, shape (N,)."""
        ...

    def image(self, index: int) -> RawImage:
        """A Pillow image, or uint8 pixels (H, W) or (H, W, C)."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class SourcePair:
    """Where reference images and where evaluation images come from.

    Attributes:
        train: References are drawn from it.
        evaluation: Search and confirmation images are drawn from it.
        class_names: The data's own names of classes, by output index.
    """

    train: ImageSource
    evaluation: ImageSource
    class_names: Mapping[int, str] = field(default_factory=dict)


SourceLoader = Callable[[str, LabelSet], SourcePair]
"""Opens the data that the text behind `NAME:` describes; labels are mapped to the network's outputs."""

SOURCES: dict[str, SourceLoader] = {}

_Loader = TypeVar("_Loader", bound=SourceLoader)


def register_source(name: str) -> Callable[[_Loader], _Loader]:
    """Makes `--data NAME:...` call the decorated loader."""

    def register(loader: _Loader) -> _Loader:
        SOURCES[name] = loader
        return loader

    return register


@dataclass(frozen=True, slots=True, eq=False)
class ArraySource:
    """Images that lie in memory.

    Attributes:
        pixels: uint8 (N, H, W) or (N, H, W, C).
        labels: Integers (N,).
        origin: File or data set, for messages.
        domains: Each image's, where they are known.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.integer]
    origin: str
    domains: tuple[str, ...] | None = None

    def image(self, index: int) -> NDArray[np.uint8]:
        """Pixels of an image."""
        pixels: NDArray[np.uint8] = self.pixels[index]
        return pixels

    def name(self, index: int) -> str:
        """For messages."""
        return f"{self.origin}[{index}]"


def image_name(source: ImageSource, index: int) -> str:
    """What messages call an image."""
    name: Callable[[int], str] | None = getattr(source, "name", None)
    return f"number {index}" if name is None else name(index)


def decode_image(content: bytes | Path) -> Image.Image:
    """Decodes all pixels of an encoded image or image file; errors are Pillow's."""
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        image.load()
        return image
