from contextlib import contextmanager

import pytest
import torch
from torch import nn

from objectives.canonization import canonize
from objectives.pruning.masking import masked

NETWORKS = ["vgg11_bn", "resnet18", "mobilenetv3_small_100", "regnety_002", "cifar_resnet20"]


@contextmanager
def hooked(network, layers, masks):
    """The definition, by other means: the output of the layer's batch norm, or its own, times the mask."""

    def hook_for(mask):
        return lambda module, inputs, output: output * mask.to(output.dtype).reshape(-1, *[1] * (output.ndim - 2))

    handles = []
    for name, mask in masks.items():
        # timm's BatchNormAct2d applies its activation after `norm`: f(0) = 0 there.
        module = network.get_submodule(layers[name].norm or name)
        handles.append(module.register_forward_hook(hook_for(mask)))
    try:
        yield network
    finally:
        for handle in handles:
            handle.remove()


def _state(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def _identity(network):
    return {
        name: (id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad) for name, tensor in _all(network)
    }


def _all(network):
    return [*network.named_parameters(), *network.named_buffers()]


def _bits_equal(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and torch.equal(left[name].reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8))
        for name in left
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_outputs_are_zero_and_nothing_else_changes(prunable, name):
    subject = prunable(name)
    unmasked = subject.network(subject.images)
    for n_tenths in (1, 3, 6):
        ranking = subject.ranking(n_tenths)
        masks = ranking.masks(n_tenths * len(ranking) // 10)
        with hooked(subject.network, subject.canonical.prunable, masks) as network:
            expected = network(subject.images)
        with masked(subject.network, subject.canonical.prunable, masks) as network:
            assert network is subject.network
            logits = network(subject.images)
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12 * float(expected.abs().max()))
        assert not torch.allclose(logits, unmasked, rtol=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100"])
def test_nothing_leaks_through_batch_norm(prunable, name):
    subject = prunable(name)
    masks = subject.ranking().masks(len(subject.ranking()) // 2)
    leaks = []

    def check(mask):
        return lambda module, inputs, output: leaks.append(bool((output[:, ~mask] != 0).any()))

    handles = [
        subject.network.get_submodule(subject.canonical.layers[name].norm or name).register_forward_hook(check(mask))
        for name, mask in masks.items()
    ]
    with masked(subject.network, subject.canonical.prunable, masks) as network:
        network(subject.images)
    for handle in handles:
        handle.remove()
    assert len(leaks) == len(masks)
    assert not any(leaks)


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_is_restored_bit_for_bit(prunable, name):
    subject = prunable(name)
    network = subject.network
    state, identity = _state(network), _identity(network)
    everything = {name: torch.zeros(n, dtype=torch.bool) for name, n in subject.canonical.components.items()}
    half = subject.ranking().masks(len(subject.ranking()) // 2)
    with masked(network, subject.canonical.prunable, half):
        assert not _bits_equal(_state(network), state)
        with masked(network, subject.canonical.prunable, everything):
            pass
        inside = _state(network)
    assert _bits_equal(_state(network), state)
    with masked(network, subject.canonical.prunable, half):
        assert _bits_equal(_state(network), inside)
    assert _bits_equal(_state(network), state)
    after = _identity(network)
    assert {key: value[:2] + value[3:] for key, value in after.items()} == {
        key: value[:2] + value[3:] for key, value in identity.items()
    }


def test_an_error_in_the_block_restores_too(prunable):
    subject = prunable("resnet18")
    state = _state(subject.network)
    masks = subject.ranking().masks(1000)

    def fail():
        with masked(subject.network, subject.canonical.prunable, masks):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert _bits_equal(_state(subject.network), state)


def test_an_unknown_layer_restores_what_came_before(prunable):
    subject = prunable("cifar_resnet20")
    state = _state(subject.network)
    masks = {"conv1": torch.zeros(16, dtype=torch.bool), "no_such_layer": torch.zeros(1, dtype=torch.bool)}

    def enter():
        with masked(subject.network, subject.canonical.prunable, masks):
            raise AssertionError

    with pytest.raises(KeyError, match="no_such_layer"):
        enter()
    assert _bits_equal(_state(subject.network), state)


def test_odd_bits_survive():
    """Negative zero, denormals and NaN come back as they were, in parameters that are being trained too."""
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).eval()
    canonical = canonize(network, (1, 2, 2))
    odd = torch.tensor([-0.0, 1e-45, float("nan")])
    with torch.no_grad():
        network[0].bias.copy_(odd)
        network[1].running_mean.copy_(odd)
    state = _state(network)
    with masked(network, canonical.prunable, {"0": torch.zeros(3, dtype=torch.bool)}):
        assert network(torch.randn(2, 1, 2, 2)).isfinite().all()
        assert network[0].weight.requires_grad
    assert _bits_equal(_state(network), state)


def test_a_batch_norm_without_weights_leaks_nothing():
    network = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    ).eval()
    network[1].running_mean.fill_(-1.0)
    canonical = canonize(network, (1, 2, 2))
    with masked(network, canonical.prunable, {"0": torch.tensor([True, False, False])}):
        features = network[:2](torch.randn(2, 1, 2, 2))
    assert (features[:, 1:] == 0).all()
    assert (features[:, 0] != 0).all()
