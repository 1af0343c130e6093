"""Vision transformers in canonical form, and their groups and components."""

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, ParallelScalingBlock, VisionTransformer
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import nn

from objectives.attribution.attention import AttentionProduct, AttentionWeights
from objectives.attribution.operations import ConstantSum, ConstantTokens, LayerNorm
from objectives.canonization import canonize
from objectives.datasets import load_task
from objectives.errors import UnsupportedNetworkError
from objectives.layer_groups import group_layers
from objectives.models import load_model
from objectives.objective import Objective, ObjectiveOptions
from objectives.pruning.masking import masked
from objectives.pruning.ranking import rank
from objectives.pruning.slimming import slim
from search_spaces.heuristics import TRANSFORMER_HEURISTICS


def relative_difference(one, other):
    return float((one - other).abs().max() / other.abs().max())


def test_copy_computes_the_same(transformer):
    with torch.no_grad():
        for batch in (transformer.images, transformer.images[:1], torch.cat([transformer.images] * 2)[:5]):
            assert relative_difference(transformer.canonical.module(batch), transformer.network(batch)) < 1e-10


def test_network_is_left_as_it_was(transformer, transformer_of, snapshot):
    original = transformer_of(transformer.name)
    assert snapshot(original.network) == original.before


def test_copy_has_modules_for_all_that_has_a_rule(transformer):
    modules = list(transformer.canonical.module.modules())
    n_blocks = len(transformer.network.blocks)
    for kind in (AttentionWeights, AttentionProduct):
        assert sum(isinstance(module, kind) for module in modules) == n_blocks
    assert sum(isinstance(module, LayerNorm) for module in modules) >= 2 * n_blocks
    assert sum(isinstance(module, ConstantSum) for module in modules) == 1
    assert sum(isinstance(module, ConstantTokens) for module in modules) == (transformer.name != "no-class-token")


@pytest.mark.parametrize("variant", ["class-token", "layer-scale"])
def test_fused_and_unfused_attention_agree(build_transformer, variant, monkeypatch):
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    copies = []
    for fused in (True, False):
        network = build_transformer(variant)
        for block in network.blocks:
            block.attn.fused_attn = fused
        copies.append(canonize(network, (3, 16, 16)))
    one, other = (copy.module(images) for copy in copies)
    assert relative_difference(one, other) < 1e-12
    assert copies[0].heads == copies[1].heads
    assert list(copies[0].layers) == list(copies[1].layers)


def test_a_layer_each_for_query_key_and_value(build_transformer):
    network = build_transformer("class-token")
    canonical = canonize(network, (3, 16, 16))
    joint = network.blocks[1].attn.qkv
    for index, part in enumerate("qkv"):
        layer = canonical.module.get_submodule(f"blocks.1.attn.qkv.{part}")
        assert torch.equal(layer.weight, joint.weight[24 * index : 24 * (index + 1)])
        assert torch.equal(layer.bias, joint.bias[24 * index : 24 * (index + 1)])
    heads = canonical.heads["blocks.1.attn.heads"]
    assert (heads.n_heads, heads.head_dim, heads.projection) == (3, 8, "blocks.1.attn.qkv")
    assert (heads.query, heads.key, heads.value) == tuple(f"blocks.1.attn.qkv.{part}" for part in "qkv")


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


class WrappedBlock(nn.Module):
    """A transformer's block whose residual sums are in modules of their own, or in its own forward."""

    def __init__(self, wrapped, dim, num_heads, mlp_ratio, **_) -> None:
        super().__init__()
        self.wrapped = wrapped
        branches = {
            "attn": nn.Sequential(nn.LayerNorm(dim), Attention(dim, num_heads, qkv_bias=True)),
            "mlp": nn.Sequential(nn.LayerNorm(dim), Mlp(dim, int(dim * mlp_ratio))),
        }
        for name, branch in branches.items():
            self.add_module(name, Residual(branch) if name in wrapped else branch)

    def forward(self, x):
        x = self.attn(x) if "attn" in self.wrapped else x + self.attn(x)
        return self.mlp(x) if "mlp" in self.wrapped else x + self.mlp(x)


