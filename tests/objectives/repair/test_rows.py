"""Rows of a layer against the layer itself, in float64."""

import pytest
import torch
from torch import nn

from objectives.repair.rows import LinearLayer

LAYERS = {
    "plain": (nn.Conv2d(4, 6, 3, padding=1), (4, 7, 5)),
    "strided": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (4, 8, 9)),
    "same": (nn.Conv2d(4, 6, (5, 3), padding="same", dilation=(1, 2)), (4, 6, 7)),
    "valid": (nn.Conv2d(4, 6, 2, padding="valid", bias=False), (4, 6, 7)),
    "pointwise": (nn.Conv2d(4, 6, 1), (4, 3, 3)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "two of each channel": (nn.Conv2d(4, 8, 3, groups=4, stride=2), (4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, stride=2, padding=1), (4, 7, 7)),
    "depthwise without biases": (nn.Conv2d(4, 4, 2, groups=4, bias=False), (4, 2, 2)),
    "dense": (nn.Linear(4, 6), (4,)),
    "tokens": (nn.Linear(4, 6), (5, 4)),
}


@pytest.fixture(params=LAYERS)
def case(request):
    torch.manual_seed(0)
    module, input_shape = LAYERS[request.param]
    module = module.double().requires_grad_(False)
    inputs = torch.randn(3, *input_shape, dtype=torch.float64)
    outputs = module(inputs)
    return LinearLayer(module, tuple(outputs.shape[1:])), inputs, outputs


def test_rows_times_weights_are_the_outputs(case):
    layer, inputs, outputs = case
    positions = torch.arange(0, 3 * layer.n_places, 2 if layer.n_places > 1 else 1)
    rows = layer.inputs_at(inputs, positions)
    assert rows.shape == (layer.n_groups, len(positions), layer.n_columns)
    made = (rows @ layer.weight().mT + layer.bias()[:, None, :]).movedim(0, 1).flatten(1)
    torch.testing.assert_close(made, layer.outputs_at(outputs, positions), rtol=1e-12, atol=1e-12)


def test_few_positions_are_read_as_all_are(case, monkeypatch):
    """Pixels far from one another are read in another way."""
    layer, inputs, _ = case
    every = layer.inputs_at(inputs, torch.arange(3 * layer.n_places))
    monkeypatch.setattr("objectives.repair.rows._SPARSE", 0)
    few = torch.tensor([0, layer.n_places - 1, 3 * layer.n_places - 1]).unique()
    assert torch.equal(layer.inputs_at(inputs, few), every[:, few])
    if layer.n_groups > 1:
        groups = torch.arange(layer.n_groups) % 2 == 1
        some = layer.inputs_at(inputs, few, layer.inputs_of(groups))
        assert torch.equal(some, layer.inputs_at(inputs, few)[groups])


def test_a_layer_takes_new_values(case):
    layer, inputs, outputs = case
    before = {name: value.clone() for name, value in layer.module.state_dict().items()}
    new = layer.replaced(2 * layer.weight(), 2 * layer.bias())
    torch.testing.assert_close(new(inputs), 2 * outputs, rtol=1e-12, atol=1e-12)
    assert new.weight.dtype == torch.float64
    assert all(torch.equal(layer.module.state_dict()[name], value) for name, value in before.items())


def test_columns_of_live_inputs(case):
    layer, inputs, _ = case
    if layer.n_groups > 1:
        pytest.skip("groups have all their columns")
    channel = inputs.movedim(1 if isinstance(layer.module, nn.Conv2d) else -1, 0)[2]
    channel.zero_()
    live = (layer.input_extremes(inputs) != 0).any(dim=0)
    assert live.tolist() == [True, True, False, True]
    positions = torch.arange(3 * layer.n_places)
    rows = layer.inputs_at(inputs, positions)
    axis = 1 if isinstance(layer.module, nn.Conv2d) else -1
    few = inputs.index_select(axis, live.nonzero().flatten())
    assert torch.equal(rows[:, :, layer.columns_of(live)], layer.inputs_at(few, positions))
    assert not bool(rows[:, :, ~layer.columns_of(live)].any())


@pytest.mark.parametrize("n_kept", [2, None])
@pytest.mark.parametrize("n_live", [0, 2, None])
def test_some_outputs_of_some_inputs(case, n_kept, n_live):
    layer, inputs, _ = case
    if not layer.takes_some:
        pytest.skip("these groups are computed wholly")
    rows = None if n_kept is None else torch.tensor([1, 2])
    columns = None if n_live is None else torch.tensor([0, 2])[:n_live]
    axis = layer.axis
    few = inputs if columns is None else inputs.index_select(axis, columns)
    whole = torch.zeros_like(inputs).index_copy_(axis, torch.arange(4) if columns is None else columns, few)
    wanted = layer.module(whole)
    wanted = wanted if rows is None else wanted.index_select(axis, rows)
    compute = layer.between(layer.module, rows, columns)
    made = compute(few)
    one_by_one = [compute(few[image : image + 1]) for image in range(3)]  # each in memory of its own
    torch.testing.assert_close(torch.cat(one_by_one), made, rtol=1e-12, atol=1e-12)
    assert made.shape == wanted.shape
    torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)


def test_silenced_outputs_are_zero(case):
    layer, inputs, outputs = case
    kept = torch.ones(layer.n_outputs, dtype=torch.bool)
    kept[1] = False
    made = layer.silenced(layer.module, kept)(inputs).movedim(layer.axis, 0)
    assert not bool(made[1].any())
    torch.testing.assert_close(made[kept], outputs.movedim(layer.axis, 0)[kept], rtol=1e-12, atol=1e-12)
