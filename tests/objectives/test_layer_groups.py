import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import objectives.cifar_resnets  # noqa: F401 (registers its networks with timm)
from objectives.canonization import canonize
from objectives.errors import UnsupportedNetworkError
from objectives.layer_groups import group_layers
from objectives.network import CanonicalNetwork


def on_meta(constructor, *arguments, side: int = 224, **options) -> CanonicalNetwork:
    """The canonical form of a network without values: grouping needs shapes only."""
    with torch.device("meta"):
        network = constructor(*arguments, **options).eval()
    return canonize(network, (3, side, side))


def table(network: CanonicalNetwork) -> dict[str, list[str]]:
    groups = group_layers(network)
    assert list(groups) == list(network.layers)
    return {group: [name for name in groups if groups[name] == group] for group in ("LLR", "MLL", "HLL", "FCL")}


def prefixes(names: list[str], depth: int) -> list[str]:
    return list(dict.fromkeys(".".join(name.split(".")[:depth]) for name in names))


def numbered(prefix: str, *indices: int) -> list[str]:
    return [f"{prefix}.{index}" for index in indices]


# Hatefi et al. 2024, torchvision's names.


def test_vgg16():
    assert table(on_meta(torchvision.models.vgg16)) == {
        "LLR": numbered("features", 0, 2, 5, 7),
        "MLL": numbered("features", 10, 12, 14, 17, 19),
        "HLL": numbered("features", 21, 24, 26, 28),
        "FCL": numbered("classifier", 0, 3, 6),
    }


def test_vgg16_bn():
    assert table(on_meta(torchvision.models.vgg16_bn)) == {
        "LLR": numbered("features", 0, 3, 7, 10),
        "MLL": numbered("features", 14, 17, 20, 24, 27),
        "HLL": numbered("features", 30, 34, 37, 40),
        "FCL": numbered("classifier", 0, 3, 6),
    }


@pytest.mark.parametrize(("constructor", "n_layers"), [("resnet18", 21), ("resnet50", 54)])
@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_resnets(source, constructor, n_layers):
    if source == "timm":
        network = on_meta(timm.create_model, constructor)
    else:
        network = on_meta(getattr(torchvision.models, constructor))
    groups = table(network)
    assert {group: prefixes(names, 1) for group, names in groups.items()} == {
        "LLR": ["conv1", "layer1"],
        "MLL": ["layer2", "layer3"],
        "HLL": ["layer4"],
        "FCL": ["fc"],
    }
    assert sum(map(len, groups.values())) == n_layers
    assert "layer2.0.downsample.0" in groups["MLL"]
    assert "layer4.0.downsample.0" in groups["HLL"]


# Design, section 9.


@pytest.mark.parametrize("side", [64, 224])
@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn", "vgg11_bn"])
def test_timm_vggs_dense_layers_are_convolutions_but_fully_connected(name, side):
    groups = table(on_meta(timm.create_model, name, side=side))
    sizes = [2, 4, 2] if name == "vgg11_bn" else [4, 5, 4]
    assert [len(groups[group]) for group in ("LLR", "MLL", "HLL")] == sizes
    assert groups["FCL"] == ["pre_logits.fc1", "pre_logits.fc2", "head.fc"]
    assert all(name.startswith("features.") for group in ("LLR", "MLL", "HLL") for name in groups[group])


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet56"])
def test_cifar_resnets_have_three_stages(name):
    groups = table(on_meta(timm.create_model, name, side=32))
    assert {group: prefixes(names, 1) for group, names in groups.items()} == {
        "LLR": ["conv1", "layer1"],
        "MLL": ["layer2"],
        "HLL": ["layer3"],
        "FCL": ["linear"],
    }


def test_regnet_has_four_stages():
    groups = table(on_meta(timm.create_model, "regnety_002"))
    assert {group: prefixes(names, 1) for group, names in groups.items()} == {
        "LLR": ["stem", "s1"],
        "MLL": ["s2", "s3"],
        "HLL": ["s4"],
        "FCL": ["head"],
    }
    assert "s1.b1.downsample.conv" in groups["LLR"]
    assert "s4.b1.downsample.conv" in groups["HLL"]


