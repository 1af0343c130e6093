"""Attention's rules, re-derived slowly from their propositions, and relevance through whole transformers."""

import contextlib
import copy
import math

import pytest
import torch
from torch import Tensor, nn

from objectives.attribution.attention import AttentionProduct, AttentionScores, AttentionWeights, attention_rule
from objectives.attribution.composites import CanonicalForm, zennit_composite
from objectives.attribution.engine import ZennitAttribution
from objectives.attribution.operations import (
    STABILIZER,
    AveragePool,
    ConstantSum,
    ConstantTokens,
    LayerNorm,
    ResidualSum,
)
from objectives.canonization import canonize
from objectives.datasets import LabelledImages
from objectives.errors import UnsupportedNetworkError
from objectives.layer_groups import group_layers
from search_spaces.composites import ATTENTION_RULES, CompositeSpec
from search_spaces.rules import GROUPS, RULE_DEFAULTS, RuleSpec

N, HEADS, TOKENS, WIDTH = 2, 2, 3, 4  # two values a head


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stabilized(value: float) -> float:
    return value + STABILIZER if value >= 0 else value - STABILIZER


def composite(rule: str | RuleSpec, attention: str | None) -> CompositeSpec:
    spec = RuleSpec(rule) if isinstance(rule, str) else rule
    return CompositeSpec(**dict.fromkeys(GROUPS, spec), abs=False, attention=attention)


