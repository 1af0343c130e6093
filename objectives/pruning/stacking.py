"""Stacking: one network under several masks in the same passes.

A GPU is done with a small network before the host has made its slim form, and a batch of one leaves most of it idle. So
there the unpruned network sees a batch of images once under each of several masks, all of them stacked along the batch
dimension, and what a mask prunes is multiplied by 0. No row is left out, but nothing is made anew either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from objectives.attribution.attention import Heads
from objectives.network import CanonicalNetwork, channel_axis, shape_of
from objectives.pruning.fusion import largest_step
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
        self._network = network
        module = draft(network, {}).to(dtype).to(memory_format=torch.channels_last)
        leave_out_tokens(module)
        nodes = {str(node.target): node for node in module.graph.nodes if node.op == "call_module"}
        (images,) = (node for node in module.graph.nodes if node.op == "placeholder")
        # A component that no logit depends on isn't among the steps.
        self._masked = {name: nodes[self._layer(name)] for name in network.components if self._layer(name) in nodes}
        self._ranks = {name: (channel_axis(shape_of(node)), len(shape_of(node))) for name, node in self._masked.items()}
        previous: fx.Node = images
        for node in self._masked.values():
            with module.graph.inserting_after(previous):
                previous = mask = module.graph.placeholder("mask")
            with module.graph.inserting_after(node):
                product = module.graph.call_function(aten.mul.Tensor, (node, mask))
            node.replace_all_uses_with(product, delete_user_cb=lambda user, product=product: user is not product)
            product.meta["shape"] = shape_of(node)
        self.largest_step = largest_step(module.graph)
        self._program = Program(module)

    def _layer(self, name: str) -> str:
        """The layer whose outputs are zero where components of this name are pruned."""
        part = self._network.prunable[name]
        return part.value if isinstance(part, Heads) else name

    def __call__(self, images: Tensor, masks: Sequence[Masks]) -> Tensor:
        """Logits under every mask.

        Args:
            images: (N, C, H, W), on the network's device and in its dtype.
            masks: M of them.

        Returns:
            (M, N, classes), equal to those of the slim networks up to rounding.
        """
        stacked = images.repeat(len(masks), 1, 1, 1).contiguous(memory_format=torch.channels_last)
        factors = [self._factors(name, masks, images) for name in self._masked]
        return self._program(stacked, *factors).view(len(masks), len(images), -1)

    def _factors(self, name: str, masks: Sequence[Masks], images: Tensor) -> Tensor:
        """0 or 1 for each of a layer's outputs, to be multiplied with those of the stacked images."""
        kept = torch.stack([mask[name] for mask in masks])
        if isinstance(heads := self._network.prunable[name], Heads):
            kept = kept.repeat_interleave(heads.head_dim, dim=1)
        factors = kept.to(images, non_blocking=True).repeat_interleave(len(images), dim=0)
        axis, n_axes = self._ranks[name]
        return factors.view(len(factors), *(-1 if each == axis else 1 for each in range(1, n_axes + 1)))