@pytest.mark.parametrize(
    ("name", "side", "high"),
    [
        ("mobilenetv2_100", 64, ["blocks.5", "blocks.6", "conv_head"]),
        ("mobilenetv2_100", 224, ["blocks.5", "blocks.6", "conv_head"]),
        ("mobilenetv3_small_100", 224, ["blocks.4", "blocks.5", "conv_head"]),
    ],
)
def test_more_than_four_stages_are_grouped_by_resolution(name, side, high):
    network, low = on_meta(timm.create_model, name, side=side), ["conv_stem", "blocks.0"]
    groups = table(network)
    assert prefixes(groups["LLR"], 2) == low
    assert prefixes(groups["HLL"], 2) == high
    between = list(dict.fromkeys(stage.partition(".")[2] for stage in prefixes(groups["MLL"], 2)))
    assert [f"blocks.{number}" for number in between] == prefixes(groups["MLL"], 2)
    assert len(low) + len(between) + len(high) == len(prefixes(list(network.components), 2))
    assert groups["FCL"] == ["classifier"]


def test_torchvisions_mobilenetv2_has_its_blocks_in_one_container():
    groups = table(on_meta(torchvision.models.mobilenet_v2))
    assert prefixes(groups["LLR"], 2) == numbered("features", 0, 1)
    assert prefixes(groups["MLL"], 2) == numbered("features", *range(2, 14))
    assert prefixes(groups["HLL"], 2) == numbered("features", *range(14, 19))
    assert groups["FCL"] == ["classifier.1"]


def test_alexnet_is_grouped_by_thirds():
    assert table(on_meta(torchvision.models.alexnet)) == {
        "LLR": ["features.0"],
        "MLL": numbered("features", 3, 6, 8),
        "HLL": ["features.10"],
        "FCL": numbered("classifier", 1, 4, 6),
    }


class SumAtTheRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.fc = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.a(images).relu()
        return self.fc(self.c((x + self.b(x)).relu()).mean((2, 3)))


def test_residual_sum_outside_all_blocks_makes_no_stage():
    network = canonize(SumAtTheRoot().eval(), (3, 8, 8))
    assert group_layers(network) == {"a": "LLR", "b": "MLL", "c": "HLL", "fc": "FCL"}


# A user's own groups.


@pytest.fixture(scope="module")
def cifar() -> CanonicalNetwork:
    return on_meta(timm.create_model, "cifar_resnet20", side=32)


def test_first_pattern_that_matches_counts(cifar):
    patterns = {"FCL": ["linear"], "LLR": ["conv1", "layer1.0.*"], "MLL": ["layer[12].*"], "HLL": ["*"]}
    groups = group_layers(cifar, patterns)
    assert list(groups) == list(cifar.layers)
    assert groups["layer1.0.conv2"] == "LLR"
    assert groups["layer1.1.conv1"] == groups["layer2.0.conv1"] == "MLL"
    assert groups["layer3.0.conv1"] == groups["linear"] == "HLL"


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            {"LLR": ["conv1"], "MLL": ["layer?.*"], "FCL": ["liner"]},
            r"^The pattern 'liner' of group FCL matches no layer\. Did you mean 'linear'\?",
        ),
        (
            {"LLR": ["conv1"], "FCL": ["linear"]},
            r"^No group's pattern matches the layer 'layer1\.0\.conv1' \(18 of 20 layers have no group\); add a",
        ),
        ({"LLR": ["*"], "LRR": ["conv1"]}, r"^Unknown layer group 'LRR'\. Did you mean 'LLR'\?"),
    ],
)
def test_patterns_that_miss_are_refused(cifar, patterns, message):
    with pytest.raises(UnsupportedNetworkError, match=message):
        group_layers(cifar, patterns)
