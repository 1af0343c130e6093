"""The user's own network with repaired layers, for as long as a `with` block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from objectives.network import Layer
from objectives.repair.rows import Linear

__all__ = ["repaired"]


@contextmanager
def repaired(
    network: nn.Module,
    layers: Mapping[str, Layer],
    new_layers: Mapping[str, Linear],
    kept_outputs: Sequence[int] | None = None,
) -> Iterator[nn.Module]:
    """The user's own network with the weights of repaired layers.

    A batch norm behind a layer adds the new bias and else does nothing, as it is folded into the new weights, and a
    LayerScale behind it does nothing; each of two classifiers whose mean are the logits has its own columns. Other
    outputs of a classifier than the task's are as they were. On exit every tensor is bit for bit what it was, and
    every Parameter the same object. Masks go inside: `with repaired(...) as network, masked(network, ...)`.

    Args:
        network: in evaluation mode.
        layers: of its canonical form.
        new_layers: as `Repairer.layers` gives them.
        kept_outputs: the network's outputs that the canonical form keeps; all by default.
    """
    saved: list[tuple[Tensor, Tensor]] = []
    given: list[nn.Conv2d | nn.Linear] = []

    def put(tensor: Tensor, value: Tensor | float) -> None:
        saved.append((tensor, tensor.detach().clone()))
        if isinstance(value, Tensor) and len(value) < len(tensor):
            assert kept_outputs is not None, "only a classifier has other rows"
            tensor[list(kept_outputs)] = value
        else:
            tensor.copy_(value if isinstance(value, Tensor) else torch.full_like(tensor, value))

    try:
        with torch.no_grad():
            for name, new in new_layers.items():
                assert new.bias is not None, "every repaired layer has one"
                layer = layers.get(name)
                norm = _norm(network, layer)
                for own, weight in _parts(network, name, layer, new):
                    put(own.weight.data, weight)
                    if own.bias is None and norm is None:
                        own.bias = nn.Parameter(own.weight.new_zeros(len(own.weight)), requires_grad=False)
                        given.append(own)
                    if own.bias is not None:
                        put(own.bias.data, 0.0 if norm is not None else new.bias)
                if norm is not None:
                    assert norm.running_var is not None, "its canonical form says so"
                    assert norm.running_mean is not None, "its canonical form says so"
                    put(norm.running_var, 1 - norm.eps)
                    put(norm.running_mean, 0.0 if norm.affine else -new.bias)
                    if norm.affine:
                        put(norm.weight.data, 1.0)
                        put(norm.bias.data, new.bias)
                for scale in () if layer is None else layer.scales:
                    put(attrgetter(scale)(network).data, 1.0)
        yield network
    finally:
        with torch.no_grad():
            for tensor, original in reversed(saved):
                tensor.copy_(original)
        for module in given:
            module.bias = None


def _parts(network: nn.Module, name: str, layer: Layer | None, new: Linear) -> Iterator[tuple[Linear, Tensor]]:
    """The user's layers that a canonical one stands for, with their weights."""
    names = [name] if layer is None or layer.averaged is None else [name, layer.averaged]
    first = 0
    for each in names:
        own = network.get_submodule(each)
        assert isinstance(own, nn.Conv2d | nn.Linear), "its canonical form says so"
        end = first + own.weight.shape[1]
        yield own, len(names) * new.weight[:, first:end]
        first = end


def _norm(network: nn.Module, layer: Layer | None) -> nn.BatchNorm2d | None:
    """The batch norm behind a layer, of whatever class."""
    if layer is None or layer.norm is None:
        return None
    norm: Any = network.get_submodule(layer.norm)
    return norm  # type: ignore[no-any-return]
