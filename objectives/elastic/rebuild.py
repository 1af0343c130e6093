"""Rebuilding: pruned channels come back to their places and are trained, with what was left frozen (prune-and-grow).

The smallest level is the core. It is trained first (`train(model.at(model.n_levels - 1), ...)`), by which larger levels
lose what their other weights were fitted to. Then each larger level in turn is trained in what it has beyond the next
smaller one: the rows of channels that come back, and the columns with which the core reads them. Gradient masks freeze
the rest, so that smaller levels compute bit for bit what they did.

The core holds whole groups of a grouped convolution: where a group has several outputs, channels that come back into
one that the core still has are as they were, and aren't trained.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from objectives.datasets import LabelledImages
from objectives.elastic.model import ElasticModel, corner
from objectives.training import Augmentation, Epoch, TrainingOptions, TrainingResult, train

__all__ = ["grown", "rebuild"]


def rebuild(
    model: ElasticModel,
    images: LabelledImages,
    options: TrainingOptions,
    *,
    validation: LabelledImages | None = None,
    augment: Augmentation | None = None,
    checkpoints: Path | None = None,
    on_epoch: Callable[[int, Epoch], None] | None = None,
) -> tuple[TrainingResult, ...]:
    """Trains all levels but the smallest, from small to large, in place.

    Args:
        model: whose smallest level is as it shall stay.
        images: that it is trained on.
        options: of each level's training.
        validation: images on which each epoch's weights are judged.
        augment: changes the images of every step.
        checkpoints: a directory that exists; `level-N.safetensors` in it is each level's, from which a rebuilding that
            was killed goes on.
        on_epoch: called with the level after each of its epochs.

    Returns:
        How each level's training went, in the order of training.

    Raises:
        TrainingError: a level's training diverged, or it has nothing to train.
        OutOfMemoryError: the device has no room for a batch.
    """
    results = []
    for level in reversed(range(model.n_levels - 1)):
        report = None if on_epoch is None else _at(level, on_epoch)
        checkpoint = None if checkpoints is None else checkpoints / f"level-{level}.safetensors"
        result = train(
            model.at(level),
            images,
            options,
            validation=validation,
            gradient_masks=grown(model, level),
            augment=augment,
            checkpoint=checkpoint,
            on_epoch=report,
        )
        results.append(result)
    return tuple(results)


def grown(model: ElasticModel, level: int) -> dict[str, Tensor]:
    """Gradient masks of a level: true for the weights that the next smaller level doesn't use.

    Raises:
        ValueError: there is no such level, or it is the smallest.
    """
    core = model.weights(level + 1)
    masks = {}
    for name, parameter in model.at(level).named_parameters():
        mask = torch.ones_like(parameter, dtype=torch.bool)
        if name in core:
            # The bias of a layer without inputs stands in the core with other dimensions.
            shape = core[name].shape if core[name].ndim == mask.ndim else (core[name].numel(),)
            corner(mask, shape).fill_(False)
        masks[name] = mask
    return masks


def _at(level: int, on_epoch: Callable[[int, Epoch], None]) -> Callable[[Epoch], None]:
    return lambda epoch: on_epoch(level, epoch)
