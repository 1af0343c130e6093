"""Values of many images in chunks of a few, which fit in a processor's caches and are never joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Chunks"]


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """A value of some images each, in their order: tensors whose first dimension is images, or sizes of these.

    Attributes:
        parts: one a chunk.
        firsts: number of each chunk's first image, and at the end of all images.
    """

    parts: tuple[Any, ...]
    firsts: tuple[int, ...]

    @classmethod
    def of(cls, images: Tensor, n_images: int) -> Chunks:
        """A tensor in chunks of some images."""
        return cls(images.split(n_images), (*range(0, len(images), n_images), len(images)))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)

    def map(self, function: Callable[[int], Any]) -> Chunks:
        """What a function gives for each chunk's number."""
        return Chunks(tuple(function(index) for index in range(len(self.parts))), self.firsts)

    def read(self, positions: Tensor, n_places: int, read: Callable[[Tensor, Tensor], Tensor], dim: int = 0) -> Tensor:
        """Rows at some positions.

        Args:
            positions: (P,), ascending, over all images.
            n_places: positions of one image.
            read: takes a chunk and positions in it; gives their rows.
            dim: of the rows, in what it gives.
        """
        bounds = torch.tensor(self.firsts, device=positions.device) * n_places
        ends = torch.searchsorted(positions, bounds).tolist()
        return torch.cat(
            [
                read(part, positions[start:end] - first * n_places)
                for part, first, start, end in zip(self.parts, self.firsts[:-1], ends[:-1], ends[1:], strict=True)
                if start < end
            ],
            dim=dim,
        )
