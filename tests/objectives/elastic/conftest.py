"""Networks with random weights in float64, and nested levels of them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from random_ranking import random_ranking
from torch import Tensor, nn

from objectives.canonization import canonize
from objectives.network import CanonicalNetwork
from objectives.pruning.ranking import Masks

RATES = (0.0, 0.3, 0.5, 0.7)


@dataclass(frozen=True, eq=False)
class Elastic:
    """A user's network, its canonical form, images (N, C, H, W) and masks of nested levels."""

    network: nn.Module
    canonical: CanonicalNetwork
    images: Tensor
    masks: list[Masks]


def levels(canonical: CanonicalNetwork, rates: tuple[float, ...] = RATES, seed: int = 0) -> list[Masks]:
    ranking = random_ranking(canonical, seed)
    return [ranking.masks(ranking.n_pruned(rate)) for rate in rates]


class Branches(nn.Module):
    """Concatenated branches, a grouped convolution, a flattening and dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 6, 1)
        self.wide = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 9, 3, padding=1))
        self.mix = nn.Conv2d(15, 12, 3, groups=3, bias=False)
        self.hidden = nn.Linear(48, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(torch.cat([self.narrow(x), self.wide(x)], dim=1))
        x = nn.functional.max_pool2d(torch.relu(self.mix(x)), 2)
        return self.fc(torch.relu(self.hidden(x.flatten(1))))


@pytest.fixture(scope="session")
def elastic(
    build: Callable[..., nn.Module], lively: Callable[..., nn.Module], narrow: dict[str, dict[str, Any]]
) -> Callable[..., Elastic]:
    """The network of a name, on images of 6 pixels (`branches`) or 32, with levels at the given rates."""

    @functools.cache
    def whole(name: str) -> tuple[nn.Module, CanonicalNetwork, Tensor]:
        torch.manual_seed(0)
        network = lively(Branches()) if name == "branches" else build(name, **narrow.get(name, {}))
        size = 6 if name == "branches" else 32
        images = torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return network, canonize(network.requires_grad_(False), (3, size, size)), images

    def elastic(name: str, rates: tuple[float, ...] = RATES) -> Elastic:
        network, canonical, images = whole(name)
        return Elastic(network, canonical, images, levels(canonical, rates))

    return elastic
