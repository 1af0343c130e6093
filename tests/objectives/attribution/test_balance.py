"""The relevance balance, layer by layer: nothing appears or vanishes but what bias and stabilizer take.

Per sample and layer: sum R_in + R_bias + R_stabilizer = sum R_out, the two terms from the rule's definition. Neurons
whose z+ or z- is 0 are counted apart: ZPlus loses their relevance, AlphaBeta(2, 1) returns it twice where z- = 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zennit.core import Composite
from zennit.rules import Epsilon, Gamma

from objectives.attribution import operations
from objectives.attribution.composites import zennit_composite
from objectives.attribution.operations import STABILIZER, AveragePool, ConstantGate, ResidualSum
from search_spaces.composites import CompositeSpec
from search_spaces.rules import GROUPS, RuleSpec

RULES = [RuleSpec("Epsilon"), RuleSpec("ZPlus"), RuleSpec("AlphaBeta", alpha=2, beta=1), RuleSpec("Gamma")]


@dataclass(frozen=True)
class Part:
    """A share of each neuron's relevance that is divided in proportion to `bias` and the contributions in `total`."""

    factor: float
    total: Tensor
    bias: Tensor
    stabilizer: float
    active: Tensor


@dataclass(frozen=True)
class Absorbed:
    """Relevance (N,) that a layer's inputs don't receive."""

    bias: Tensor
    stabilizer: Tensor
    silent: Tensor


def linear(layer: nn.Module, inputs: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(inputs, weight)
    return nn.functional.conv2d(inputs, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def parts(rule: RuleSpec, layer: nn.Module, inputs: Tensor) -> Iterator[Part]:
    bias = torch.zeros(layer.weight.shape[0]).to(inputs) if layer.bias is None else layer.bias.detach()
    bias = bias.reshape(-1, *[1] * (layer.weight.ndim - 2))
    weight, above, below = layer.weight.detach(), inputs.clamp(min=0), inputs.clamp(max=0)
    positive = linear(layer, above, weight.clamp(min=0)) + linear(layer, below, weight.clamp(max=0)) + bias.clamp(min=0)
    negative = linear(layer, above, weight.clamp(max=0)) + linear(layer, below, weight.clamp(min=0)) + bias.clamp(max=0)
    output = linear(layer, inputs, weight) + bias
    everywhere = torch.ones_like(output, dtype=torch.bool)
    match rule.name:
        case "Epsilon":
            yield Part(1, output, bias, rule.epsilon, everywhere)
        case "ZPlus":
            yield Part(1, positive, bias.clamp(min=0), STABILIZER, everywhere)
        case "AlphaBeta":
            yield Part(rule.alpha, positive, bias.clamp(min=0), STABILIZER, everywhere)
            yield Part(-rule.beta, negative, bias.clamp(max=0), STABILIZER, everywhere)
        case "Gamma":
            raised, lowered = bias + rule.gamma * bias.clamp(min=0), bias + rule.gamma * bias.clamp(max=0)
            yield Part(1, output + rule.gamma * positive, raised, STABILIZER, output > 0)
            yield Part(1, output + rule.gamma * negative, lowered, STABILIZER, output < 0)
            yield Part(1, torch.zeros_like(output), torch.zeros_like(bias), STABILIZER, output == 0)


def absorbed(rule: RuleSpec, layer: nn.Module, inputs: Tensor, relevance: Tensor) -> Absorbed:
    taken = torch.zeros(3, len(inputs)).to(inputs)
    for part in parts(rule, layer, inputs):
        added = torch.where(part.total >= 0, part.stabilizer, -part.stabilizer)
        share = part.factor * relevance * part.active / (part.total + added)
        silent = part.total == 0
        taken += torch.stack(
            [per_sample(share * part.bias), per_sample(share * added * ~silent), per_sample(share * added * silent)]
        )
    return Absorbed(*taken)


def per_sample(tensor: Tensor | None) -> Tensor | float:
    return 0.0 if tensor is None else tensor.flatten(start_dim=1).sum(dim=1)


@pytest.mark.parametrize("first", [0, 1])
def test_relevance_balances_at_every_step_of_every_network(classifier, trace, first):
    """The four rules by turns from layer to layer, and once more two layers on; images meet ZPlus and Gamma."""
    canonical = classifier.canonical
    rule_of = dict(zip(GROUPS, RULES, strict=True))
    groups = {layer: GROUPS[(2 * first + index + 1) % len(GROUPS)] for index, layer in enumerate(canonical.layers)}
    rules = zennit_composite(CompositeSpec(**rule_of, abs=False), groups)
    steps = trace(canonical.module, rules, classifier.images, classifier.labels)
    seen = []
    for step in steps.values():
        module = canonical.module.get_submodule(step.node.target) if step.node.op == "call_module" else None
        received = sum(map(per_sample, step.relevance_in))
        given = per_sample(step.relevance_out)
        if isinstance(module, nn.Conv2d | nn.Linear):
            (inputs,) = step.inputs
            taken = absorbed(rule_of[groups[step.node.target]], module, inputs, step.relevance_out)
            received = received + taken.bias + taken.stabilizer + taken.silent
            seen.append(step.node.target)
        elif isinstance(module, AveragePool | ResidualSum):
            added = torch.where(step.output >= 0, STABILIZER, -STABILIZER)
            received = received + per_sample(step.relevance_out * added / (step.output + added))
        elif isinstance(module, ConstantGate):
            assert step.relevance_in[1] is None
        scale = per_sample(step.relevance_out.abs())
        assert ((received - given).abs() <= 1e-9 * scale).all(), (step.node.target, received, given)
        assert (scale > 0).all(), step.node.target
    assert seen == list(canonical.layers)


@pytest.mark.parametrize("rule", [Epsilon(epsilon=1e-12), Gamma(stabilizer=1e-12)], ids=["Epsilon", "Gamma"])
def test_relevance_is_conserved_without_biases_and_stabilizers(classifier, trace, rule, monkeypatch):
    monkeypatch.setattr(operations, "STABILIZER", 1e-12)
    canonical = classifier.canonical
    module, biases = canonical.module, {}
    rules = Composite(module_map=lambda context, name, module: rule if name in canonical.layers else None)
    try:
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                biases[name], layer.bias = layer.bias, nn.Parameter(torch.zeros_like(layer.bias), requires_grad=False)
        steps = trace(module, rules, classifier.images, classifier.labels)
    finally:
        for name, bias in biases.items():
            module.get_submodule(name).bias = bias
    first: Any = next(iter(steps.values()))
    torch.testing.assert_close(per_sample(first.relevance_in[0]), torch.ones(2).double(), rtol=1e-5, atol=0)
    for step in steps.values():
        scale = per_sample(step.relevance_out.abs())
        error = sum(map(per_sample, step.relevance_in)) - per_sample(step.relevance_out)
        assert (error.abs() <= 1e-6 * scale).all(), step.node.target  # 1e-12 of faint values
