"""Memory: work in batches, which are halved where a device has no room for them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from objectives.errors import OutOfMemoryError
from search_spaces.reasons import message_of

__all__ = ["Batches", "lacks_memory"]

T = TypeVar("T")

_N_SHOWN = 200
# What else but PyTorch's allocator for GPUs says so: that for CPUs, CUDA, and its libraries where they allocate.
_LACKS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator",
)


def lacks_memory(error: Exception) -> bool:
    """Whether an exception says that a device, or this machine, has run out of memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _LACKS)
    )


@dataclass(slots=True)
class Batches:
    """How many images one pass takes; a number that did not fit is not tried again.

    Not thread-safe.

    Attributes:
        purpose: what the passes are for, in the user's words.
        asked: images a pass.
        size: those that have fitted so far.
    """

    purpose: str
    asked: int
    size: int = field(init=False)

    def __post_init__(self) -> None:
        if self.asked < 1:
            raise ValueError(f"`asked` must be at least 1, but got {self.asked}.")
        self.size = self.asked

    def run(self, compute: Callable[[int], T], at_most: int | None = None) -> T:
        """What `compute` returns for as many images a pass as fit.

        Args:
            compute: takes the images a pass; begins anew with fewer of them where memory runs out.
            at_most: images a pass beyond which this computation gains nothing.

        Raises:
            OutOfMemoryError: not even a single image fits.
        """
        while True:
            size = self.size if at_most is None else min(self.size, at_most)
            try:
                return compute(size)
            except Exception as error:
                if not lacks_memory(error):
                    raise
                reason = message_of(error)[:_N_SHOWN]
            # Only here, as the exception's frames keep what they had computed.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if size == 1:
                raise OutOfMemoryError(
                    f"Out of memory in {self.purpose} with batches of {self.asked} images, halved down to 1: {reason} "
                    "Free memory on the device, or use another --device or a smaller --size."
                )
            self.size = size // 2

    @property
    def remark(self) -> str | None:
        """What a trial should say about it; None where all images asked for have fitted."""
        if self.size == self.asked:
            return None
        return f"Out of memory: batches in {self.purpose} were halved from {self.asked} to {self.size} images."
