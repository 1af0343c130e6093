"""Elastic networks of the architectures of the prune-and-grow paper and of two that it left open; some are narrower."""

import pytest
import timm
import torch
from timm.models.vgg import VGG
from torch import nn
from torchvision.models import AlexNet

from objectives.canonization import canonize
from objectives.datasets import LabelledImages
from objectives.elastic.files import load_elastic, save_elastic
from objectives.elastic.model import ElasticModel
from objectives.elastic.rebuild import grown
from objectives.pruning.ranking import rank
from objectives.pruning.slimming import slim
from objectives.training import TrainingOptions, train


def _vgg16_bn():
    stages = ((8, 2), (16, 2), (32, 3), (64, 3), (64, 3))  # of 64 to 512 channels in the original
    layout = [part for width, n in stages for part in (*[width] * n, "M")]
    return VGG(layout, num_classes=10, mlp_ratio=1 / 64, norm_layer=nn.BatchNorm2d)


def _alexnet():
    network = AlexNet(num_classes=10)
    for index, (inputs, outputs) in {1: (9216, 32), 4: (32, 32), 6: (32, 10)}.items():  # of 4096 in the original
        network.classifier[index] = nn.Linear(inputs, outputs)
    return network


NETWORKS = {
    "VGG-16-BN": (32, _vgg16_bn),
    "AlexNet": (64, _alexnet),
    "ResNet-20": (32, lambda: timm.create_model("cifar_resnet20")),
    "ResNet-56": (16, lambda: timm.create_model("cifar_resnet56")),
    "MobileNetV2": (32, lambda: timm.create_model("mobilenetv2_035", num_classes=10)),
    "ViT-tiny": (
        32,
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, depth=3),
    ),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_levels_of_a_loaded_file_are_the_exact_slim_networks(lively, tmp_path, name):
    torch.manual_seed(0)
    size, build = NETWORKS[name]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=generator)
    canonical = canonize(lively(build()).requires_grad_(False), (3, size, size)).choosing(None)
    scores = {layer: torch.rand(n, generator=generator) for layer, n in canonical.components.items()}
    ranking = rank(scores, {layer: layer for layer in scores})
    masks = [ranking.masks(ranking.n_pruned(rate)) for rate in (0, 0.3, 0.7)]
    path = tmp_path / "elastic.safetensors"
    save_elastic(ElasticModel(canonical, masks), path)
    model = load_elastic(path, canonical)
    logits = []
    for level, of_level in enumerate(masks):
        model.set_level(level)
        logits.append(model(images))
        expected = slim(canonical, of_level)(images)
        torch.testing.assert_close(logits[level], expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    # What grows leaves what is smaller as it is.
    labelled, options = LabelledImages(images, torch.tensor([3, 7])), TrainingOptions(1, 2, 1e-3)
    train(model.at(1), labelled, options, gradient_masks=grown(model, 1))
    assert torch.equal(model.at(2)(images), logits[2])
    assert not torch.equal(model.at(1)(images), logits[1])