class Attention(nn.Module):
    """The canonical operations, as they stand in a network."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.heads = AttentionWeights(HEADS, 0.7), AttentionProduct(HEADS)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.heads(self.weights(query, key), value)


@pytest.fixture
def values() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(random(N, TOKENS, WIDTH, seed=seed) for seed in (1, 2, 3))


def relevances(rule: str | None, values: tuple[Tensor, ...], start: Tensor) -> tuple[Tensor | None, ...]:
    attention, inputs = Attention(), [value.clone().requires_grad_() for value in values]
    with attention_rule(attention, rule):
        output = attention(*inputs)
    return torch.autograd.grad(output, inputs, start, allow_unused=True)


def by_head(tokens: Tensor, n: int, head: int) -> list[list[float]]:
    return tokens[n, :, 2 * head : 2 * head + 2].tolist()


def slow(rule: str, values: tuple[Tensor, ...], start: Tensor) -> tuple[Tensor, ...]:
    """Relevance of q, k and v, entry by entry."""
    at = [torch.zeros(N, TOKENS, WIDTH, dtype=torch.float64) for _ in range(3)]
    for n in range(N):
        for head in range(HEADS):
            q, k, v, relevance = (by_head(tensor, n, head) for tensor in (*values, start))
            span, size = range(TOKENS), range(2)
            scores = [[0.7 * sum(q[i][d] * k[j][d] for d in size) for j in span] for i in span]
            sums = [sum(map(math.exp, row)) for row in scores]
            weights = [[math.exp(scores[i][j]) / sums[i] for j in span] for i in span]
            at_weights = [[0.0] * TOKENS for _ in span]
            for i in span:
                for d in size:
                    parts = [weights[i][j] * v[j][d] for j in span]
                    if rule == "ZPlus":
                        parts = [max(part, 0.0) for part in parts]
                    total = sum(parts)
                    for j in span:
                        if rule == "AttnLRP":  # Prop. 3.3
                            share = relevance[i][d] * parts[j] / stabilized(2 * total)
                            at_weights[i][j] += share
                        else:
                            share = relevance[i][d] * parts[j] / stabilized(total)
                        at[2][n, j, 2 * head + d] += share
            if rule != "AttnLRP":
                continue
            for i in span:
                for j in span:  # Prop. 3.1, then 3.3 again
                    at_score = scores[i][j] * (at_weights[i][j] - weights[i][j] * sum(at_weights[i]))
                    for d in size:
                        share = at_score * 0.7 * q[i][d] * k[j][d] / stabilized(2 * scores[i][j])
                        at[0][n, i, 2 * head + d] += share
                        at[1][n, j, 2 * head + d] += share
    return tuple(at)


@pytest.mark.parametrize("rule", ATTENTION_RULES)
def test_rules_follow_their_propositions(rule, values):
    start = random(N, TOKENS, WIDTH, seed=4)
    for found, expected in zip(relevances(rule, values, start), slow(rule, values, start), strict=True):
        found = torch.zeros_like(expected) if found is None else found
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", [None, *ATTENTION_RULES])
def test_output_does_not_depend_on_the_rule(rule, values):
    attention = Attention()
    expected = torch.cat(
        [
            nn.functional.scaled_dot_product_attention(
                *(value[:, None, :, 2 * head : 2 * head + 2] for value in values), scale=0.7
            )[:, 0]
            for head in range(HEADS)
        ],
        dim=-1,
    )
    with attention_rule(attention, rule):
        torch.testing.assert_close(attention(*values), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", ["CP", "ZPlus"])
def test_query_and_key_have_no_relevance_where_attention_is_constant(rule, values):
    at_query, at_key, at_value = relevances(rule, values, random(N, TOKENS, WIDTH, seed=4))
    assert at_query is None
    assert at_key is None
    assert at_value is not None


def test_values_take_all_relevance_under_cp_and_half_under_attnlrp(values):
    # Values of one sign, so that no output is near zero; the stabilizer then takes a millionth.
    values = (*values[:2], values[2].abs() + 0.1)
    start = random(N, TOKENS, WIDTH, seed=4)
    heads = start.unflatten(-1, (HEADS, -1)).sum(dim=(1, 3))
    for rule, share in (("CP", 1.0), ("ZPlus", 1.0), ("AttnLRP", 0.5)):
        at_value = relevances(rule, values, start)[2].unflatten(-1, (HEADS, -1)).sum(dim=(1, 3))
        torch.testing.assert_close(at_value, share * heads, rtol=1e-4, atol=1e-6)


def test_softmax_takes_the_other_half_under_attnlrp(values):
    values = (*values[:2], values[2].abs() + 0.1)
    start, attention = random(N, TOKENS, WIDTH, seed=4), Attention()
    weights = attention.weights(*values[:2])
    output = attention.heads(weights, values[2])
    at_weights, at_value = attention.heads.relevance(weights, values[2], output, start, "AttnLRP")
    heads = start.unflatten(-1, (HEADS, -1)).sum(dim=(1, 3))
    torch.testing.assert_close(at_weights.sum(dim=(2, 3)), heads / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(at_value.unflatten(-1, (HEADS, -1)).sum(dim=(1, 3)), heads / 2, rtol=1e-4, atol=1e-6)


def test_softmax_keeps_its_constant_term_under_attnlrp(values):
    """The linearisation of the softmax at its scores has a bias, which takes s sum_j R_j - R."""
    relevance = random(N, HEADS, TOKENS, TOKENS, seed=5)
    scores = AttentionScores.of(AttentionWeights(HEADS, 0.7), *values[:2])
    at_scores = scores.at_scores(relevance)
    for index in range(N * HEADS * TOKENS):
        weights, row = (tensor.reshape(-1, TOKENS)[index] for tensor in (scores.weights, relevance))
        jacobian = torch.diag(weights) - torch.outer(weights, weights)
        s = scores.scores.reshape(-1, TOKENS)[index]
        constant = weights - jacobian @ s
        kept = (constant / weights * row).sum()  # Epsilon of the linearisation, without its epsilon
        torch.testing.assert_close(at_scores.reshape(-1, TOKENS)[index].sum() + kept, row.sum())
    at_query, at_key = scores.at_inputs(relevance)
    torch.testing.assert_close(at_query.sum() + at_key.sum(), at_scores.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(at_query.sum(), at_key.sum(), rtol=1e-10, atol=0)


def test_stacked_relevances_are_those_of_each(values):
    stacked = random(3 * N, TOKENS, WIDTH, seed=4)
    attention = Attention()
    weights = attention.weights(*values[:2])
    output = attention.heads(weights, values[2])
    scores = AttentionScores.of(attention.weights, *values[:2])
    for rule in ATTENTION_RULES:
        at_weights, at_value = attention.heads.relevance(weights, values[2], output, stacked, rule)
        for row, start in enumerate(stacked.split(N)):
            expected = relevances(rule, values, start)
            torch.testing.assert_close(at_value.split(N)[row], expected[2])
            if rule == "AttnLRP":
                at_query, at_key = scores.at_inputs(at_weights)
                torch.testing.assert_close(at_query.split(N)[row], expected[0])
                torch.testing.assert_close(at_key.split(N)[row], expected[1])


def test_rule_lasts_as_long_as_its_block(values):
    attention = Attention()
    with attention_rule(attention, "CP"):
        with attention_rule(attention, "AttnLRP"):
            assert (attention.weights.rule, attention.heads.rule) == ("AttnLRP", "AttnLRP")
        assert (attention.weights.rule, attention.heads.rule) == ("CP", "CP")
    assert (attention.weights.rule, attention.heads.rule) == (None, None)
    with pytest.raises(ValueError, match="must be CP, ZPlus or AttnLRP, but got rule='LRP'"):
        attention.heads.relevance(random(N, HEADS, TOKENS, TOKENS), values[2], values[2], values[2], "LRP")


# Layer norm and constants.


@pytest.mark.parametrize("parts", [1, 2])
def test_layer_norm_is_a_linear_map_whose_deviation_is_constant(parts):
    norm = LayerNorm(4, eps=1e-5, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(random(4, seed=1))
        norm.bias.copy_(random(4, seed=2))
    norm.requires_grad_(False)
    x, start = random(2, 3, 4 * parts, seed=3), random(2, 3, 4 * parts, seed=4)
    leaf = x.clone().requires_grad_()
    output = norm(leaf)
    (found,) = torch.autograd.grad(output, leaf, start)
    expected = torch.zeros_like(x)
    for n in range(2):
        for token in range(3):
            for part in range(parts):
                span = slice(4 * part, 4 * part + 4)
                a, r = x[n, token, span], start[n, token, span]
                deviation = float((((a - a.mean()) ** 2).mean() + 1e-5).sqrt())
                for j in range(4):
                    row = [float(norm.weight[j]) / deviation * ((i == j) - 1 / 4) for i in range(4)]
                    z = sum(row[i] * float(a[i]) for i in range(4)) + float(norm.bias[j])
                    assert z == pytest.approx(float(output.detach()[n, token, 4 * part + j]), rel=1e-9)
                    for i in range(4):
                        expected[n, token, 4 * part + i] += float(a[i]) * row[i] * float(r[j]) / stabilized(z)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    stacked = norm.relevance(x, output.detach(), torch.cat([start, -2 * start]))
    torch.testing.assert_close(stacked, torch.cat([found, -2 * found]))


def test_constants_keep_their_share():
    x, start = random(2, 3, 4).requires_grad_(), random(2, 3, 4, seed=1)
    constant = random(1, 3, 4, seed=2)
    (found,) = torch.autograd.grad(ConstantSum(constant)(x), x, start)
    total = x.detach() + constant
    torch.testing.assert_close(found, x.detach() / (total + total.sign() * STABILIZER) * start)
    tokens = ConstantTokens(random(1, 2, 4, seed=3))
    output = tokens(x)
    assert torch.equal(output[:, :2], tokens.tokens.expand(2, -1, -1))
    (found,) = torch.autograd.grad(output, x, random(2, 5, 4, seed=4))
    assert torch.equal(found, random(2, 5, 4, seed=4)[:, 2:])


# Whole transformers.


def per_sample(tensor: Tensor | None) -> Tensor | float:
    return 0.0 if tensor is None else tensor.flatten(start_dim=1).sum(dim=1)


@pytest.mark.parametrize("attention", ATTENTION_RULES)
@pytest.mark.parametrize("rule", RULE_DEFAULTS)
def test_relevance_balances_at_every_step_of_every_transformer(transformer, trace, rule, attention):
    canonical = transformer.canonical
    spec = RuleSpec(rule)
    rules = zennit_composite(composite(spec, attention), dict.fromkeys(canonical.layers, "MLL"))
    steps = trace(canonical.module, rules, transformer.images, transformer.labels)
    of_attention = {name for heads in canonical.heads.values() for name in (heads.query, heads.key)}
    seen = set()
    for step in steps.values():
        module = canonical.module.get_submodule(step.node.target) if step.node.op == "call_module" else None
        given = per_sample(step.relevance_out)
        received = sum(map(per_sample, step.relevance_in))
        received += kept(module, spec, step, attention)
        scale = per_sample(step.relevance_out.abs())
        # The weights' share of attention passes scores that may be near zero, all of which rounds.
        largest = scale + sum(per_sample(r.abs()) for r in step.relevance_in if r is not None)
        assert ((received - given).abs() <= 1e-9 * largest).all(), (step.node.target, received, given)
        seen.add(str(step.node.target))
    assert set(canonical.layers) - seen == (set() if attention == "AttnLRP" else of_attention)


def kept(module, rule: RuleSpec, step, attention: str) -> Tensor | float:
    """Relevance (N,) that a step's inputs don't receive, from the definition of its rule."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        return of_layer(module, rule, step.inputs[0], step.relevance_out)
    out, relevance = step.output, step.relevance_out
    if isinstance(module, AveragePool | ResidualSum):
        added = torch.where(out >= 0, STABILIZER, -STABILIZER)
        return per_sample(relevance * added / (out + added))
    if isinstance(module, ConstantSum):
        added = torch.where(out >= 0, STABILIZER, -STABILIZER)
        return per_sample(relevance * (module.constant + added) / (out + added))
    if isinstance(module, ConstantTokens):
        return per_sample(relevance[:, : module.tokens.shape[1]])
    if isinstance(module, LayerNorm):
        added = torch.where(out >= 0, STABILIZER, -STABILIZER)
        bias = module.bias.repeat(out.shape[-1] // len(module.bias))
        return per_sample(relevance * (bias + added) / (out + added))
    if isinstance(module, AttentionProduct):
        weights, value = step.inputs
        heads = value.clamp(min=0).unflatten(-1, (module.n_heads, -1))
        positive = torch.einsum("nhij,njhd->nihd", weights, heads).flatten(2)
        total = {"CP": out, "AttnLRP": 2 * out, "ZPlus": positive}[attention]
        added = torch.where(total >= 0, STABILIZER, -STABILIZER)
        return per_sample(relevance * added / (total + added))
    if isinstance(module, AttentionWeights):
        query, key = (part.unflatten(-1, (module.n_heads, -1)) for part in step.inputs)
        scores = module.scale * torch.einsum("nihd,njhd->nhij", query, key)
        at_scores = scores * (relevance - out * relevance.sum(-1, keepdim=True))  # Prop. 3.1
        added = torch.where(scores >= 0, STABILIZER, -STABILIZER)
        absorbed = per_sample(at_scores * added / (2 * scores + added))
        return per_sample(relevance) - per_sample(at_scores) + absorbed
    return 0.0


def of_layer(layer: nn.Module, rule: RuleSpec, inputs: Tensor, relevance: Tensor) -> Tensor:
    """Relevance that bias and stabilizer of a layer take."""

    def linear(a: Tensor, weight: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            return nn.functional.linear(a, weight)
        return nn.functional.conv2d(a, weight, None, layer.stride, layer.padding)

    bias = torch.zeros(len(layer.weight)).to(inputs) if layer.bias is None else layer.bias
    bias = bias.reshape(-1, *[1] * (layer.weight.ndim - 2))
    above, below = inputs.clamp(min=0), inputs.clamp(max=0)
    rises, falls = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
    z = linear(inputs, layer.weight) + bias
    positive = linear(above, rises) + linear(below, falls) + bias.clamp(min=0)
    negative = linear(above, falls) + linear(below, rises) + bias.clamp(max=0)
    match rule.name:
        case "Epsilon":
            parts = [(1.0, z, bias, rule.epsilon, torch.ones_like(z))]
        case "ZPlus":
            parts = [(1.0, positive, bias.clamp(min=0), STABILIZER, torch.ones_like(z))]
        case "AlphaBeta":
            parts = [
                (2.0, positive, bias.clamp(min=0), STABILIZER, torch.ones_like(z)),
                (-1.0, negative, bias.clamp(max=0), STABILIZER, torch.ones_like(z)),
            ]
        case _:
            gamma = rule.gamma
            parts = [
                (1.0, z + gamma * positive, bias + gamma * bias.clamp(min=0), STABILIZER, (z > 0).to(z)),
                (1.0, z + gamma * negative, bias + gamma * bias.clamp(max=0), STABILIZER, (z < 0).to(z)),
            ]
    total = torch.zeros(len(inputs)).to(inputs)
    for factor, denominator, of_bias, stabilizer, active in parts:
        added = torch.where(denominator >= 0, stabilizer, -stabilizer)
        total += per_sample(factor * relevance * active * (of_bias + added) / (denominator + added))
    return total


@pytest.mark.parametrize("attention", ["CP", "ZPlus"])
def test_relevance_of_query_and_key_is_exactly_zero_where_attention_is_constant(transformer, attention):
    canonical = transformer.canonical
    rules = zennit_composite(composite("Epsilon", attention), group_layers(canonical))
    outputs: dict[str, Tensor] = {}
    of_attention = [name for heads in canonical.heads.values() for name in (heads.query, heads.key, heads.value)]
    with rules.context(canonical.module) as module, torch.enable_grad(), contextlib.ExitStack() as hooks:
        for name in of_attention:
            handle = module.get_submodule(name).register_forward_hook(
                lambda layer, inputs, output, name=name: outputs.__setitem__(name, output)
            )
            hooks.callback(handle.remove)
        logits = module(transformer.images.clone().requires_grad_())
        start = nn.functional.one_hot(transformer.labels, 10).to(logits)
        found = torch.autograd.grad(
            logits, [outputs[name] for name in of_attention], start, allow_unused=True, materialize_grads=True
        )
    for name, relevance in zip(of_attention, found, strict=True):
        assert bool((relevance == 0).all()) == (not name.endswith(".v")), name


def test_composite_leaves_the_canonical_network_as_it_was(transformer):
    canonical = transformer.canonical
    rules = zennit_composite(composite("Epsilon", "AttnLRP"), group_layers(canonical))
    attention = [m for m in canonical.module.modules() if isinstance(m, AttentionWeights | AttentionProduct)]
    with rules.context(canonical.module):
        assert {module.rule for module in attention} == {"AttnLRP"}
    assert {module.rule for module in attention} == {None}


def test_scores_of_heads_are_the_relevance_of_their_outputs(transformer, trace):
    canonical, spec = transformer.canonical.choosing("all"), composite("Epsilon", "CP")
    groups = group_layers(canonical)
    steps = trace(canonical.module, zennit_composite(spec, groups), transformer.images, transformer.labels)
    references = LabelledImages(transformer.images, transformer.labels)
    sums = ZennitAttribution(canonical, groups, references, batch_size=2).attribute(spec).sums
    assert list(sums) == list(canonical.components)
    by_element = ZennitAttribution(canonical, groups, references, 3, abs_scope="element").attribute(spec).sums
    for step in steps.values():
        name = str(step.node.target)
        if name not in canonical.components:
            continue
        relevance = step.relevance_out
        if name in canonical.heads:
            relevance = relevance.unflatten(-1, (3, 8)).movedim(2, 1).flatten(2)
        else:
            relevance = relevance.movedim(2, 1)
        per_image = relevance.sum(dim=2)
        torch.testing.assert_close(sums[name][0], per_image.sum(dim=0), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(sums[name][1], per_image.abs().sum(dim=0), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(by_element[name][1], relevance.abs().sum(dim=(0, 2)), rtol=1e-8, atol=1e-10)


def test_attention_needs_a_rule_and_other_networks_none(build, build_transformer):
    for network, size, attention, message in (
        (build_transformer("class-token"), 16, None, "has attention, but the composite has no rule for it"),
        (build("cifar_resnet20"), 32, "CP", "the network has no attention"),
    ):
        canonical = canonize(network, (3, size, size))
        references = LabelledImages(torch.randn(1, 3, size, size).double(), torch.tensor([0]))
        engine = ZennitAttribution(canonical, group_layers(canonical), references, 1)
        with pytest.raises(UnsupportedNetworkError, match=message):
            engine.attribute(composite("Epsilon", attention))


def test_loaded_composite_attributes_the_users_own_network(transformer, snapshot):
    canonical, spec = transformer.canonical, composite("Epsilon", "AttnLRP")
    groups = group_layers(canonical)
    network = copy.deepcopy(transformer.network).requires_grad_(False)
    before = snapshot(network)
    own = zennit_composite(spec, groups, CanonicalForm(canonize(network, (3, 16, 16))))
    found = []
    for rules, module in ((zennit_composite(spec, groups), canonical.module), (own, network)):
        with rules.context(module) as modified, torch.enable_grad():
            images = transformer.images.clone().requires_grad_()
            start = nn.functional.one_hot(transformer.labels, 10).double()
            found.append(torch.autograd.grad(modified(images), images, start)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    assert snapshot(network) == before
