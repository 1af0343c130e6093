"""Counting: which evaluation images a pruned network still classifies correctly."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from objectives.datasets import LabelledImages
from objectives.memory import Batches
from objectives.network import CanonicalNetwork
from objectives.pruning.ranking import Masks
from objectives.pruning.slimming import Cost, cost, slim

__all__ = ["Evaluator", "Measurement", "correct_predictions"]


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """One pruned network, measured.

    Attributes:
        correct: (N,) of bool, on the CPU: whether each evaluation image is classified correctly.
        cost: size of the exact slim network.
    """

    correct: Tensor
    cost: Cost


def correct_predictions(network: nn.Module, images: LabelledImages, batches: Batches) -> Tensor:
    """(N,) of bool, on the CPU: whether the largest logit is the label's.

    Raises:
        OutOfMemoryError: not even a single image fits on the device.
    """

    def count(batch_size: int) -> Tensor:
        parts = [
            network(images.images[start : start + batch_size].to(images.labels.device)).argmax(dim=1)
            == images.labels[start : start + batch_size]
            for start in range(0, len(images), batch_size)
        ]
        return torch.cat(parts).cpu()

    with torch.inference_mode():
        return batches.run(count)


@dataclass(frozen=True, slots=True, eq=False)
class Evaluator:
    """Measures masks of one network on fixed images, each distinct mask once.

    Accuracy is counted on the exact slim network, which equals the masked one.

    Attributes:
        network: canonical.
        images: kept in memory in the dtype of evaluation; labels are on the network's device, and so are the images
            where it has room for them.
        batches: images a forward pass.
        dtype: of weights and images.
    """

    network: CanonicalNetwork
    images: LabelledImages
    batches: Batches
    dtype: torch.dtype = torch.float32
    _measured: dict[bytes, Measurement] = field(default_factory=dict)

    def measure(self, masks: Masks) -> Measurement:
        """Accuracy and size under masks."""
        kept = torch.cat([mask.cpu() for mask in masks.values()]).numpy()
        key = hashlib.blake2b(kept.tobytes(), digest_size=16).digest()  # a study measures tens of thousands of masks
        if key not in self._measured:
            module = slim(self.network, masks, scatter="product")
            size = cost(module)
            module = module.to(self.dtype).to(memory_format=torch.channels_last)
            self._measured[key] = Measurement(correct_predictions(module, self.images, self.batches), size)
        return self._measured[key]
