"""A small residual network for the 8 x 8 handwritten digits that ship inside scikit-learn.

Importing this module registers `digits_cnn` with timm. Its weights come from training, which takes seconds: at first
use it is trained from a fixed seed and kept in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from objectives.cache import cache_directory
from objectives.datasets import LabelledImages
from objectives.datasets.digits import digits_data
from objectives.training import TrainingOptions
from objectives.training import train as fit
from search_spaces.files import write_atomically

__all__ = ["DigitsCNN", "Recipe", "digits_cnn", "train", "trained_weights"]

_logger = logging.getLogger(__name__)

_MEAN, _STD = 0.3053, 0.3759  # of all pixels, in [0, 1]
default_cfgs = generate_default_cfgs(
    {
        "digits_cnn": {
            "num_classes": 10,
            "input_size": (1, 8, 8),
            "pool_size": (2, 2),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (_MEAN,),
            "std": (_STD,),
            "first_conv": "conv1",
            "classifier": "fc",
            "label_names": tuple("0123456789"),
        }
    }
)


class DigitsCNN(nn.Module):
    """A stem and three residual blocks at 8 x 8, 4 x 4 and 2 x 2 pixels, average pooling and one dense layer.

    Args:
        num_classes: Outputs.
        in_chans: Channels of an image.
        channels: Filters of the stem and the first block, of the second and of the third.
        global_pool: Kind of pooling before the dense layer.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        channels: tuple[int, int, int] = (16, 32, 64),
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        low, middle, high = channels
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = high
        self.conv1 = nn.Conv2d(in_chans, low, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(low)
        self.act1 = nn.ReLU()
        self.layer1 = nn.Sequential(BasicBlock(low, low))
        self.layer2 = nn.Sequential(BasicBlock(low, middle, 2, downsample=_projection(low, middle)))
        self.layer3 = nn.Sequential(BasicBlock(middle, high, 2, downsample=_projection(middle, high)))
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        self.fc = nn.Linear(high, num_classes)

    def get_classifier(self) -> nn.Module:
        """The dense layer, as timm asks for it."""
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, 8, 8) -> (N, channels[2], 2, 2)."""
        x = self.act1(self.bn1(self.conv1(x)))
        return torch.as_tensor(self.layer3(self.layer2(self.layer1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, channels[2], H, W) -> (N, num_classes), or (N, channels[2]) with `pre_logits`."""
        x = self.global_pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, 8, 8) -> logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _projection(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=2, bias=False), nn.BatchNorm2d(channels))


@register_model
def digits_cnn(pretrained: bool = False, **options: Any) -> DigitsCNN:
    """336 filters in 9 convolutions; `pretrained` trains it, or takes the trained weights from the cache."""
    network = build_model_with_cfg(DigitsCNN, "digits_cnn", pretrained=False, **options)
    assert isinstance(network, DigitsCNN)
    if pretrained:
        network.load_state_dict(trained_weights())
    return network


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the network is trained; another recipe has another cache file.

    Attributes:
        version: Raised when `DigitsCNN` or `train` changes.
        seed: Of the initial weights, the order of the images and their shifts.
        n_epochs: Passes over the 1,000 training images.
        batch_size: Images in a step; divides 1,000.
        learning_rate: Peak of the one-cycle schedule (AdamW).
        weight_decay: Of AdamW.
    """

    version: int = 1
    seed: int = 0
    n_epochs: int = 20
    batch_size: int = 50
    learning_rate: float = 1e-2
    weight_decay: float = 5e-2

    @property
    def options(self) -> TrainingOptions:
        """The training that it means."""
        return TrainingOptions(
            n_epochs=self.n_epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            optimizer="adamw",
            weight_decay=self.weight_decay,
            schedule="one-cycle",
            label_smoothing=0.1,
            seed=self.seed,
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the recipe."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def train(recipe: Recipe) -> DigitsCNN:
    """Trains the network on the digits' training images; equal on one machine for equal recipes.

    Images are shifted by up to one pixel. One thread is used, so that the sums' order doesn't depend on the machine's
    number of cores; the global random state is left as it was.

    Returns:
        The network in evaluation mode.
    """
    data = digits_data()
    images = ((torch.from_numpy(data.train_images) / 255 - _MEAN) / _STD).unsqueeze(1)
    labels = torch.from_numpy(data.train_labels)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(recipe.seed)
        network = DigitsCNN()
        # The images' order goes on with the random numbers that the initial weights are drawn from.
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())
        fit(network, LabelledImages(images, labels), recipe.options, augment=_shifted, generator=generator)
    return network.eval()


def trained_weights(recipe: Recipe = Recipe()) -> dict[str, Tensor]:
    """The trained network's state dict: from the cache, or trained now and put there.

    The cache is `HPO_CACHE` or the user's cache directory. A file that is damaged or was written by another recipe is
    trained anew; where the cache can't be written, the network is trained each time.
    """
    path = cache_directory() / f"digits_cnn-{recipe.fingerprint[:16]}.safetensors"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("recipe") == recipe.fingerprint:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it isn't a mapping)
    except FileNotFoundError:
        pass
    except (OSError, safetensors.SafetensorError) as error:
        _logger.warning("the cached digits_cnn in %s can't be read (%s): training it anew", path, error)
    _logger.info("training digits_cnn (once; kept in %s)", path)
    state = {key: value.detach().clone() for key, value in train(recipe).state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, safetensors.torch.save(state, metadata={"recipe": recipe.fingerprint}))
    except OSError as error:
        _logger.warning("the trained digits_cnn can't be kept in %s (%s)", path, error)
    return state


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts each image (N, C, H, W) by -1, 0 or 1 pixel each way, filled with black."""
    n_images, _, height, width = images.shape
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=-_MEAN / _STD)
    rows, columns = torch.randint(3, (2, n_images), generator=generator)
    return torch.stack(
        [
            image[:, row : row + height, column : column + width]
            for image, row, column in zip(padded, rows.tolist(), columns.tolist(), strict=True)
        ]
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
