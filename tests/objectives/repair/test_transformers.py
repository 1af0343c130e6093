"""Repaired vision transformers, in float64: what is exact, and what stays as it is."""

import pytest
import torch
from random_ranking import random_ranking
from timm.models.vision_transformer import ResPostBlock

from objectives.canonization import canonize
from objectives.memory import Batches
from objectives.pruning.masking import masked
from objectives.pruning.slimming import slim
from objectives.repair.chunks import Chunks
from objectives.repair.order import order
from objectives.repair.original import observe
from objectives.repair.own import repaired
from objectives.repair.refit import Refit
from objectives.repair.repairer import Repairer, with_layers
from search_spaces.repairs import RepairSpec

REFIT, BN = RepairSpec("refit", 0.1), RepairSpec("bn", 0.1)
BATCHES = Batches("a test", 2)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def close(given, expected, tolerance=1e-9):
    torch.testing.assert_close(given, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def nothing_pruned(canonical):
    return {name: torch.ones(n, dtype=torch.bool) for name, n in canonical.components.items()}


def images(n, seed=2):
    return torch.randn(n, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("repair", [REFIT, BN], ids=str)
@pytest.mark.parametrize("components", ["mlp", "heads", "all"])
def test_slim_with_repair_is_masked_with_repair(transformer, snapshot, components, repair):
    """Design section 9: logits to 1e-9 relative, equal predictions wherever the top two logits differ by more."""
    network, canonical = transformer.network, transformer.canonical.choosing(components)
    repairer, ranking, before = Repairer(canonical, images(5), BATCHES), random_ranking(canonical), snapshot(network)
    for n in (0, len(ranking) // 3, len(ranking)):
        masks = ranking.masks(n)
        layers = repairer.layers(masks, repair)
        assert set(layers) <= {name for name in canonical.layers if name.endswith(("proj", "fc2", "head"))}
        assert canonical.classifier in layers or n == 0
        small = slim(repairer.repaired(masks, repair), masks)(transformer.images)
        with repaired(network, canonical.layers, layers) as own, masked(own, canonical.prunable, masks):
            large = own(transformer.images)
        close(small, large)
        top = large.topk(2).values
        differ = top[:, 0] - top[:, 1] > 1e-9 * large.abs().max()
        assert torch.equal(small.argmax(1)[differ], large.argmax(1)[differ])
    values = [[entry[5] for part in module[6:] for entry in part] for module in before]
    assert [[entry[5] for part in module[6:] for entry in part] for module in snapshot(network)] == values
    assert repairer.repaired(ranking.masks(0), repair) is canonical


def test_neurons_that_repeat_others_are_made_up_for_exactly(transformer):
    """The sums of the stream, and with them all that follows, are the original's."""
    canonical = transformer.canonical.choosing("mlp")
    masks, layers = nothing_pruned(canonical), {}
    for name in [name for name in canonical.components if name.endswith("fc1")]:
        layer = canonical.module.get_submodule(name)
        weight, bias = 10 * layer.weight, layer.bias.clone()  # random weights hardly reach where GELU bends
        weight[24:], bias[24:] = weight[:24].flip(0), bias[:24].flip(0)
        layers[name] = torch.nn.Linear(*weight.T.shape, dtype=torch.float64)
        layers[name].weight, layers[name].bias = (torch.nn.Parameter(t, requires_grad=False) for t in (weight, bias))
        masks[name][24:] = False
    original = with_layers(canonical, layers)
    repairer = Repairer(original, images(40), Batches("a test", 100))
    small = slim(repairer.repaired(masks, RepairSpec("refit", 1e-13)), masks)
    expected = original.module(transformer.images)
    close(small(transformer.images), expected, tolerance=1e-6)
    assert float((slim(original, masks)(transformer.images) - expected).abs().max()) > 0.01


def test_chunks_and_batches_make_no_difference(transformer):
    canonical = transformer.canonical.choosing("all")
    network, references = order(canonical.module), images(6)
    masks = random_ranking(canonical).masks(100)
    logits = []
    for batch_size, n_rows in ((6, 10_000), (1, 37)):
        targets = observe(network, references, batch_size, n_positions=60, seed=0)
        layers = Refit(network, targets, masks, Chunks.of(references, batch_size), 0.1, n_rows).repair()
        logits.append(slim(with_layers(canonical, layers), masks)(transformer.images))
    close(*logits, tolerance=1e-8)


def test_refitting_brings_the_logits_nearer(transformer):
    canonical = transformer.canonical.choosing("all")
    references, masks = images(40), random_ranking(canonical).masks(60)
    wanted, repairer = transformer.network(transformer.images), Repairer(canonical, references, BATCHES)
    refitted, plain = (
        float((slim(repairer.repaired(masks, repair), masks)(transformer.images) - wanted).norm())
        for repair in (REFIT, RepairSpec())
    )
    assert refitted < 0.8 * plain


def test_the_penalty_pulls_towards_the_weights_as_they_are(build_transformer):
    canonical = canonize(build_transformer("class-token"), (3, 16, 16)).choosing("all")
    layers = Repairer(canonical, images(6), BATCHES).layers(
        random_ranking(canonical).masks(60), RepairSpec("refit", 1e12)
    )
    assert len(layers) > 4
    for name, layer in layers.items():
        close(layer.weight, canonical.module.get_submodule(name).weight)


def test_layers_before_what_is_pruned_and_pruned_writers_stay_as_they_are(build_transformer):
    canonical = canonize(build_transformer("class-token"), (3, 16, 16)).choosing("all")
    masks = nothing_pruned(canonical)
    masks["blocks.2.mlp.fc2"][::2] = False
    masks["blocks.3.attn.heads"][:] = False
    layers = Repairer(canonical, images(6), BATCHES).layers(masks, REFIT)
    assert list(layers) == ["blocks.3.attn.proj", "blocks.3.mlp.fc2", "head"]
    proj = layers["blocks.3.attn.proj"]
    close(proj.weight, canonical.module.get_submodule("blocks.3.attn.proj").weight)  # it reads nothing: the bias fits
    masks["blocks.2.mlp.fc1"][:5] = False
    fc2 = Repairer(canonical, images(6), BATCHES).layers(masks, REFIT)["blocks.2.mlp.fc2"]
    moved = (fc2.weight - canonical.module.get_submodule("blocks.2.mlp.fc2").weight).abs().amax(dim=1) > 0
    assert torch.equal(moved, masks["blocks.2.mlp.fc2"])


def test_a_layer_that_a_norm_follows_is_fitted_to_its_own_outputs(build_transformer):
    canonical = canonize(build_transformer("class-token", block_fn=ResPostBlock), (3, 16, 16)).choosing("mlp")
    network = order(canonical.module)
    assert network.sums == {}
    assert {name.rpartition(".")[2] for name in network.repairable} == {"proj", "fc2", "head"}
    masks = random_ranking(canonical).masks(50)
    assert Repairer(canonical, images(6), BATCHES).layers(masks, REFIT)


@pytest.mark.parametrize(("variant", "options"), [("distilled", {}), ("layer-scale", {"proj_bias": False})])
def test_some_classes_only_and_layers_without_biases(build_transformer, variant, options):
    network, classes = build_transformer(variant, **options), [7, 2, 4]
    for block in network.blocks:
        block.attn.fused_attn = False
    canonical = canonize(network, (3, 16, 16), classes).choosing("all")
    masks, others = random_ranking(canonical).masks(70), images(3, seed=5)
    before = network(others)
    layers = Repairer(canonical, images(6), BATCHES).layers(masks, REFIT)
    with repaired(network, canonical.layers, layers, classes) as own, masked(own, canonical.prunable, masks):
        large = own(others)[:, classes]
    close(slim(with_layers(canonical, layers), masks)(others), large)
    assert torch.equal(network(others), before)
