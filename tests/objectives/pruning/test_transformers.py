"""Masking, slimming and evaluation of vision transformers."""

import copy
import itertools

import pytest
import torch
from random_ranking import random_ranking
from torch.utils.flop_counter import FlopCounterMode

from objectives.canonization import canonize
from objectives.pruning.fusion import fused
from objectives.pruning.masking import masked
from objectives.pruning.rates import DEFAULT_RATES, n_pruned, parse_rates
from objectives.pruning.slim_files import load_coupled, write_state
from objectives.pruning.slimming import cost, depends_on_images, draft, slim
from objectives.pruning.structured import resize_transformer

RATES = parse_rates(DEFAULT_RATES)
TOLERANCE = 1e-9


def kept(canonical, pruned):
    """Masks of all components; `pruned` maps a layer or attention to what it loses: indices, a slice, or all."""
    masks = {name: torch.ones(n, dtype=torch.bool) for name, n in canonical.components.items()}
    for name, indices in pruned.items():
        masks[name][indices] = False
    return masks


def check_equal(network, canonical, images, masks):
    module = slim(canonical, masks)
    with torch.no_grad():
        logits = module(images)
        with masked(network, canonical.prunable, masks):
            expected = network(images)
    bound = TOLERANCE * expected.abs().amax(dim=1, keepdim=True)
    assert ((logits - expected).abs() <= bound).all()
    top = expected.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 2 * bound[:, 0]
    assert torch.equal(logits.argmax(dim=1)[clear], expected.argmax(dim=1)[clear])
    assert module(images[:1]).shape == (1, expected.shape[1])
    return module, logits


@pytest.mark.parametrize("components", ["all", "heads", "mlp"])
def test_slim_equals_masked_and_shrinks_at_every_rate(transformer, components):
    canonical = transformer.canonical.choosing(components)
    ranking, costs, predictions = random_ranking(canonical), [], []
    for n in sorted({n_pruned(rate, len(ranking)) for rate in RATES}):  # of 12 heads some rates prune as many
        module, logits = check_equal(transformer.network, canonical, transformer.images, ranking.masks(n))
        costs.append(cost(module))
        predictions.append(logits)
    assert costs[0] == cost(canonical.module)
    for before, after in itertools.pairwise(costs):
        assert after.parameters < before.parameters
        assert after.flops < before.flops
    assert not torch.allclose(predictions[0], predictions[-1], rtol=1e-2)


def test_network_without_any_component_still_answers(transformer):
    canonical = transformer.canonical.choosing("all")
    masks = kept(canonical, dict.fromkeys(canonical.components, slice(None)))
    module, _ = check_equal(transformer.network, canonical, transformer.images, masks)
    assert depends_on_images(module)  # by the residual stream
    assert not any("qkv" in name for name, _ in module.named_parameters())


def test_a_head_loses_its_rows_of_query_key_and_value_and_the_columns_that_read_it(build_transformer):
    network = build_transformer("class-token")
    canonical = canonize(network, (3, 16, 16)).choosing("heads")
    module = slim(canonical, kept(canonical, {"blocks.1.attn.heads": [1]}))
    rows = torch.tensor([*range(8), *range(16, 24)])
    for index, part in enumerate("qkv"):
        layer = module.get_submodule(f"blocks.1.attn.qkv.{part}")
        assert torch.equal(layer.weight, network.blocks[1].attn.qkv.weight[24 * index + rows])
    assert torch.equal(module.get_submodule("blocks.1.attn.proj").weight, network.blocks[1].attn.proj.weight[:, rows])


def test_a_neuron_loses_its_row_and_the_column_that_reads_it(build_transformer):
    network = build_transformer("class-token")
    canonical = canonize(network, (3, 16, 16)).choosing("mlp")
    pruned = {"blocks.0.mlp.fc1": slice(5, None), "blocks.0.mlp.fc2": [0, 3]}
    module = slim(canonical, kept(canonical, pruned))
    mlp, whole = module.get_submodule("blocks.0.mlp"), network.blocks[0].mlp
    assert mlp.fc1.weight.shape == (5, 24)
    rows = torch.tensor([1, 2, *range(4, 24)])
    assert torch.equal(mlp.fc2.weight, whole.fc2.weight[rows][:, :5])


def test_cost_of_a_whole_transformer_is_that_of_its_parameters_and_products(build_transformer):
    network = build_transformer("class-token")
    size = cost(canonize(network, (3, 16, 16)).module)
    assert size.parameters == sum(parameter.numel() for parameter in network.parameters())
    for block in network.blocks:
        block.attn.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    assert size.flops == counter.get_total_flops() // 2


def test_flops_of_slim_networks_are_those_computed(transformer):
    canonical = transformer.canonical.choosing("all")
    module = slim(canonical, random_ranking(canonical).masks(40))
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        module(transformer.images[:1])
    assert cost(module).flops == counter.get_total_flops() // 2


