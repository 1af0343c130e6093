"""Pre-training: the unpruned network of a split is trained on extra knowledge T and the task P (Avé et al. 2025).

M_0 of their Algorithm 1, which `objectives.procedures.task_relevant` goes on from. Batch norm is trained here only:
pruned networks have it folded into their layers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from objectives.datasets.task_splits import SplitData
from objectives.devices import resolve_device
from objectives.errors import TrainingError
from objectives.fingerprints import state_fingerprint
from objectives.models import LoadedModel
from objectives.training import Epoch, TrainingOptions, TrainingResult, train

__all__ = ["pretrain", "pretrained"]

_log = logging.getLogger(__name__)


def pretrain(
    network: nn.Module,
    data: SplitData,
    options: TrainingOptions,
    *,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> TrainingResult:
    """Trains the unpruned network on T and P, in place.

    Args:
        network: maps images (N, C, H, W) to logits of `data.outputs`.
        data: of the split.
        options: of the training, which validation images of T and P stop early where it has patience.
        checkpoint: see `objectives.training.train`.
        on_epoch: likewise.

    Raises:
        TrainingError: the training diverged.
        OutOfMemoryError: the device has no room for a batch.
    """
    try:
        return train(
            network,
            data.pretraining(data.training),
            options,
            validation=data.pretraining(data.validation),
            checkpoint=checkpoint,
            on_epoch=on_epoch,
        )
    except TrainingError as error:
        raise TrainingError(f"Training on T and P: {error}") from error


def pretrained(
    model: LoadedModel, data: SplitData, options: TrainingOptions, directory: Path, device: str = "auto"
) -> LoadedModel:
    """The model, trained on T and P, or taken from where it was kept.

    Args:
        model: that it begins with; it isn't changed.
        data: of the split.
        options: of the training.
        directory: where the training's checkpoint is kept, also when it has ended; made where it is missing.
        device: to train on.

    Raises:
        TrainingError: the training diverged.
        OutOfMemoryError: the device has no room for a batch.
        DeviceError: the device doesn't exist.
    """
    images = {
        f"{part}.{each}": getattr(data.pretraining(getattr(data, part)), each)
        for part in ("training", "validation")
        for each in ("images", "labels")
    }
    content = json.dumps([model.fingerprint, asdict(options), state_fingerprint(images)])
    name = f"{hashlib.blake2b(content.encode(), digest_size=16).hexdigest()}.safetensors"
    checkpoint: Path | None = directory / name
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _log.warning("The network trained on T and P isn't kept: %s can't be made (%s)", directory, error)
        checkpoint = None

    def report(epoch: Epoch) -> None:
        _log.info("Training on T and P: epoch %d of at most %d", epoch.number, epoch.n_epochs)

    network = copy.deepcopy(model.network).to(resolve_device(device))
    pretrain(network, data, options, checkpoint=checkpoint, on_epoch=report)
    network = network.to("cpu").eval()
    return replace(model, network=network, fingerprint=state_fingerprint(network.state_dict()))
