"""Normal equations against ridge regression on whole matrices, in float64."""

import pytest
import torch

from objectives.repair.ridge import KernelEquations, NormalEquations, equations, left_out_errors, total


def _data(n_groups=2, n_rows=40, n_columns=6, n_outputs=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n_groups, n_rows, n_columns, dtype=torch.float64, generator=generator) + 1
    residuals = torch.randn(n_groups, n_rows, n_outputs, dtype=torch.float64, generator=generator) - 2
    return inputs, residuals


@pytest.fixture(params=["normal", "kernel"])
def make(request):
    """Equations of either form, from rows in chunks."""

    def make(inputs, residuals, n_rows=7):
        given = KernelEquations()
        if request.param == "normal":
            given = NormalEquations.zeros(len(inputs), inputs.shape[2], residuals.shape[2], inputs.device)
        for rows, wanted in zip(inputs.split(n_rows, dim=1), residuals.split(n_rows, dim=1), strict=True):
            given.add(rows, wanted)
        return given

    return make


def _slowly(inputs, residuals, strength):
    """Ridge by least squares: a row of sqrt(penalty) for each weight is appended, and the bias is a column of ones."""
    weights, biases = [], []
    for rows, wanted in zip(inputs, residuals, strict=True):
        n_rows, n_columns = rows.shape
        centred = rows - rows.mean(dim=0)
        penalty = strength * centred.square().sum() / n_columns
        left = torch.cat([rows, penalty.sqrt() * torch.eye(n_columns, dtype=rows.dtype)])
        ones = torch.cat([torch.ones(n_rows, 1), torch.zeros(n_columns, 1)]).double()
        right = torch.cat([wanted, wanted.new_zeros(n_columns, wanted.shape[1])])
        solution = torch.linalg.lstsq(torch.cat([left, ones], dim=1), right).solution
        weights.append(solution[:-1].T)
        biases.append(solution[-1])
    return torch.stack(weights), torch.stack(biases)


@pytest.mark.parametrize("strength", [1e-6, 0.01, 3.0])
def test_the_change_is_that_of_ridge_regression(make, strength):
    inputs, residuals = _data()
    change = make(inputs, residuals).solve(strength)
    weight, bias = _slowly(inputs, residuals, strength)
    torch.testing.assert_close(change.weight, weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(change.bias, bias, rtol=1e-9, atol=1e-9)
    assert not change.is_least_norm


def test_chunks_make_no_difference(make):
    inputs, residuals = _data()
    first, second = (make(inputs, residuals, n_rows).solve(0.01) for n_rows in (1, 40))
    torch.testing.assert_close(first.weight, second.weight, rtol=1e-11, atol=1e-12)


def test_a_larger_strength_changes_less(make):
    inputs, residuals = _data()
    sizes = [float(make(inputs, residuals).solve(strength).weight.norm()) for strength in (0.01, 1.0, 1e9)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] < 1e-8


def test_inputs_that_never_vary_keep_their_weights(make):
    inputs, residuals = _data()
    inputs[1] = 5.0
    change = make(inputs, residuals).solve(0.01)
    assert float(change.weight[1].abs().max()) < 1e-12
    torch.testing.assert_close(change.bias[1], residuals[1].mean(dim=0))
    assert float(change.weight[0].abs().max()) > 0.1


@pytest.mark.parametrize("constant", [0.1, 1 / 3])
@pytest.mark.parametrize("n_constant", [1, 6])
def test_rounding_of_constant_inputs_is_not_taken_for_variation(make, constant, n_constant):
    inputs, residuals = _data(n_rows=1000)
    inputs[1, :, :n_constant] = constant
    change = make(inputs, residuals, n_rows=300).solve(0.01)
    assert not change.is_least_norm
    assert float(change.weight[1, :, :n_constant].abs().max()) == 0
    torch.testing.assert_close(change.bias[1], (residuals[1] - inputs[1] @ change.weight[1].mT).mean(dim=0))
    n_fitted = 1 if n_constant == 6 else 2
    weight, _ = _slowly(inputs[:n_fitted], residuals[:n_fitted], 0.01)
    torch.testing.assert_close(change.weight[:n_fitted], weight, rtol=1e-9, atol=1e-9)


def test_only_singular_groups_have_the_smallest_solution():
    inputs, residuals = _data()
    inputs[1, :, 1] = inputs[1, :, 0]
    given = NormalEquations.zeros(2, 6, 3, inputs.device)
    given.add(inputs, residuals)
    change = given.solve(0.0)
    assert change.is_least_norm
    torch.testing.assert_close(change.weight[1, :, 0], change.weight[1, :, 1])
    first = NormalEquations.zeros(1, 6, 3, inputs.device)
    first.add(inputs[:1], residuals[:1])
    assert torch.equal(change.weight[:1], first.solve(0.0).weight)


def test_singular_equations_have_the_smallest_solution_and_say_so(make):
    inputs, residuals = _data(n_groups=1)
    inputs = torch.cat([inputs, torch.zeros_like(inputs[:, :, :1])], dim=2)
    change = make(inputs, residuals).solve(0.0)
    assert change.is_least_norm
    assert float(change.weight[:, :, -1].abs().max()) < 1e-12
    weight, _ = _slowly(inputs[:, :, :-1], residuals, 0.0)
    torch.testing.assert_close(change.weight[:, :, :-1], weight, rtol=1e-8, atol=1e-9)


def test_the_error_of_what_is_left_out_is_that_on_rows_never_seen(make):
    inputs, residuals = _data()
    halves = [(inputs[:, :25], residuals[:, :25]), (inputs[:, 25:], residuals[:, 25:])]
    expected = 0.0
    for (rows, wanted), other in zip(halves, reversed(halves), strict=True):
        weight, bias = _slowly(*other, 0.1)
        expected += float((wanted - rows @ weight.mT - bias[:, None, :]).square().sum())
    assert left_out_errors([make(*half) for half in halves], [1.0, 0.1])[1] == pytest.approx(expected, rel=1e-9)


def test_parts_add_up(make):
    inputs, residuals = _data()
    parts = [make(inputs[:, :9], residuals[:, :9]), make(inputs[:, 9:], residuals[:, 9:])]
    whole, expected = total(parts), make(inputs, residuals)
    assert whole.square == pytest.approx(float(residuals.square().sum()))
    torch.testing.assert_close(whole.solve(0.1).weight, expected.solve(0.1).weight)


def test_the_smaller_form_is_taken():
    assert isinstance(equations(1, 10, 2, 9, torch.device("cpu")), KernelEquations)
    assert isinstance(equations(1, 10, 2, 10, torch.device("cpu")), NormalEquations)
