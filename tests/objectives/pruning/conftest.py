"""Networks with random weights and lively batch-norm statistics, in float64, on small images."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from random_ranking import random_ranking
from torch import Tensor, nn

from objectives.canonization import canonize
from objectives.datasets import Task, load_task
from objectives.models import LoadedModel, load_model
from objectives.network import CanonicalNetwork
from objectives.objective import Objective, ObjectiveOptions
from objectives.pruning.ranking import Masks, Ranking
from search_spaces.composites import CompositeSpec
from search_spaces.documents import CompositeDocument


@dataclass(frozen=True, eq=False)
class Prunable:
    """A network, its canonical form and images (4, 3, H, W)."""

    network: nn.Module
    canonical: CanonicalNetwork
    images: Tensor

    def ranking(self, seed: int = 0) -> Ranking:
        return random_ranking(self.canonical, seed)

    def random_masks(self) -> Iterator[Masks]:
        """Masks of which some layers are whole, some gone, the rest anywhere between."""
        generator = torch.Generator().manual_seed(0)
        while True:
            masks = {}
            for layer, n in self.canonical.components.items():
                share = float(torch.rand((), generator=generator) * 1.6 - 0.3)
                masks[layer] = torch.rand(n, generator=generator) >= share
            yield masks


class Inception(nn.Module):
    """Branches concatenated, pooled, and concatenated with themselves, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.narrow = nn.Conv2d(8, 6, 1)
        self.wide = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 10, 5, padding=2))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), nn.Conv2d(8, 5, 1, bias=False))
        self.mix = nn.Sequential(nn.Conv2d(21, 12, 3, groups=3, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.hidden = nn.Linear(24, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(torch.cat([self.narrow(x), self.wide(x), self.pooled(x)], dim=1))
        x = self.mix(x)
        x = torch.cat([x, x], dim=1).mean((2, 3))
        return self.fc(torch.relu(self.hidden(x)))


class Padded(nn.Module):
    """Zeros around images, before depthwise convolutions too, and around a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.depthwise = nn.ModuleList(nn.Conv2d(8, 8, 3, stride=n, groups=8, bias=n == 1) for n in (1, 2))
        self.mix = nn.Conv2d(8, 6, 1)
        self.hidden = nn.Linear(6, 8)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(nn.functional.pad(x, (0, 1, 0, 1))))
        for depthwise in self.depthwise:
            x = torch.relu(depthwise(nn.functional.pad(x, (0, 1, 2, 1))))
        x = torch.relu(self.hidden(torch.relu(self.mix(x)).mean((2, 3))))
        return self.fc(nn.functional.pad(x, (1, 3)))


_OWN: dict[str, type[nn.Module]] = {"inception": Inception, "padded": Padded}


def _calibrate(network: nn.Module, images: Tensor) -> None:
    """Brings batch-norm statistics near those of the images, or deep networks would say the same of all."""

    def fit(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
        norm.running_mean.mul_(variance.sqrt()).add_(mean)
        norm.running_var.mul_(variance + 1e-3)

    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(fit) for norm in norms]
    network(images)
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="session")
def prunable(
    build: Callable[..., nn.Module], lively: Callable[..., nn.Module], narrow: dict[str, dict[str, Any]]
) -> Callable[[str], Prunable]:
    """Builds the network of a name, once, narrow if it would have many weights."""

    @functools.cache
    def prunable(name: str) -> Prunable:
        torch.manual_seed(0)
        network = lively(_OWN[name]()) if name in _OWN else build(name, **narrow.get(name, {}))
        network.requires_grad_(False)
        images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        _calibrate(network, images)
        return Prunable(network, canonize(network, (3, 32, 32)), images)

    return prunable


@pytest.fixture(scope="session")
def digits_model(_own_cache: None) -> LoadedModel:
    return load_model("digits_cnn")


@pytest.fixture(scope="session")
def digits_task(digits_model: LoadedModel) -> Task:
    return load_task("digits", digits_model, evaluation_images=200)


@pytest.fixture(scope="session")
def make_document() -> Callable[..., CompositeDocument]:
    """Makes the document that `hpo export` would write for a model and a task."""

    def make(model: LoadedModel, task: Task, composite: CompositeSpec, **changed: Any) -> CompositeDocument:
        objective = Objective(model, task, ObjectiveOptions(rates=(0.0, 0.5)))
        content: dict[str, Any] = {
            "composite": composite,
            "layer_groups": objective.layer_groups,
            "abs_scope": "sum",
            "output_relevance": "one",
            "rates": (0.0, 0.5),
            "preprocessing": task.preprocessing.to_json(),
            "references": {"per_class": 10, "seed": 0, "sha256": "0" * 64, "source": task.source},
            "model": {
                "name": model.name,
                "options": dict(model.options),
                "fingerprint": model.fingerprint,
                "num_classes": model.num_classes,
                "component_widths": objective.component_widths,
            },
            "data": {"source": task.source, "fingerprint": task.fingerprint, "classes": list(task.classes)},
            "versions": {},
        }
        return CompositeDocument(**(content | changed))

    return make
