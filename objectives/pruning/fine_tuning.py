"""Fine-tuning: a pruned network is trained until what is left makes up for what is gone (Yeom et al. 2021, Scenario 1).

The exact slim network itself is trained: it is smaller than a masked one, and what is pruned has no weights that could
come back. Batch norm is folded into its layers and isn't trained as such, so learning rates that are usual with batch
norm make it diverge, and gradients are better cut (`objectives.training.GRADIENT_NORM`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from objectives.datasets import LabelledImages
from objectives.network import CanonicalNetwork
from objectives.pruning.ranking import Masks
from objectives.pruning.slimming import depends_on_images, draft
from objectives.pruning.trained import TrainedWeights
from objectives.training import Epoch, TrainingOptions, train

__all__ = ["fine_tuned"]


def fine_tuned(
    network: CanonicalNetwork,
    masks: Masks,
    images: LabelledImages,
    options: TrainingOptions,
    *,
    frozen: TrainedWeights | None = None,
    validation: LabelledImages | None = None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> TrainedWeights | None:
    """The weights of the pruned network after training.

    Args:
        network: with the weights to begin with; it isn't changed.
        masks: that it is pruned by.
        images: to train on, with positions among the network's outputs as labels.
        options: of the training.
        frozen: weights of the network under masks that keep less, which stay bit for bit as `network` has them.
        validation: see `objectives.training.train`.
        checkpoint: likewise.
        on_epoch: likewise.

    Returns:
        None where the image doesn't reach the logits any more, so that there is nothing to train.

    Raises:
        TrainingError: the training diverged.
        OutOfMemoryError: the device has no room for a batch.
    """
    # With orders dead rows in groups that aren't wholly dead are silenced behind the convolution: they get no gradient.
    exact = draft(network, masks, orders={})
    if not depends_on_images(exact):
        return None
    for module in exact.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))  # a draft shares what it can
    written = exact.written()
    trained = None if frozen is None else {name: ~mask for name, mask in frozen.within(network, masks).items()}
    train(
        written,
        images,
        options,
        validation=validation,
        gradient_masks=trained,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
    )
    return TrainedWeights.of(written, masks)
