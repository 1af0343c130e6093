"""Rules re-derived slowly from their definitions."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from search_spaces.rules import RuleSpec

_Index = tuple[int, ...]
_Term = tuple[_Index, float, float]
"""Index of an input, its value and the weight on the way to a neuron."""

_STABILIZER = 1e-6


def _away_from_zero(value: float, by: float) -> float:
    return value + by if value >= 0 else value - by


def _messages(rule: RuleSpec, terms: list[_Term], bias: float, relevance: float) -> Iterator[tuple[_Index, float]]:
    """What one neuron gives each input, from the rule's definition."""
    positive = sum(max(a * w, 0) for _, a, w in terms) + max(bias, 0)
    negative = sum(min(a * w, 0) for _, a, w in terms) + min(bias, 0)
    output = sum(a * w for _, a, w in terms) + bias
    for index, a, w in terms:
        above, below = max(a * w, 0), min(a * w, 0)
        match rule.name:
            case "Epsilon":
                share = a * w / _away_from_zero(output, rule.epsilon)
            case "ZPlus":
                share = above / (positive + _STABILIZER)
            case "AlphaBeta":
                share = rule.alpha * above / (positive + _STABILIZER)
                share -= rule.beta * below / _away_from_zero(negative, _STABILIZER)
            case "Gamma" if output > 0:
                share = (a * w + rule.gamma * above) / (output + rule.gamma * positive + _STABILIZER)
            case "Gamma":
                share = (a * w + rule.gamma * below) / (output + rule.gamma * negative - _STABILIZER)
        yield index, share * relevance


def _receptive_field(layer: nn.Module, x: Tensor, neuron: _Index) -> list[_Term]:
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        return [((i,), float(x[i]), float(weight[neuron[0], i])) for i in range(len(x))]
    channel, row, column = neuron
    per_group = layer.in_channels // layer.groups
    group = channel // (layer.out_channels // layer.groups)
    terms = []
    for c in range(per_group):
        for dy in range(layer.kernel_size[0]):
            for dx in range(layer.kernel_size[1]):
                y = row * layer.stride[0] - layer.padding[0] + dy * layer.dilation[0]
                z = column * layer.stride[1] - layer.padding[1] + dx * layer.dilation[1]
                if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]:
                    index = (group * per_group + c, y, z)
                    terms.append((index, float(x[index]), float(weight[channel, c, dy, dx])))
    return terms


def _slow_relevance(rule: RuleSpec, layer: nn.Module, x: Tensor, relevance: Tensor) -> Tensor:
    result = torch.zeros_like(x)
    for sample in range(len(x)):
        for neuron in torch.cartesian_prod(*map(torch.arange, relevance.shape[1:])).reshape(-1, relevance.ndim - 1):
            neuron = tuple(neuron.tolist())
            terms = _receptive_field(layer, x[sample], neuron)
            bias = 0.0 if layer.bias is None else float(layer.bias.detach()[neuron[0]])
            for index, message in _messages(rule, terms, bias, float(relevance[sample][neuron])):
                result[sample][index] += message
    return result


@pytest.fixture(scope="session")
def slow_relevance() -> Callable[[RuleSpec, nn.Module, Tensor, Tensor], Tensor]:
    """Relevance of a layer's inputs (N, ...) from that of its outputs, neuron by neuron."""
    return _slow_relevance
