"""Values of many images in chunks of a few, which fit in a processor's caches and are never joined.

Of a value whose other channels are zero only some may be stored: what follows then has less to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Chunks", "Stored"]


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Some channels of a value, of which the others are zero.

    Attributes:
        channels: (stored,) their indices.
        width: channels of the whole value.
        axis: of the channels.
    """

    channels: Tensor
    width: int
    axis: int

    def of(self, places: Tensor) -> Stored:
        """Those at some places among these."""
        return Stored(self.channels[places], self.width, self.axis)

    def among_all(self, held: Tensor) -> Tensor:
        """(channels,) of bool of the whole value, from that of the stored ones; False elsewhere."""
        return held.new_zeros(self.width).index_copy_(0, self.channels, held)

    def spread(self, part: Tensor) -> Tensor:
        """The whole value, of its stored channels."""
        shape = list(part.shape)
        shape[self.axis] = self.width
        return part.new_zeros(shape).index_copy_(self.axis, self.channels, part)


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """A value of some images each, in their order: tensors whose first dimension is images, or sizes of these.

    Attributes:
        parts: one a chunk.
        firsts: number of each chunk's first image, and at the end of all images.
        stored: which channels the parts hold; all where there are none of these.
    """

    parts: tuple[Any, ...]
    firsts: tuple[int, ...]
    stored: Stored | None = None

    @classmethod
    def of(cls, images: Tensor, n_images: int) -> Chunks:
        """A tensor in chunks of some images."""
        return cls(images.split(n_images), (*range(0, len(images), n_images), len(images)))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)

    def map(self, function: Callable[[int], Any], stored: Stored | None = None) -> Chunks:
        """What a function gives for each chunk's number, and which channels that holds."""
        return Chunks(tuple(function(index) for index in range(len(self.parts))), self.firsts, stored)

    def narrowed(self, held: Tensor, axis: int) -> Chunks:
        """Some of the channels that are held, where all others are zero.

        Args:
            held: (channels held,) of bool: those to go on with.
            axis: of the channels.
        """
        if bool(held.all()):
            return self
        places = held.nonzero().flatten()
        stored = Stored(places, len(held), axis) if self.stored is None else self.stored.of(places)
        return self.map(lambda index: self.parts[index].index_select(axis, places), stored)

    def full(self) -> Chunks:
        """All channels."""
        stored = self.stored
        return self if stored is None else self.map(lambda index: stored.spread(self.parts[index]))

    def plus(self, other: Chunks) -> Chunks:
        """The sum of two values of the same shape."""
        whole, few = (self, other) if self.stored is None else (other.full(), self)
        if (stored := few.stored) is None:
            return whole.map(lambda index: whole.parts[index] + few.parts[index])
        return whole.map(lambda index: whole.parts[index].index_add(stored.axis, stored.channels, few.parts[index]))

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
        rows = [
            read(part, positions[start:end] - first * n_places)
            for part, first, start, end in zip(self.parts, self.firsts[:-1], ends[:-1], ends[1:], strict=True)
            if start < end
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=dim)
