"""Preprocessing: from an image to the tensor that a network sees.

There is one function for reference and evaluation images alike. It is timm's evaluation transform, configured by the
network's own data configuration unless the user overrides a part of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor

from objectives.errors import ModelError
from search_spaces.suggestions import did_you_mean

__all__ = ["INTERPOLATIONS", "Preprocessing", "RawImage"]

INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")
CROP_MODES = ("border", "center", "squash")

_data_config: Callable[..., dict[str, Any]] = resolve_data_config

RawImage = Image.Image | NDArray[np.uint8]
"""What a data source yields: a Pillow image, or uint8 pixels of shape (H, W) or (H, W, C)."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Resizes, crops, scales to [0, 1] and normalises one image. Thread-safe.

    Attributes:
        size: (height, width) that the network sees.
        mean: of each channel; as many values as channels, 1 (grey) or 3 (RGB).
        std: of each channel.
        crop: Share of the resized image that the crop keeps, in (0, 1]; at 1 an image of `size` isn't resampled.
        interpolation: How to resize, one of `INTERPOLATIONS`.
        crop_mode: timm's name of the crop: "center", "squash" (each edge resized by itself) or "border" (padded).
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ModelError(f"The input size is a height and a width in pixels, both at least 1, not {self.size}.")
        if len(self.mean) != len(self.std):
            raise ModelError(f"Give as many values of --mean as of --std: got {self.mean} and {self.std}.")
        if len(self.mean) not in (1, 3):
            raise ModelError(f"Images have 1 or 3 channels, not {len(self.mean)}; give as many values of --mean.")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ModelError(f"--mean must be finite and --std positive: got {self.mean} and {self.std}.")
        if not 0 < self.crop <= 1:
            raise ModelError(f"--crop is the share of the resized image to keep, in (0, 1], not {self.crop}.")
        for value, known, what in (
            (self.interpolation, INTERPOLATIONS, "interpolation"),
            (self.crop_mode, CROP_MODES, "crop mode"),
        ):
            if value not in known:
                raise ModelError(f"Unknown {what} {value!r}.{did_you_mean(value, known)}")

    @property
    def channels(self) -> int:
        """Channels of the tensor: 1 for grey images, 3 for RGB."""
        return len(self.mean)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the tensor."""
        return (self.channels, *self.size)

    @classmethod
    def resolve(
        cls,
        configuration: Mapping[str, Any] | None,
        channels: int,
        *,
        size: int | Sequence[int] | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        crop: float | None = None,
        interpolation: str | None = None,
    ) -> Preprocessing:
        """The preprocessing of a network with the user's overrides.

        Args:
            configuration: A network's `pretrained_cfg`; None stands for timm's defaults (ImageNet's at 224 x 224), but
                crops nothing where there is a `size`.
            channels: Channels of the network's input.
            size: Height and width, or one number for both.
            mean: One value for each channel, or one for all.
            std: One value for each channel, or one for all.
            crop: Share that the crop keeps.
            interpolation: One of `INTERPOLATIONS`.

        Raises:
            ModelError: A value is out of range, or the number of channels doesn't agree.
        """
        default = _data_config(pretrained_cfg=dict(configuration or {"input_size": (3, 224, 224)}))
        height, width = (size, size) if isinstance(size, int) else size or default["input_size"][-2:]
        if crop is None:
            crop = default["crop_pct"] if configuration or size is None else 1.0
        return cls(
            size=(int(height), int(width)),
            mean=_per_channel(default["mean"] if mean is None else mean, channels, "--mean"),
            std=_per_channel(default["std"] if std is None else std, channels, "--std"),
            crop=float(crop),
            interpolation=str(interpolation or default["interpolation"]),
            crop_mode=str(default["crop_mode"]),
        )

    def __call__(self, image: RawImage) -> Tensor:
        """The tensor of an image, float32 (C, H, W), normalised."""
        if not isinstance(image, Image.Image):
            image = Image.fromarray(image.squeeze(-1) if image.ndim == 3 and image.shape[-1] == 1 else image)
        tensor: Tensor = _transform(self)(image.convert("RGB" if self.channels == 3 else "L"))
        return tensor

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one key for each attribute."""
        return {
            "size": list(self.size),
            "mean": list(self.mean),
            "std": list(self.std),
            "crop": self.crop,
            "interpolation": self.interpolation,
            "crop_mode": self.crop_mode,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_json`."""
        return cls(
            size=(int(value["size"][0]), int(value["size"][1])),
            mean=tuple(map(float, value["mean"])),
            std=tuple(map(float, value["std"])),
            crop=float(value["crop"]),
            interpolation=str(value["interpolation"]),
            crop_mode=str(value["crop_mode"]),
        )


def _per_channel(value: float | Sequence[float], channels: int, option: str) -> tuple[float, ...]:
    values = tuple(map(float, (value,) if isinstance(value, int | float) else value))
    if len(values) == 1:
        return values * channels
    if len(values) != channels:
        raise ModelError(
            f"The network's input has {channels} channels, but {option} has the values {values}; "
            f"pass {option} with one value or {channels}."
        )
    return values


@functools.lru_cache(maxsize=8)
def _transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    transform: Callable[[Image.Image], Tensor] = create_transform(
        input_size=preprocessing.input_shape,
        is_training=False,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop,
        crop_mode=preprocessing.crop_mode,
        interpolation=preprocessing.interpolation,
    )
    return transform
