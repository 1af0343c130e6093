"""Stacking: one network under several masks in the same passes.

A GPU is done with a small network before the host has made its slim form, and a batch of one leaves most of it idle. So
there the unpruned network sees a batch of images once under each of several masks, all of them stacked along the batch
dimension, and what a mask prunes is multiplied by 0. No row is left out, but nothing is made anew either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from objectives.network import CanonicalNetwork, channel_axis, shape_of
from objectives.pruning.fusion import largest_step
from objectives.pruning.masking import kept_outputs
from objectives.pruning.program import Program
from objectives.pruning.ranking import Masks
from objectives.pruning.slimming import draft
from objectives.pruning.tokens import leave_out_tokens

__all__ = ["StackedNetwork"]

aten = torch.ops.aten


class StackedNetwork:
    """The unpruned network, for several masks at once.

    Args:
        network: canonical; it isn't changed.
        dtype: of weights and images.

    Attributes:
        largest_step: values that its largest step reads and writes for one image under one mask.
    """

    def __init__(self, network: CanonicalNetwork, dtype: torch.dtype) -> None:
        self._prunable, self._dtype = network.prunable, dtype
        module = draft(network, {}).to(dtype).to(memory_format=torch.channels_last)
        leave_out_tokens(module)
        (images,) = (node for node in module.graph.nodes if node.op == "placeholder")
        # Layer -> the shape of its output; a component that no logit depends on isn't among the steps.
        self._shapes: dict[str, tuple[int, ...]] = {}
        layers = kept_outputs(network.prunable, {name: torch.ones(0) for name in network.components})
        previous: fx.Node = images
        for node in [node for node in module.graph.nodes if node.op == "call_module" and node.target in layers]:
            self._shapes[str(node.target)] = shape_of(node)
            with module.graph.inserting_after(previous):
                previous = mask = module.graph.placeholder("mask")
            with module.graph.inserting_after(node):
                product = module.graph.call_function(aten.mul.Tensor, (node, mask))
            node.replace_all_uses_with(product, delete_user_cb=lambda user, product=product: user is not product)
            product.meta["shape"] = shape_of(node)
        self.largest_step = largest_step(module.graph)
        self._program = Program(module)

    def factors(self, masks: Sequence[Masks], device: torch.device) -> list[Tensor]:
        """What outputs of layers are multiplied by, sent to a device once: (M, outputs) of 0 and 1 for each layer.

        Args:
            masks: M of them, of all components, on the CPU.
            device: of the network.
        """
        kept = [kept_outputs(self._prunable, each) for each in masks]
        rows = torch.stack([torch.cat([each[layer] for layer in self._shapes]) for each in kept])
        widths = [len(kept[0][layer]) for layer in self._shapes]
        return list(rows.to(device).to(self._dtype).split(widths, dim=1))

    def __call__(self, images: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """Logits under every mask.

        Args:
            images: (N, C, H, W), on the network's device and in its dtype.
            factors: made from M masks.

        Returns:
            (M, N, classes), equal to those of the slim networks up to rounding.
        """
        n_masks, n_images = len(factors[0]), len(images)
        stacked = images.repeat(n_masks, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        by_image = []
        for factor, shape in zip(factors, self._shapes.values(), strict=True):
            broadcast = (-1 if axis == channel_axis(shape) else 1 for axis in range(1, len(shape) + 1))
            by_image.append(factor.repeat_interleave(n_images, dim=0).view(len(stacked), *broadcast))
        return self._program(stacked, *by_image).view(n_masks, n_images, -1)
