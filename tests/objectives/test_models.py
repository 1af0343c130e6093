import logging
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

from objectives.errors import CheckpointMismatchError, ModelError
from objectives.fingerprints import state_fingerprint
from objectives.models import load_model

FACTORY = """
import torch
from torch import nn
from sibling_of_{name} import WIDTH

def build(width=WIDTH, num_classes=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)
    )

def double():
    return build().double()

def text():
    return "network"

def failing():
    raise RuntimeError("no GPU\\nat all")

def images():
    return nn.Conv2d(3, 3, 1)

def infinite():
    network = build()
    nn.init.constant_(network[4].bias, float("inf"))
    return network

def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))

def picky():
    return nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2 * 16 * 16, 5))

NUMBER = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Name of a module with factories in the working directory, another for each test."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FACTORY.format(name=name))
    (tmp_path / f"sibling_of_{name}.py").write_text("WIDTH = 4")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return name


@pytest.fixture
def resnet20_file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "resnet20.safetensors"
    save_file(timm.create_model("cifar_resnet20").state_dict(), path)
    return path


def test_a_loaded_model_is_complete(resnet20_file):
    model = load_model("cifar_resnet20", checkpoint=resnet20_file)
    assert model.name == "cifar_resnet20"
    assert model.num_classes == 10
    assert model.label_names[3] == "cat"
    assert model.label_ids is None
    assert model.checkpoint == str(resnet20_file)
    assert model.options == {}
    assert not any(module.training for module in model.network.modules())
    assert model.fingerprint == state_fingerprint(model.network.state_dict())


def test_the_digits_network_comes_trained():
    model = load_model("digits_cnn")
    assert model.checkpoint is None
    assert model.preprocessing.input_shape == (1, 8, 8)
    assert model.label_names == tuple("0123456789")
    assert model.fingerprint == load_model("digits_cnn").fingerprint


def test_overrides_reach_the_preprocessing(resnet20_file):
    model = load_model(
        "cifar_resnet20", checkpoint=resnet20_file, size=40, mean=0.5, std=0.25, crop=0.8, interpolation="bilinear"
    )
    preprocessing = model.preprocessing
    assert (preprocessing.size, preprocessing.mean, preprocessing.std) == ((40, 40), (0.5,) * 3, (0.25,) * 3)
    assert (preprocessing.crop, preprocessing.interpolation) == (0.8, "bilinear")


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "vgg11_bn", "regnety_002"])
def test_outputs_follow_the_checkpoints_head(tmp_path, name):
    torch.manual_seed(0)
    save_file(timm.create_model(name, num_classes=7).state_dict(), tmp_path / "tuned.safetensors")
    model = load_model(name, checkpoint=tmp_path / "tuned.safetensors", size=64)
    assert model.num_classes == 7
    assert model.label_names is None


def test_imagenet_networks_know_their_labels(tmp_path):
    save_file(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "w.safetensors")
    model = load_model("mobilenetv3_small_050", checkpoint=tmp_path / "w.safetensors", size=64)
    assert (model.label_names[0], model.label_ids[0]) == ("tench, Tinca tinca", "n01440764")


def test_given_outputs_beat_the_checkpoints(resnet20_file):
    with pytest.raises(CheckpointMismatchError, match=r"'linear.weight' is \(10, 64\), not \(5, 64\)"):
        load_model("cifar_resnet20", checkpoint=resnet20_file, options={"num_classes": 5})


def test_a_checkpoint_of_another_network_is_refused(resnet20_file):
    with pytest.raises(
        CheckpointMismatchError, match=r"doesn't fit the network CifarResNet: missing keys: 'layer1\.3\."
    ):
        load_model("cifar_resnet32", checkpoint=resnet20_file)


def test_options_reach_timm(data_pack):
    model = load_model(
        "mobilenetv2_100",
        checkpoint=data_pack / "weights" / "imagenet_mobilenetv2_100_qat.safetensors",
        options={"pad_type": "same"},
        mean=0.5,
        std=0.5,
    )
    assert model.options == {"pad_type": "same"}
    assert type(model.network.conv_stem).__name__ == "Conv2dSame"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet81",
            r"Unknown model 'resnet81': it is no timm model, and your own is written .* Did you mean .*'resnet18'",
        ),
        ("resnet18.a4_in1k", r"Unknown model 'resnet18\.a4_in1k'\. Did you mean 'resnet18\.a[123]_in1k'\?"),
        ("", "Unknown model ''"),
        ("cifar_resnet20", r"'cifar_resnet20' comes without weights; pass yours with --checkpoint FILE"),
        ("resnet18", r"'resnet18' can't be loaded: .*; pass --checkpoint FILE"),
    ],
)
def test_models_that_cannot_be_had_are_named(name, message, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=message) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_options_that_timm_refuses_are_named(resnet20_file):
    with pytest.raises(ModelError, match=r"can't be built with the options \{'widht': 2.*widht.*check --model-option"):
        load_model("cifar_resnet20", checkpoint=resnet20_file, options={"widht": 2})


def test_a_factory_lies_in_the_working_directory(own, caplog):
    model = load_model(f"{own}:build", options={"width": 6}, size=16)
    assert model.network[0].out_channels == 6
    assert model.options == {"width": 6}
    assert (model.num_classes, model.label_names, model.checkpoint) == (3, None, None)
    assert "has no `pretrained_cfg`" in caplog.text


def test_a_factory_needs_no_hint_when_all_is_given(own, caplog):
    caplog.set_level(logging.WARNING)
    load_model(f"{own}:build", size=16, mean=0.5, std=0.5)
    assert not caplog.text


def test_a_factorys_network_takes_a_checkpoint(own, tmp_path):
    weights = load_model(f"{own}:build", size=16).network.state_dict()
    torch.save({"state_dict": {f"module.{key}": value + 1 for key, value in weights.items()}}, tmp_path / "w.pt")
    model = load_model(f"{own}:build", checkpoint=tmp_path / "w.pt", size=16)
    assert torch.equal(model.network[0].weight, weights["0.weight"] + 1)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("biuld", r"has no object 'biuld' \(Did you mean 'build'\?"),
        ("NUMBER", r"is a int; name a callable that returns the network"),
        ("text", r"returned a str; it must return a torch\.nn\.Module"),
        ("failing", r"failed with the options \{\}: RuntimeError: no GPU; check --model-option"),
        ("double", r"The parameter '0\.weight' of '.*' is torch\.float64; call `\.float\(\)` on the network"),
        ("images", r"returns an output of shape \(2, 3, 16, 16\) for 2 images; it must return logits"),
        ("infinite", r"returns logits that aren't finite; check the weights"),
        ("dense", r"has no torch\.nn\.Conv2d; pass an image classifier"),
    ],
)
def test_bad_factories_are_named(own, attribute, message):
    with pytest.raises(ModelError, match=message) as caught:
        load_model(f"{own}:{attribute}", size=16)
    assert "\n" not in str(caught.value)


def test_a_factory_is_not_imported_where_imports_are_not_allowed(own):
    with pytest.raises(ModelError, match="is not imported from here; pass it as `--model`"):
        load_model(f"{own}:build", size=16, allow_imports=False)
    assert own not in sys.modules


def test_an_input_size_that_does_not_fit_is_named(own):
    assert load_model(f"{own}:picky", size=16).num_classes == 5
    with pytest.raises(ModelError, match=r"can't take images of shape \(3, 224, 224\): .*; pass its --size"):
        load_model(f"{own}:picky")


def test_a_module_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match=r"'nowhere\.networks:build' can't be imported: .*\(ModuleNotFoundError: .*nowhere"
    ):
        load_model("nowhere.networks:build")
