"""Masking: a network with components switched off, for as long as a `with` block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from objectives.network import Layer
from objectives.pruning.ranking import Masks

__all__ = ["masked"]


@contextmanager
def masked(network: nn.Module, layers: Mapping[str, Layer], masks: Masks) -> Iterator[nn.Module]:
    """The user's own network with the pruned components' outputs zero.

    Zeroes the rows of the convolution or dense layer and of the batch norm behind it (else its shift leaks), its
    running mean included. On exit every tensor is bit for bit what it was, and every Parameter the same object.

    Args:
        network: in evaluation mode.
        layers: of its canonical form.
        masks: which components are kept.
    """
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for name, mask in masks.items():
                pruned = (~mask).nonzero().flatten()
                if len(pruned) == 0:
                    continue
                for tensor in _rows(network, layers[name]):
                    saved.append((tensor, tensor.detach().clone()))
                    tensor[pruned.to(tensor.device)] = 0
        yield network
    finally:
        with torch.no_grad():
            for tensor, original in saved:
                tensor.copy_(original)


def _rows(network: nn.Module, layer: Layer) -> list[Tensor]:
    tensors = [getattr(network.get_submodule(layer.name), key) for key in ("weight", "bias")]
    if layer.norm is not None:
        norm = network.get_submodule(layer.norm)
        tensors += [norm.weight, norm.bias, norm.running_mean]
    return [tensor.data for tensor in tensors if tensor is not None]
