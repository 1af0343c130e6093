"""Normal equations against ridge regression on whole matrices, in float64."""

import pytest
import torch

from objectives.repair.ridge import KernelEquations, NormalEquations, equations, left_out_errors, total


def _data(n_groups=2, n_rows=40, n_columns=6, n_outputs=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n_groups, n_rows, n_columns, dtype=torch.float64, generator=generator) + 1
    residuals = torch.randn(n_groups, n_rows, n_outputs, dtype=torch.float64, generator=generator) - 2
    return inputs, residuals


def _weights(inputs, residuals, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = len(inputs), residuals.shape[2], inputs.shape[2]
    return torch.randn(sizes, dtype=torch.float64, generator=generator)


@pytest.fixture(params=[NormalEquations, KernelEquations])
def make(request):
    """Equations of either form, from rows in chunks."""

    def make(inputs, residuals, n_rows=7, shrinkage=None):
        given = request.param(_weights(inputs, residuals), shrinkage)
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


def _scaled_slowly(inputs, residuals, strength, shrinkage):
    """Ridge towards the old weights scaled output by output."""
    old = _weights(inputs, residuals)
    before = inputs @ old.mT
    wanted, given = (rows.var(dim=1) for rows in (before + residuals, before))
    scale = ((wanted + shrinkage * wanted) / (given + shrinkage * wanted)).sqrt()
    scaled = old * scale[:, :, None]
    weight, bias = _slowly(inputs, before + residuals - inputs @ scaled.mT, strength)
    return scaled - old + weight, bias


@pytest.mark.parametrize("strength", [1e-6, 0.01, 3.0])
def test_the_change_is_that_of_ridge_regression(make, strength):
    inputs, residuals = _data()
    change = make(inputs, residuals).solve(strength)
    weight, bias = _slowly(inputs, residuals, strength)
    torch.testing.assert_close(change.weight, weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(change.bias, bias, rtol=1e-9, atol=1e-9)
    assert not change.is_singular


@pytest.mark.parametrize("shrinkage", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("strength", [0.01, 3.0])
def test_the_penalty_pulls_towards_scaled_weights(make, strength, shrinkage):
    inputs, residuals = _data()
    change = make(inputs, residuals, shrinkage=shrinkage).solve(strength)
    weight, bias = _scaled_slowly(inputs, residuals, strength, shrinkage)
    torch.testing.assert_close(change.weight, weight, rtol=1e-9, atol=1e-9)
    # The rows of the slow one are about the residuals' own mean, which scaling moves.
    expected = (residuals - inputs @ weight.mT).mean(dim=1)
    torch.testing.assert_close(change.bias, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bias, expected, rtol=1e-9, atol=1e-9)


def test_under_a_large_penalty_outputs_vary_as_what_is_wanted_does(make):
    inputs, residuals = _data()
    old = _weights(inputs, residuals)
    change = make(inputs, residuals, shrinkage=0.0).solve(1e9)
    wanted = inputs @ old.mT + residuals
    given = inputs @ (old + change.weight).mT + change.bias[:, None]
    torch.testing.assert_close(given.std(dim=1), wanted.std(dim=1))
    torch.testing.assert_close(given.mean(dim=1), wanted.mean(dim=1))


def test_an_output_of_which_all_inputs_are_gone_grows_within_bounds(make):
    inputs, residuals = _data()
    inputs[1] *= 1e-9
    old = _weights(inputs, residuals)
    change = make(inputs, residuals, shrinkage=0.01).solve(1e30)
    torch.testing.assert_close(change.weight[1], old[1] * (101**0.5 - 1))


def test_where_nothing_is_left_to_explain_weights_stay(make):
    inputs, _ = _data()
    change = make(inputs, torch.zeros(2, 40, 3, dtype=torch.float64), shrinkage=0.01).solve(0.1)
    assert float(change.weight.abs().max()) < 1e-12
    assert float(change.bias.abs().max()) < 1e-12


@pytest.mark.parametrize("shrinkage", [None, 0.01])
def test_chunks_make_no_difference(make, shrinkage):
    inputs, residuals = _data()
    first, second = (make(inputs, residuals, n_rows, shrinkage).solve(0.01) for n_rows in (1, 40))
    torch.testing.assert_close(first.weight, second.weight, rtol=1e-11, atol=1e-12)


def test_a_larger_strength_changes_less(make):
    inputs, residuals = _data()
    sizes = [float(make(inputs, residuals).solve(strength).weight.norm()) for strength in (0.01, 1.0, 1e9)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] < 1e-8


@pytest.mark.parametrize("shrinkage", [None, 0.01])
def test_inputs_that_never_vary_keep_their_weights(make, shrinkage):
    inputs, residuals = _data()
    inputs[1] = 5.0
    change = make(inputs, residuals, shrinkage=shrinkage).solve(0.01)
    assert float(change.weight[1].abs().max()) < 1e-12
    torch.testing.assert_close(change.bias[1], residuals[1].mean(dim=0))
    assert float(change.weight[0].abs().max()) > 0.1


@pytest.mark.parametrize("constant", [0.1, 1 / 3])
@pytest.mark.parametrize("n_constant", [1, 6])
def test_rounding_of_constant_inputs_is_not_taken_for_variation(make, constant, n_constant):
    inputs, residuals = _data(n_rows=1000)
    inputs[1, :, :n_constant] = constant
    change = make(inputs, residuals, n_rows=300).solve(0.01)
    assert not change.is_singular
    assert float(change.weight[1, :, :n_constant].abs().max()) == 0
    torch.testing.assert_close(change.bias[1], (residuals[1] - inputs[1] @ change.weight[1].mT).mean(dim=0))
    n_fitted = 1 if n_constant == 6 else 2
    weight, _ = _slowly(inputs[:n_fitted], residuals[:n_fitted], 0.01)
    torch.testing.assert_close(change.weight[:n_fitted], weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shrinkage", [0.03, None])
def test_of_many_solutions_that_nearest_to_scaled_weights_is_taken(make, shrinkage):
    inputs, residuals = _data()
    inputs[:, :, 1] = inputs[:, :, 0]
    change = make(inputs, residuals, shrinkage=shrinkage).solve(0.0)
    assert change.is_singular
    new, towards = (
        _weights(inputs, residuals) + each.weight
        for each in (change, make(inputs, residuals, shrinkage=shrinkage).solve(1e12))
    )
    # The columns that are equal move alike.
    torch.testing.assert_close(*(new - towards).unbind(dim=2)[:2])


def test_only_singular_groups_have_the_smallest_solution():
    inputs, residuals = _data()
    inputs[1, :, 1] = inputs[1, :, 0]
    given = NormalEquations(_weights(inputs, residuals))
    given.add(inputs, residuals)
    change = given.solve(0.0)
    assert change.is_singular
    torch.testing.assert_close(change.weight[1, :, 0], change.weight[1, :, 1])
    first = NormalEquations(given.old[:1])
    first.add(inputs[:1], residuals[:1])
    assert torch.equal(change.weight[:1], first.solve(0.0).weight)


def test_singular_equations_have_the_smallest_solution_and_say_so(make):
    inputs, residuals = _data(n_groups=1)
    inputs = torch.cat([inputs, torch.zeros_like(inputs[:, :, :1])], dim=2)
    change = make(inputs, residuals).solve(0.0)
    assert change.is_singular
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
    halves = (inputs[:, :9], residuals[:, :9]), (inputs[:, 9:], residuals[:, 9:])
    whole, expected = (
        total([make(*half, shrinkage=0.1) for half in halves]),
        make(inputs, residuals, shrinkage=0.1),
    )
    assert whole.square == pytest.approx(float(residuals.square().sum()))
    torch.testing.assert_close(whole.solve(0.1).weight, expected.solve(0.1).weight)


def test_the_smaller_form_is_taken():
    old = torch.zeros(1, 2, 10, dtype=torch.float64)
    assert isinstance(equations(old, 9), KernelEquations)
    assert isinstance(equations(old, 10), NormalEquations)
