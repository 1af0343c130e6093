"""Masking: a network with components switched off, for as long as a `with` block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from objectives.attribution.attention import Heads
from objectives.network import Layer
from objectives.pruning.ranking import Masks

__all__ = ["kept_outputs", "masked"]


@contextmanager
def masked(network: nn.Module, prunable: Mapping[str, Layer | Heads], masks: Masks) -> Iterator[nn.Module]:
    """The user's own network with the pruned components' outputs zero.

    Zeroes the rows of the convolution or dense layer and of the batch norm behind it (else its shift leaks), its
    running mean included; of an attention head the rows of its values. On exit every tensor is bit for bit what it
    was, and every Parameter the same object.

    Args:
        network: in evaluation mode.
        prunable: layers and heads of its canonical form, by name.
        masks: which components are kept.
    """
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for name, mask in masks.items():
                pruned = (~mask).nonzero().flatten()
                if len(pruned) == 0:
                    continue
                part = prunable[name]
                if isinstance(part, Heads):  # the joint layer has the rows of q first, then those of k
                    pruned = 2 * part.n_heads * part.head_dim + part.rows(pruned)
                for tensor in _tensors(network, part):
                    saved.append((tensor, tensor.detach().clone()))
                    tensor[pruned.to(tensor.device)] = 0
        yield network
    finally:
        with torch.no_grad():
            for tensor, original in saved:
                tensor.copy_(original)


def _tensors(network: nn.Module, part: Layer | Heads) -> list[Tensor]:
    """Whose rows belong to its components."""
    name = part.projection if isinstance(part, Heads) else part.name
    tensors = [getattr(network.get_submodule(name), key) for key in ("weight", "bias")]
    if isinstance(part, Layer) and part.norm is not None:
        norm = network.get_submodule(part.norm)
        tensors += [norm.weight, norm.bias, norm.running_mean]
    return [tensor.data for tensor in tensors if tensor is not None]


def kept_outputs(prunable: Mapping[str, Layer | Heads], masks: Masks) -> dict[str, Tensor]:
    """Which outputs of a canonical network's layers masks leave; those of a pruned head's values are zero.

    Args:
        prunable: layers and heads, by name.
        masks: which components are kept.

    Returns:
        Layer -> (outputs,) of bool.
    """
    kept = {}
    for name, mask in masks.items():
        part = prunable[name]
        if isinstance(part, Heads):
            kept[part.value] = mask.repeat_interleave(part.head_dim)
        else:
            kept[name] = mask
    return kept
