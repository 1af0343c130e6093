"""Each step's relevance on one batch, stacked for many composites, against slow re-derivations and against autograd."""

import pytest
import torch
from torch import Tensor, nn

from objectives.attribution.propagation import LinearStep
from search_spaces.rules import RuleSpec

RULES = [
    RuleSpec("Epsilon"),
    RuleSpec("Epsilon", epsilon=0.1),
    RuleSpec("ZPlus"),
    RuleSpec("AlphaBeta", alpha=2, beta=1),
    RuleSpec("AlphaBeta", alpha=1, beta=0),
    RuleSpec("Gamma", gamma=0),
    RuleSpec("Gamma", gamma=0.25),
    RuleSpec("Gamma", gamma=10),
]
LAYERS = {
    "plain": nn.Conv2d(3, 4, 3),
    "strided": nn.Conv2d(3, 4, 3, padding=1, stride=2),
    "unread rows": nn.Conv2d(3, 4, (1, 2), stride=3),
    "dilated": nn.Conv2d(3, 4, (2, 3), dilation=(1, 2), padding=(1, 0)),
    "grouped": nn.Conv2d(4, 4, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False),
    "dense": nn.Linear(7, 4),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_and_inputs(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind].double().requires_grad_(False)
    inputs = random(2, 7) if isinstance(layer, nn.Linear) else random(2, layer.in_channels, 5, 6)
    inputs[0, 0] = 0
    return layer, inputs


@pytest.mark.parametrize("never_negative", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_equal_their_definition(rule, kind, never_negative, slow_relevance):
    layer, inputs = layer_and_inputs(kind)
    if never_negative:
        inputs.clamp_(min=0)
    outputs = layer(inputs)
    for silent in (False, True):
        relevance = random(*outputs.shape, seed=1) * (outputs > 0 if silent else 1)
        (given,) = LinearStep(layer, inputs, outputs, never_negative, silent).propagate(relevance, rule)
        expected = slow_relevance(rule, layer, inputs, relevance)
        torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # the case at hand
@pytest.mark.parametrize("kind", ["valid", "same"])
def test_paddings_that_have_a_name(kind, slow_relevance):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, (2, 3), padding=kind, dilation=(1, 2)).double().requires_grad_(False)
    inputs = random(2, 3, 5, 6)
    outputs = layer(inputs)
    relevance = random(*outputs.shape, seed=1)
    (given,) = LinearStep(layer, inputs, outputs).propagate(relevance, RuleSpec("ZPlus"))
    like = nn.Conv2d(3, 4, (2, 3), dilation=(1, 2)).double()
    like.load_state_dict(layer.state_dict())
    pads = (2, 2, 0, 1) if kind == "same" else (0, 0, 0, 0)
    padded = nn.functional.pad(inputs, pads)
    expected = slow_relevance(RuleSpec("ZPlus"), like, padded, relevance)
    height, width = inputs.shape[2:]
    expected = expected[:, :, pads[2] : pads[2] + height, pads[0] : pads[0] + width]
    torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rows_of_a_stack_are_propagated_as_if_alone(rule):
    layer, inputs = layer_and_inputs("strided")
    outputs = layer(inputs)
    step = LinearStep(layer, inputs, outputs)
    rows = [random(*outputs.shape, seed=seed) for seed in range(3)]
    before = [row.clone() for row in rows]
    (stacked,) = step.propagate(torch.cat(rows), rule)
    alone = torch.cat([step.propagate(row, rule)[0] for row in rows])
    torch.testing.assert_close(stacked, alone, rtol=1e-12, atol=1e-15)
    assert all(torch.equal(row, copy) for row, copy in zip(rows, before, strict=True))


def test_sums_of_contributions_add_up_to_the_outputs():
    layer, inputs = layer_and_inputs("dilated")
    outputs = layer(inputs)
    step = LinearStep(layer, inputs, outputs)
    rising, falling = step.contributions(positive=True), step.contributions(positive=False)
    assert (rising >= 0).all()
    assert (falling <= 0).all()
    torch.testing.assert_close(rising + falling, outputs)
    assert step.contributions(positive=True) is rising
