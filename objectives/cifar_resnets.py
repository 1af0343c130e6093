"""The residual networks for CIFAR-10 of He et al. 2016 (section 4.2), with option A shortcuts.

Importing this module registers `cifar_resnet20`, `cifar_resnet32`, `cifar_resnet44` and `cifar_resnet56` with timm. The
keys of their state dicts are those of akamaster/pytorch_resnet_cifar10, so its published checkpoints load as they are.
"""

from typing import Any

import torch
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

__all__ = ["CIFAR10_CLASSES", "CifarResNet", "cifar_resnet20", "cifar_resnet32", "cifar_resnet44", "cifar_resnet56"]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_CFG: dict[str, Any] = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "conv1",
    "classifier": "linear",
    "label_names": CIFAR10_CLASSES,
    "paper_ids": "arXiv:1512.03385",
}
default_cfgs = generate_default_cfgs({f"cifar_resnet{depth}": _CFG for depth in (20, 32, 44, 56)})


class _PaddedSubsampling(nn.Module):
    """Option A: every second pixel, with zero channels before and after; it has no parameters.

    Args:
        n_before: Zero channels put before the first one.
        n_after: Zero channels put behind the last one.
    """

    def __init__(self, n_before: int, n_after: int) -> None:
        super().__init__()
        self.n_before = n_before
        self.n_after = n_after

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, n_before + C + n_after, ceil(H / 2), ceil(W / 2))."""
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.n_before, self.n_after))


class CifarResNet(nn.Module):
    """A stem, three stages of basic blocks with 16, 32 and 64 channels, average pooling and one dense layer.

    Args:
        n_blocks: Blocks in each stage; the depth is 6 n_blocks + 2.
        num_classes: Outputs; 0 leaves the dense layer out.
        in_chans: Channels of an image.
        global_pool: Kind of pooling before the dense layer.
    """

    def __init__(self, n_blocks: int, num_classes: int = 10, in_chans: int = 3, global_pool: str = "avg") -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = 64
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU()
        self.layer1 = _stage(16, 16, n_blocks, stride=1)
        self.layer2 = _stage(16, 32, n_blocks, stride=2)
        self.layer3 = _stage(32, 64, n_blocks, stride=2)
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        self.linear = _classifier(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def get_classifier(self) -> nn.Module:
        """The dense layer, as timm asks for it."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new dense layer in place, as timm asks for it."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        self.linear = _classifier(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, 64, H / 4, W / 4)."""
        x = self.act1(self.bn1(self.conv1(x)))
        return torch.as_tensor(self.layer3(self.layer2(self.layer1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, 64, H, W) -> (N, num_classes), or (N, 64) with `pre_logits`."""
        x = self.global_pool(x)
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _classifier(n_features: int, num_classes: int) -> nn.Module:
    return nn.Linear(n_features, num_classes) if num_classes > 0 else nn.Identity()


def _stage(in_channels: int, channels: int, n_blocks: int, stride: int) -> nn.Sequential:
    added = channels - in_channels
    shortcut = _PaddedSubsampling(added // 2, added - added // 2) if added else None
    first = BasicBlock(in_channels, channels, stride, downsample=shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(n_blocks - 1)))


def _create(name: str, n_blocks: int, pretrained: bool, **options: Any) -> CifarResNet:
    network = build_model_with_cfg(CifarResNet, name, pretrained, n_blocks=n_blocks, **options)
    assert isinstance(network, CifarResNet)
    return network


@register_model
def cifar_resnet20(pretrained: bool = False, **options: Any) -> CifarResNet:
    """0.27 M parameters, 688 filters in 19 convolutions."""
    return _create("cifar_resnet20", 3, pretrained, **options)


@register_model
def cifar_resnet32(pretrained: bool = False, **options: Any) -> CifarResNet:
    """0.46 M parameters."""
    return _create("cifar_resnet32", 5, pretrained, **options)


@register_model
def cifar_resnet44(pretrained: bool = False, **options: Any) -> CifarResNet:
    """0.66 M parameters."""
    return _create("cifar_resnet44", 7, pretrained, **options)


@register_model
def cifar_resnet56(pretrained: bool = False, **options: Any) -> CifarResNet:
    """0.85 M parameters."""
    return _create("cifar_resnet56", 9, pretrained, **options)
