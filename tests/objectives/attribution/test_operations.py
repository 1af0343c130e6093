"""The operations' relevance, re-derived slowly from each rule's definition."""

import pytest
import torch
from torch import Tensor, nn

from objectives.attribution.operations import STABILIZER, Activation, AveragePool, ConstantGate, ResidualSum

aten = torch.ops.aten


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relevances(operation: nn.Module, *inputs: Tensor, start: Tensor) -> tuple[Tensor, ...]:
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    return torch.autograd.grad(operation(*inputs), inputs, start, allow_unused=True)


def stabilized(value: float) -> float:
    return value + STABILIZER if value >= 0 else value - STABILIZER


@pytest.mark.parametrize("operator", [aten.relu.default, aten.silu.default, aten.hardswish.default, aten.tanh.default])
def test_activation_computes_its_operator_and_passes_relevance(operator):
    x, start = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    assert torch.equal(Activation(operator)(x), operator(x))
    assert torch.equal(relevances(Activation(operator), x, start=start)[0], start)


def test_activation_takes_further_arguments():
    x = random(2, 3, 4, 4)
    assert torch.equal(Activation(aten.hardtanh.default, (0.0, 0.5))(x), x.clamp(0, 0.5))
    gelu = Activation(aten.gelu.default, (), {"approximate": "tanh"})
    assert torch.equal(gelu(x), nn.functional.gelu(x, approximate="tanh"))


def test_residual_sum_shares_in_proportion_to_the_summands():
    left, right, start = random(2, 3), random(2, 3, seed=1), random(2, 3, seed=2)
    left[0, 0], right[0, 0] = 1.5, -1.5  # a sum of zero
    at_left, at_right = relevances(ResidualSum(aten.add.Tensor), left, right, start=start)
    for n in range(2):
        for c in range(3):
            share = float(start[n, c]) / stabilized(float(left[n, c] + right[n, c]))
            assert float(at_left[n, c]) == pytest.approx(float(left[n, c]) * share, rel=1e-12)
            assert float(at_right[n, c]) == pytest.approx(float(right[n, c]) * share, rel=1e-12)
    assert at_left[0, 0] + at_right[0, 0] == 0  # all of it goes to the stabilizer


def test_both_sides_of_a_residual_sum_may_be_one_value():
    x, start = random(2, 3), random(2, 3, seed=2)
    leaf = x.clone().requires_grad_()
    (relevance,) = torch.autograd.grad(ResidualSum(aten.add.Tensor)(leaf, leaf), leaf, start)
    torch.testing.assert_close(relevance, start, rtol=1e-4, atol=0)


def windows(kind: str, size: int) -> list[list[tuple[int, int]]]:
    """The pixels that each output of a pooling over size x size pixels averages, in row order."""
    if kind == "mean":
        return [[(y, x) for y in range(size) for x in range(size)]]
    starts, extent = ((-1, 1, 3), 3) if kind == "padded" else ((0, 2, 4), 2)
    return [
        [
            (top + dy, left + dx)
            for dy in range(extent)
            for dx in range(extent)
            if 0 <= top + dy < size and 0 <= left + dx < size
        ]
        for top in starts
        for left in starts
    ]


@pytest.mark.parametrize(
    ("kind", "pool", "divisor"),
    [
        ("mean", AveragePool(aten.mean.dim, ([2, 3], True)), 36),
        ("mean", AveragePool(aten.adaptive_avg_pool2d.default, ([1, 1],)), 36),
        ("adaptive", AveragePool(aten.adaptive_avg_pool2d.default, ([3, 3],)), 4),
        ("strided", AveragePool(aten.avg_pool2d.default, ([2, 2], [2, 2])), 4),
        ("padded", AveragePool(aten.avg_pool2d.default, ([3, 3], [2, 2], [1, 1])), 9),
    ],
)
def test_average_pooling_shares_in_proportion_to_the_averaged_values(kind, pool, divisor):
    x = random(2, 3, 6, 6)
    outputs = pool(x)
    start = random(*outputs.shape, seed=1)
    (relevance,) = relevances(pool, x, start=start)
    expected = torch.zeros_like(x)
    for n in range(2):
        for c in range(3):
            for window, relevance_out in zip(windows(kind, 6), start[n, c].flatten().tolist(), strict=True):
                average = sum(float(x[n, c, i, j]) for i, j in window) / divisor
                for i, j in window:
                    expected[n, c, i, j] += x[n, c, i, j] / divisor * relevance_out / stabilized(average)
    torch.testing.assert_close(relevance, expected, rtol=1e-10, atol=1e-12)


def test_gate_is_a_constant():
    features, gate, start = random(2, 3, 4, 4), random(2, 3, 1, 1, seed=1).sigmoid(), random(2, 3, 4, 4, seed=2)
    operation = ConstantGate(aten.mul.Tensor)
    assert torch.equal(operation(features, gate), features * gate)
    at_features, at_gate = relevances(operation, features, gate, start=start)
    assert torch.equal(at_features, start)
    assert at_gate is None


def test_gate_over_space_gathers_the_relevance_of_a_single_position():
    features, gate, start = random(2, 3, 1, 1), random(2, 3, 4, 4, seed=1).sigmoid(), random(2, 3, 4, 4, seed=2)
    at_features, _ = relevances(ConstantGate(aten.mul.Tensor), features, gate, start=start)
    torch.testing.assert_close(at_features, start.sum(dim=(2, 3), keepdim=True), rtol=1e-12, atol=0)


def test_operations_show_their_operator():
    assert "aten.hardtanh.default, 0.0, 6.0" in repr(Activation(aten.hardtanh.default, (0.0, 6.0)))
