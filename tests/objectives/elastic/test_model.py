import copy

import pytest
import torch
from random_ranking import random_ranking

from objectives.elastic.model import ElasticModel
from objectives.pruning.masking import masked
from objectives.pruning.slimming import cost, slim

NETWORKS = ["branches", "cifar_resnet20", "mobilenetv3_small_100", "regnety_002", "vgg11_bn"]


def check_levels(model, network, canonical, images, masks):
    """Each level computes what the masked network does, and is as small as its slim network."""
    for level, of_level in enumerate(masks):
        model.set_level(level)
        logits = model(images)
        with masked(network, canonical.prunable, of_level):
            expected = network(images)
        assert ((logits - expected).abs() <= 1e-9 * expected.abs().amax(dim=1, keepdim=True)).all(), level
        assert cost(model.at(level)) == cost(slim(canonical, of_level))
    assert (model.at(0)(images).std(dim=0) > 0).all()


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


def check_sharing(model):
    """No level has weights of its own."""
    whole = model.weights(0)
    for level in range(model.n_levels):
        for name, value in model.weights(level).items():
            assert memory(value) == memory(whole[name]), (level, name)
            assert value.data_ptr() == whole[name].data_ptr(), (level, name)
        floating = [t for t in model.at(level).state_dict().values() if t.is_floating_point()]
        assert {memory(t) for t in floating if t.numel()} <= {memory(t) for t in whole.values()}


@pytest.mark.parametrize("name", NETWORKS)
def test_each_level_is_the_masked_network_without_a_copy(elastic, name):
    subject = elastic(name)
    before = {key: value.clone() for key, value in subject.canonical.module.state_dict().items()}
    model = ElasticModel(subject.canonical, subject.masks)
    check_levels(model, subject.network, subject.canonical, subject.images, subject.masks)
    check_sharing(model)
    originals = {memory(value) for value in subject.canonical.module.state_dict().values()}
    assert originals.isdisjoint(memory(value) for value in model.weights(0).values())
    for key, value in subject.canonical.module.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", ["branches", "cifar_resnet20", "mobilenetv3_small_100", "regnety_002"])
def test_levels_in_which_layers_are_gone(elastic, name):
    subject = elastic(name)
    widths = subject.canonical.components
    generator = torch.Generator().manual_seed(3)
    masks = [{layer: torch.ones(width, dtype=torch.bool) for layer, width in widths.items()}]
    while len(masks) < 5:
        share = {layer: float(torch.rand((), generator=generator) * 1.4) for layer in widths}
        masks.append(
            {
                layer: mask & (torch.rand(len(mask), generator=generator) < share[layer])
                for layer, mask in masks[-1].items()
            }
        )
    masks.append({layer: torch.zeros(width, dtype=torch.bool) for layer, width in widths.items()})
    model = ElasticModel(subject.canonical, masks)
    assert any(not mask.any() for mask in masks[2].values())
    check_levels(model, subject.network, subject.canonical, subject.images, masks)
    check_sharing(model)


@pytest.mark.parametrize("components", ["all", "heads", "mlp"])
def test_levels_of_transformers(transformer, components):
    canonical = transformer.canonical.choosing(components)
    ranking = random_ranking(canonical)
    masks = [ranking.masks(ranking.n_pruned(rate)) for rate in (0.0, 0.3, 0.5, 0.9)]
    model = ElasticModel(canonical, masks)
    with torch.no_grad():
        check_levels(model, transformer.network, canonical, transformer.images, masks)
    check_sharing(model)


def test_the_largest_level_may_be_pruned_and_levels_may_be_equal(elastic):
    subject = elastic("cifar_resnet20", (0.3, 0.3, 0.6))
    model = ElasticModel(subject.canonical, subject.masks)
    check_levels(model, subject.network, subject.canonical, subject.images, subject.masks)
    check_sharing(model)


def test_switching_back_and_forth_changes_nothing(elastic):
    subject = elastic("cifar_resnet20")
    model = ElasticModel(subject.canonical, subject.masks)
    state = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    first = {}
    for level in (0, 3, 1, 2, 0, 2, 3, 1, 0):
        model.set_level(level)
        assert model.level == level
        logits = model(subject.images)
        assert torch.equal(first.setdefault(level, logits), logits)
    for name, value in model.state_dict().items():
        assert value.data_ptr() == state[name][0]
        assert torch.equal(value, state[name][1])


@pytest.mark.parametrize("change", [copy.deepcopy, lambda model: model.float(), lambda model: model.to("cpu")])
def test_copies_and_conversions_keep_the_levels_together(elastic, change):
    subject = elastic("mobilenetv3_small_100")
    model = ElasticModel(subject.canonical, subject.masks)
    expected = [model.at(level)(subject.images) for level in range(model.n_levels)]
    addresses = {memory(value) for value in model.weights(0).values()}
    changed = change(model)
    check_sharing(changed)
    if changed is not model:
        assert addresses.isdisjoint(memory(value) for value in changed.weights(0).values())
    for level, logits in enumerate(expected):
        found = changed.at(level)(subject.images.to(next(changed.parameters()).dtype))
        assert torch.allclose(found.double(), logits, rtol=1e-4, atol=1e-3 * float(logits.abs().max()))


def test_its_parameters_are_those_of_the_largest_level(elastic):
    subject = elastic("branches")
    model = ElasticModel(subject.canonical, subject.masks)
    assert sum(parameter.numel() for parameter in model.parameters()) == cost(model.at(0)).parameters
    assert [key.removeprefix("network.") for key in model.state_dict()] == list(model.at(0).state_dict())


def test_what_changes_one_level_in_place_changes_the_others(elastic):
    subject = elastic("branches")
    model = ElasticModel(subject.canonical, subject.masks)
    before = model.at(0)(subject.images)
    with torch.no_grad():
        for parameter in model.at(3).parameters():
            parameter.mul_(1.5)
    assert not torch.equal(model.at(0)(subject.images), before)


def test_levels_that_cannot_be_are_refused(elastic):
    subject = elastic("branches")
    canonical, masks = subject.canonical, subject.masks
    with pytest.raises(ValueError, match="needs masks of at least one level"):
        ElasticModel(canonical, [])
    with pytest.raises(
        ValueError, match="must be nested, but level 1 keeps components of 'stem' that level 0 is without"
    ):
        ElasticModel(canonical, [{"stem": torch.arange(8) > 1}, {"stem": torch.arange(8) < 4}])
    with pytest.raises(ValueError, match="masks of level 1 name 'steam', which has no components"):
        ElasticModel(canonical, [masks[0], {"steam": torch.ones(8, dtype=torch.bool)}])
    with pytest.raises(
        ValueError, match=r"'stem' in level 0 must be bool of shape \(8,\), but got torch.bool of shape \(7,\)"
    ):
        ElasticModel(canonical, [{"stem": torch.ones(7, dtype=torch.bool)}])
    model = ElasticModel(canonical, masks)
    for level in (-1, 4):
        with pytest.raises(ValueError, match=f"`level` must be from 0 to 3, but got {level}"):
            model.set_level(level)
    assert model.level == 0
