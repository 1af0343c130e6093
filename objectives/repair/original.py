"""What the original network computes on the reference images: the targets of every repair, computed once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from objectives.repair.order import OrderedNetwork
from objectives.repair.rows import LinearLayer

__all__ = ["MomentSums", "Moments", "Targets", "observe"]

# Of a mean's square: less than this is no variance of float32.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Mean and variance of each output over all positions; (outputs,) in float64."""

    mean: Tensor
    variance: Tensor


class MomentSums:
    """Moments of values that are added one after the other, joined in float64 (Chan et al. 1983)."""

    def __init__(self) -> None:
        self._n_positions = 0
        self._mean: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, outputs: Tensor, axis: int) -> None:
        """Takes a value in whose channels lie along an axis."""
        others = [each for each in range(outputs.ndim) if each != axis]
        mean = outputs.mean(dim=others, keepdim=True)
        squares = (outputs - mean).square().sum(dim=others).double()
        n_here = outputs.numel() // len(squares)
        n_positions = self._n_positions + n_here
        step = mean.double().flatten() - self._mean
        self._squares = self._squares + squares + step.square() * (self._n_positions * n_here / n_positions)
        self._mean = self._mean + step * (n_here / n_positions)
        self._n_positions = n_positions

    def moments(self) -> Moments:
        """Of all that has been added; a variance that is next to nothing beside the mean is rounding, and none."""
        mean, variance = torch.as_tensor(self._mean), torch.as_tensor(self._squares) / self._n_positions
        return Moments(mean, torch.where(variance > _ROUNDING * mean.square(), variance, 0.0))


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """Of one layer.

    Attributes:
        positions: (P,) those that are sampled, ascending.
        values: (P, outputs) of the original at these: the layer's outputs, or of a layer that ends a branch the sum's.
        moments: of the layer's outputs.
    """

    positions: Tensor
    values: Tensor
    moments: Moments


def observe(
    network: OrderedNetwork, images: Tensor, batch_size: int, n_positions: int, seed: int
) -> dict[str, Targets]:
    """Runs the original network once.

    Args:
        network: the original, of which the layers are observed that a repair may change.
        images: (N, C, H, W) reference images.
        batch_size: images a pass.
        n_positions: most that are sampled of each layer, unless it has more columns than half of that.
        seed: of the sampling.
    """
    positions = {
        name: _sample(layer, len(images), max(n_positions, 2 * layer.n_columns), seed).to(images.device)
        for name, layer in network.layers.items()
        if name in network.repairable
    }
    observer = _Observer(network, positions)
    with torch.inference_mode():
        for first in range(0, len(images), batch_size):
            observer.observe(images[first : first + batch_size], first)
    return {
        name: Targets(positions[name], torch.cat(observer.values[name]), observer.sums[name].moments())
        for name in positions
    }


def _sample(layer: LinearLayer, n_images: int, n_positions: int, seed: int) -> Tensor:
    """Positions of a layer, ascending: all where there are no more, else drawn without replacement."""
    n_all = layer.n_places * n_images
    if n_all <= n_positions:
        return torch.arange(n_all)
    return torch.randperm(n_all, generator=torch.Generator().manual_seed(seed))[:n_positions].sort().values


class _Observer(fx.Interpreter):
    def __init__(self, network: OrderedNetwork, positions: dict[str, Tensor]) -> None:
        super().__init__(network.module)
        self.network = network
        self.positions = positions
        self.first = 0
        self.values: dict[str, list[Tensor]] = defaultdict(list)
        self.sums: dict[str, MomentSums] = defaultdict(MomentSums)
        self.ended_by = {node.name: name for name, node in network.sums.items()}

    def observe(self, images: Tensor, first: int) -> None:
        self.first = first
        self.run(images)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_module" and n.target in self.positions:
            name = str(n.target)
            self.sums[name].add(value, self.network.layers[name].axis)
            if name not in self.network.sums:
                self._take(name, value)
        elif n.name in self.ended_by:
            self._take(self.ended_by[n.name], value)
        return value

    def _take(self, name: str, value: Tensor) -> None:
        layer = self.network.layers[name]
        positions = self.positions[name] - self.first * layer.n_places
        here = positions[(positions >= 0) & (positions < len(value) * layer.n_places)]
        self.values[name].append(layer.outputs_at(value, here))
