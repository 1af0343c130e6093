"""Figures of an elastic network: what each level computes, and what it costs to go there."""

from __future__ import annotations

from dataclasses import dataclass

from objectives.datasets import LabelledImages
from objectives.elastic.model import ElasticModel
from objectives.memory import Batches
from objectives.pruning.evaluation import correct_predictions
from objectives.pruning.latency import latency_ms, timed_ms
from objectives.pruning.slimming import cost

__all__ = ["LevelFigures", "figures"]

_N_SWITCHES = 200


@dataclass(frozen=True, slots=True)
class LevelFigures:
    """One level, measured.

    Attributes:
        level: 0 for the largest.
        n_components: that it keeps.
        accuracy: on the images.
        parameters: weights and biases that it uses.
        flops: multiply-adds for one image.
        latency_ms: median time of a forward pass for one image, in milliseconds.
        switch_ms: median time of `set_level` to this level, in milliseconds.
        latency_after_switch_ms: as `latency_ms`, of the first pass behind a switch to this level from another one that
            has just run; what this is above `latency_ms` is what caches have lost.
    """

    level: int
    n_components: int
    accuracy: float
    parameters: int
    flops: int
    latency_ms: float
    switch_ms: float
    latency_after_switch_ms: float


def figures(model: ElasticModel, images: LabelledImages, batches: Batches) -> tuple[LevelFigures, ...]:
    """Figures of every level, the largest first; the model's own level is put back.

    Args:
        model: on its device.
        images: at least one; labels on the model's device.
        batches: images a pass.

    Raises:
        OutOfMemoryError: not even a single image fits on the device.
    """
    before = model.level
    try:
        return tuple(_measured(model, level, images, batches) for level in range(model.n_levels))
    finally:
        model.set_level(before)


def _measured(model: ElasticModel, level: int, images: LabelledImages, batches: Batches) -> LevelFigures:
    device = images.labels.device
    image = images.images[:1].to(device)
    other = (level + 1) % model.n_levels

    def come_from_another() -> None:
        model.set_level(other)
        model(image)
        model.set_level(level)

    model.set_level(level)
    size = cost(model.at(level))
    return LevelFigures(
        level=level,
        n_components=sum(int(mask.sum()) for mask in model.masks[level].values()),
        accuracy=float(correct_predictions(model, images, batches).double().mean()),
        parameters=size.parameters,
        flops=size.flops,
        latency_ms=latency_ms(model, image),
        switch_ms=timed_ms(
            lambda: model.set_level(level), device, before=lambda: model.set_level(other), n_runs=_N_SWITCHES
        ),
        latency_after_switch_ms=timed_ms(lambda: model(image), device, before=come_from_another),
    )