def test_fused_network_computes_the_same(transformer):
    canonical = transformer.canonical.choosing("all")
    images = transformer.images.float()
    for n in (0, 40, 200):
        masks = random_ranking(canonical).masks(n)
        expected = slim(canonical, masks).float()(images)
        module = fused(draft(canonical, masks).float())
        assert torch.equal(module(images).argmax(dim=1), expected.argmax(dim=1))
        torch.testing.assert_close(module(images), expected, rtol=1e-4, atol=1e-4)


def test_attention_in_bfloat16_agrees_within_its_precision(build_transformer):
    network = build_transformer("class-token")
    for block in network.blocks:
        block.attn.qkv.weight.data *= 10  # so that attention isn't even
    canonical, images = canonize(network, (3, 16, 16)), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    masks = kept(canonical, {"blocks.1.attn.heads": [1]})
    expected = slim(canonical, masks)(images)
    module = fused(draft(canonical, masks).bfloat16())
    with torch.inference_mode():
        error = (module(images.bfloat16()) - expected).abs().max()
        rounding = (slim(canonical, masks).bfloat16()(images.bfloat16()) - expected).abs().max()
    assert error < 2 * rounding


def test_slim_network_can_be_exported_for_any_batch_size(transformer):
    canonical = transformer.canonical.choosing("all")
    module = slim(canonical, random_ranking(canonical).masks(60))
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (transformer.images[:2],), dynamic_shapes=shapes, strict=False)
    for images in (transformer.images, transformer.images[:1]):
        torch.testing.assert_close(program.module()(images), module(images))


def test_masking_restores_every_tensor(transformer, snapshot):
    canonical = transformer.canonical.choosing("all")
    masks = random_ranking(canonical).masks(60)
    before = snapshot(transformer.network)
    with masked(transformer.network, canonical.prunable, masks) as network:
        weight = network.blocks[0].attn.qkv.weight.detach()
        for head, is_kept in enumerate(masks["blocks.0.attn.heads"].tolist()):
            rows = weight[48 + 8 * head : 48 + 8 * head + 8]
            assert bool((rows != 0).any()) == is_kept
        assert (weight[:48] != 0).any(dim=1).all()  # q and k stay
    # Versions count writes, so all but them.
    values = [tensor.numpy(force=True).tobytes() for tensor in transformer.network.state_dict().values()]
    assert values == [entry[5] for module in before for part in module[6:] for entry in part]


# Resized networks of the user's own class.


@pytest.mark.parametrize("components", ["all", "heads", "mlp"])
def test_resized_network_computes_what_the_masked_one_computes(transformer, snapshot, components):
    canonical = transformer.canonical.choosing(components)
    before = snapshot(transformer.network)
    masks = random_ranking(canonical).masks(n_pruned(0.6, sum(canonical.components.values())))
    result = resize_transformer(transformer.network, canonical, masks)
    assert snapshot(transformer.network) == before
    assert type(result.network) is type(transformer.network)
    with torch.no_grad(), masked(copy.deepcopy(transformer.network), canonical.prunable, masks) as network:
        torch.testing.assert_close(result.network(transformer.images), network(transformer.images))
    assert result.n_removed == sum(int((~mask).sum()) for mask in masks.values())
    for block, module in enumerate(result.network.blocks):
        if components != "mlp":
            left = int(masks[f"blocks.{block}.attn.heads"].sum())
            assert (module.attn.num_heads, module.attn.qkv.out_features) == (left, 3 * 8 * left)
        if components != "heads":
            assert module.mlp.fc1.out_features == int(masks[f"blocks.{block}.mlp.fc1"].sum())
            assert module.mlp.fc2.out_features == 24
    size = cost(canonize(result.network, (3, 16, 16)).module)
    assert size.parameters < cost(canonical.module).parameters


@pytest.mark.parametrize("variant", ["class-token", "layer-scale"])
@pytest.mark.parametrize("fused_attention", [True, False])
def test_all_heads_of_a_block_can_go(build_transformer, variant, fused_attention, tmp_path):
    network = build_transformer(variant)
    for block in network.blocks:
        block.attn.fused_attn = fused_attention
    canonical = canonize(network, (3, 16, 16)).choosing("all")
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    masks = kept(canonical, {"blocks.2.attn.heads": slice(None), "blocks.1.attn.heads": [1]})
    resized = resize_transformer(network, canonical, masks).network
    assert resized.blocks[2].attn.num_heads == 0
    with torch.no_grad(), masked(network, canonical.prunable, masks) as reference:
        expected = reference(images)
        torch.testing.assert_close(resized(images), expected)
        torch.testing.assert_close(canonize(resized, (3, 16, 16)).module(images), expected)
    write_state(resized, tmp_path / "coupled.safetensors")
    loaded = load_coupled(tmp_path / "coupled.safetensors", build_transformer(variant))
    assert [block.attn.num_heads for block in loaded.blocks][:4] == [3, 2, 0, 3]
    torch.testing.assert_close(loaded(images), expected)