class AttendingTwice(nn.Module):
    """Two attentions in one forward, and a layer of any name."""

    def __init__(self, own: str) -> None:
        super().__init__()
        self.embed, self.fc = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, 10)
        self.first, self.second = nn.Linear(24, 72), nn.Linear(24, 72)
        self.add_module(own, nn.Linear(24, 24))
        self.own = own

    def attend(self, layer, x):
        q, k, v = layer(x).reshape(x.shape[0], x.shape[1], 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return attended.transpose(1, 2).reshape(x.shape[0], x.shape[1], 24)

    def forward(self, images):
        x = torch.cat([self.embed(images).flatten(2).transpose(1, 2)], 1)  # of nothing but the images' tokens
        x = x + self.attend(self.first, x)
        x = x + self.get_submodule(self.own)(self.attend(self.second, x))
        return self.fc(x.mean(1))


@pytest.mark.parametrize(
    ("own", "names"),
    [("proj", ["heads", "second.heads"])] + [(n, ["first.heads", "second.heads"]) for n in ("heads", "weights")],
)
def test_attentions_of_one_module_have_names_of_their_own(lively, own, names):
    torch.manual_seed(0)
    network = lively(AttendingTwice(own))
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    canonical = canonize(network, (3, 16, 16))
    assert list(canonical.heads) == names
    assert list(canonical.choosing("heads").components) == names
    assert own in canonical.layers
    with torch.no_grad():
        assert relative_difference(canonical.module(images), network(images)) < 1e-12


def test_components_are_neurons_of_mlps_by_default(transformer):
    canonical, n_blocks = transformer.canonical.choosing(None), len(transformer.network.blocks)
    expected = {
        f"blocks.{block}.mlp.{layer}": width for block in range(n_blocks) for layer, width in (("fc1", 48), ("fc2", 24))
    }
    assert canonical.components == expected
    assert canonical.choosing("mlp").components == expected


def test_components_are_heads_or_all_by_choice(transformer):
    n_blocks = len(transformer.network.blocks)
    heads = transformer.canonical.choosing("heads").components
    assert heads == {f"blocks.{block}.attn.heads": 3 for block in range(n_blocks)}
    everything = transformer.canonical.choosing("all").components
    assert list(everything)[:4] == [
        "blocks.0.attn.heads",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
        "blocks.1.attn.heads",
    ]
    assert everything == heads | transformer.canonical.choosing("mlp").components


def test_components_of_vit_b16():
    canonical = canonize(timm.create_model("vit_base_patch16_224").eval(), (3, 224, 224))
    assert sum(canonical.choosing("mlp").components.values()) == 46080
    assert sum(canonical.choosing("heads").components.values()) == 144
    groups = group_layers(canonical)
    for block in range(12):
        expected = "LLR" if block < 3 else "HLL" if block > 8 else "MLL"
        assert {group for name, group in groups.items() if name.startswith(f"blocks.{block}.")} == {expected}
    assert groups["patch_embed.proj"] == "LLR"
    assert groups["head"] == "FCL"
    assert list(groups) == list(canonical.layers)


def test_groups_of_five_blocks(build_transformer):
    groups = group_layers(canonize(build_transformer("layer-scale"), (3, 16, 16)))
    assert [groups[f"blocks.{block}.mlp.fc1"] for block in range(5)] == ["LLR", "MLL", "MLL", "MLL", "HLL"]


def test_residual_networks_in_front_are_no_blocks(lively):
    torch.manual_seed(0)
    backbone = timm.create_model("resnet18", features_only=True, out_indices=[1])
    sizes = {"img_size": 32, "patch_size": 1, "embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 2}
    network = lively(VisionTransformer(**sizes, num_classes=10, embed_layer=partial(HybridEmbed, backbone=backbone)))
    canonical = canonize(network, (3, 32, 32))
    assert canonical.residual_scopes[:2] == tuple(f"patch_embed.backbone.layer1.{block}" for block in (0, 1))
    assert canonical.blocks == tuple((f"blocks.{block}",) for block in range(4))
    expected = [f"blocks.{block}.mlp.{layer}" for block in range(4) for layer in ("fc1", "fc2")]
    assert list(canonical.choosing("mlp").components) == expected
    groups = group_layers(canonical)
    assert {group for name, group in groups.items() if name.startswith("patch_embed.")} == {"LLR"}
    assert [groups[f"blocks.{block}.mlp.fc2"] for block in range(4)] == ["LLR", "MLL", "MLL", "HLL"]
    assert [name for name, group in groups.items() if group == "FCL"] == ["head"]


@pytest.mark.parametrize(
    ("wrapped", "blocks"),
    [
        (("attn", "mlp"), [(f"blocks.{block}.attn", f"blocks.{block}.mlp") for block in range(4)]),
        (("attn",), [(f"blocks.{block}.attn", f"blocks.{block}") for block in range(4)]),
        (("mlp",), [(f"blocks.{block}", f"blocks.{block}.mlp") for block in range(4)]),
    ],
)
def test_attention_and_mlp_may_have_a_residual_module_each(build_transformer, wrapped, blocks):
    network = build_transformer("class-token", block_fn=partial(WrappedBlock, wrapped))
    canonical = canonize(network, (3, 16, 16))
    assert list(canonical.blocks) == blocks
    heads, mlp = (list(canonical.choosing(kind).components) for kind in ("heads", "mlp"))
    assert heads == list(canonical.heads)
    assert len(heads) == 4
    branch = "mlp.branch.1" if "mlp" in wrapped else "mlp.1"
    assert mlp == [f"blocks.{block}.{branch}.{layer}" for block in range(4) for layer in ("fc1", "fc2")]
    groups = group_layers(canonical)
    assert [groups[f"blocks.{block}.{branch}.fc2"] for block in range(4)] == ["LLR", "MLL", "MLL", "HLL"]
    assert [name for name, group in groups.items() if group == "FCL"] == ["head"]
    masks = rank({name: torch.rand(n) for name, n in canonical.components.items()}).masks(90)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad(), masked(network, canonical.prunable, masks):
        assert relative_difference(slim(canonical, masks)(images), network(images)) < 1e-10


def test_fewer_than_four_blocks_are_refused(build_transformer):
    canonical = canonize(build_transformer("class-token", depth=3), (3, 16, 16))
    with pytest.raises(UnsupportedNetworkError, match="has 3 blocks, but its groups need at least 4"):
        group_layers(canonical)
    assert group_layers(canonical, {"MLL": ["patch*", "blocks*"], "FCL": ["head"]})["blocks.2.mlp.fc2"] == "MLL"


def test_classes_of_a_distilled_network(build_transformer):
    network = build_transformer("distilled").requires_grad_(False)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    restricted = canonize(network, (3, 16, 16), classes=[7, 2, 3])
    assert restricted.n_outputs == 3
    assert relative_difference(restricted.module(images), network(images)[:, [7, 2, 3]]) < 1e-10


def test_heads_of_a_network_without_any_are_refused(build):
    canonical = canonize(build("cifar_resnet20"), (3, 32, 32))
    for components in ("heads", "mlp"):
        with pytest.raises(UnsupportedNetworkError, match=f"`--components {components}` is for vision transformers"):
            canonical.choosing(components)
    with pytest.raises(UnsupportedNetworkError, match=r"Unknown components 'head'. Did you mean 'heads'\?"):
        canonical.choosing("head")
    assert canonical.choosing(None).components == canonical.components


class Masked(nn.Module):
    """Attention with a mask, in front of a transformer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images):
        mask = images.mean((1, 2)).unsqueeze(1).unsqueeze(1)
        flat = images.flatten(2).unsqueeze(1)
        attended = nn.functional.scaled_dot_product_attention(flat, flat, flat, mask.mean(-1, keepdim=True))
        return self.network(attended.squeeze(1).unflatten(2, (16, 16)))


def test_unknown_attention_is_refused_with_its_module(build_transformer):
    parallel = build_transformer("class-token", block_fn=ParallelScalingBlock)
    with pytest.raises(UnsupportedNetworkError, match=r"in module 'blocks\.\d' has no relevance rule"):
        canonize(parallel, (3, 16, 16))
    with pytest.raises(UnsupportedNetworkError, match="has no relevance rule here"):
        canonize(Masked(build_transformer("class-token")).eval(), (3, 16, 16))


@pytest.mark.parametrize("fused", [True, False])
def test_active_dropout_inside_attention_is_refused(build_transformer, fused):
    network = build_transformer("class-token", attn_drop_rate=0.1)
    attention = network.blocks[2].attn
    attention.fused_attn = fused
    assert len(canonize(network, (3, 16, 16)).heads) == 4
    (attention if fused else attention.attn_drop).training = True
    message = "no relevance rule here" if fused else r"^The dropout in module 'blocks\.2\.attn\.attn_drop' is active"
    with pytest.raises(UnsupportedNetworkError, match=message):
        canonize(network, (3, 16, 16))


# Real networks.


@pytest.fixture(scope="session")
def cifar(data_pack):
    model = load_model(
        "vit_tiny_patch16_224",
        checkpoint=data_pack / "weights" / "cifar10_vit_p4_d128_l4_h4.safetensors",
        options={"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 2}
        | {"num_classes": 10},
        size=(32, 32),
        crop=1.0,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )
    source = f"npz:{data_pack / 'cifar10' / 'train_10k.npz'},{data_pack / 'cifar10' / 'test_dev.npz'}"
    return model, load_task(source, model, confirmation_share=0.0, evaluation_images=4943)


def test_the_real_network_reaches_its_accuracy(cifar):
    objective = Objective(*cifar, ObjectiveOptions(rates=(0.0, 0.5)))
    assert len(objective.task.search) == 4943
    assert objective.unpruned_accuracy == pytest.approx(0.7257, abs=3e-4)
    assert objective.component_widths == {
        f"blocks.{block}.mlp.{name}": width for block in range(4) for name, width in (("fc1", 256), ("fc2", 128))
    }


@pytest.mark.parametrize(("components", "name"), [("heads", "zplus-cp"), ("mlp", "epsilon-attnlrp-abs")])
def test_the_least_relevant_are_pruned_with_less_harm_than_the_most(data_pack, cifar, components, name):
    model, _ = cifar
    source = f"npz:{data_pack / 'cifar10' / 'train_10k.npz'},{data_pack / 'cifar10' / 'test_dev.npz'}"
    task = load_task(source, model, evaluation_images=300)
    objective = Objective(model, task, ObjectiveOptions(rates=(0.0, 0.25, 0.5, 0.75), components=components))
    accuracies = objective.evaluate(TRANSFORMER_HEURISTICS[name]).curve.accuracies
    assert accuracies[0] == pytest.approx(objective.unpruned_accuracy)
    scores = objective.scores(TRANSFORMER_HEURISTICS[name])
    worst = rank({layer: -values for layer, values in scores.items()})
    measure = objective.evaluator("search").measure
    opposite = [float(measure(worst.masks(worst.n_pruned(rate))).correct.double().mean()) for rate in (0.25, 0.5, 0.75)]
    assert sum(accuracies[1:]) > sum(opposite) + 0.1


def test_deit_tiny_is_attributed_alike_by_both_engines(data_pack):
    model = load_model(
        "deit_tiny_patch16_224", checkpoint=data_pack / "weights" / "imagenet_deit_tiny_patch16_224.safetensors"
    )
    evaluation = data_pack / "imagenette160" / "ilsvrcval490_dev.npz"
    source = f"npz:{data_pack / 'imagenette160' / 'ref_100_per_class.npz'},{evaluation}"
    classes = (0, 217)  # two of Imagenette's
    task = load_task(source, model, classes=classes, references_per_class=1, evaluation_images=10)
    options = ObjectiveOptions(rates=(0.0, 0.5), components="all", batch_size=10)
    shared = Objective(model, task, options)
    assert shared.unpruned_accuracy > 0.9
    zennit = Objective(model, task, replace(options, attribution="zennit"))
    for name in ("epsilon-cp", "gamma-attnlrp"):
        one, other = (objective.attribution.attribute(TRANSFORMER_HEURISTICS[name]) for objective in (shared, zennit))
        for layer, expected in other.magnitude.items():
            assert float((one.magnitude[layer] - expected).abs().max()) < 1e-3 * float(expected.max())
