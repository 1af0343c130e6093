import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

import objectives.cifar_resnets
import objectives.digits  # noqa: F401 (both register their networks)
from objectives.errors import ModelError
from objectives.preprocessing import Preprocessing

RNG = np.random.RandomState(0)


def rgb(height, width):
    return RNG.randint(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv3_small_100", "efficientnet_b0", "regnety_002", "cifar_resnet20", "digits_cnn"]
)
@pytest.mark.parametrize("shape", [(300, 260), (32, 32), (61, 347)])
def test_it_is_timms_evaluation_transform(name, shape):
    configuration = timm.create_model(name).pretrained_cfg
    channels = configuration["input_size"][0]
    preprocessing = Preprocessing.resolve(configuration, channels)
    image = Image.fromarray(rgb(*shape)).convert("RGB" if channels == 3 else "L")
    expected = create_transform(**timm.data.resolve_data_config(pretrained_cfg=configuration), is_training=False)(image)
    actual = preprocessing(image)
    assert actual.dtype == torch.float32
    assert actual.shape == preprocessing.input_shape == tuple(configuration["input_size"])
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (1, (8, 8))])
def test_images_of_the_networks_size_are_not_resampled(channels, size):
    preprocessing = Preprocessing(size=size, mean=(0.4,) * channels, std=(0.2,) * channels)
    pixels = RNG.randint(0, 256, (*size, channels), dtype=np.uint8)
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.4) / 0.2
    torch.testing.assert_close(preprocessing(pixels), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(preprocessing(pixels), preprocessing(Image.fromarray(pixels.squeeze())))


def test_colours_follow_the_networks_channels():
    grey = RNG.randint(0, 256, (8, 8), dtype=np.uint8)
    colour = Preprocessing(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1))(grey)
    assert torch.equal(colour[0], colour[2])
    assert torch.equal(Preprocessing(size=(8, 8), mean=(0,), std=(1,))(np.stack([grey] * 3, -1)), colour[:1])


def test_overrides_replace_the_networks_configuration():
    configuration = timm.create_model("resnet18").pretrained_cfg
    preprocessing = Preprocessing.resolve(
        configuration, 3, size=(64, 96), mean=0.5, std=[0.1, 0.2, 0.3], crop=0.9, interpolation="nearest"
    )
    assert preprocessing == Preprocessing(
        size=(64, 96), mean=(0.5,) * 3, std=(0.1, 0.2, 0.3), crop=0.9, interpolation="nearest"
    )
    assert Preprocessing.resolve(configuration, 3, size=48).size == (48, 48)
    assert preprocessing(rgb(80, 120)).shape == (3, 64, 96)


def test_without_a_configuration_it_is_timms_default():
    preprocessing = Preprocessing.resolve(None, 3)
    assert preprocessing.size == (224, 224)
    assert preprocessing.mean == (0.485, 0.456, 0.406)
    assert preprocessing.crop == 0.875
    # Whoever says the size means the whole image.
    assert Preprocessing.resolve(None, 3, size=32).crop == 1.0
    assert Preprocessing.resolve(None, 3, size=32, crop=0.9).crop == 0.9


def test_json_returns_the_same_value():
    preprocessing = Preprocessing(
        size=(64, 96), mean=(0.1,), std=(0.2,), crop=0.9, interpolation="bilinear", crop_mode="squash"
    )
    assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"size": 0}, r"input size is a height and a width in pixels, both at least 1, not \(0, 0\)"),
        (
            {"mean": (0.1, 0.2)},
            r"has 3 channels, but --mean has the values \(0\.1, 0\.2\); pass --mean with one value or 3",
        ),
        ({"std": 0}, r"--std positive: got"),
        ({"mean": float("nan")}, r"--mean must be finite"),
        ({"crop": 1.5}, r"--crop is the share of the resized image to keep, in \(0, 1\], not 1\.5"),
        ({"crop": 0}, r"--crop is the share"),
        ({"interpolation": "bicubik"}, r"Unknown interpolation 'bicubik'\. Did you mean 'bicubic'\?"),
    ],
)
def test_bad_overrides_are_named(overrides, message):
    with pytest.raises(ModelError, match=message):
        Preprocessing.resolve(None, 3, **overrides)


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(ModelError, match="Images have 1 or 3 channels, not 4"):
        Preprocessing(size=(8, 8), mean=(0.5,) * 4, std=(0.5,) * 4)
    with pytest.raises(ModelError, match="as many values of --mean as of --std"):
        Preprocessing(size=(8, 8), mean=(0.5,), std=(0.5,) * 3)
