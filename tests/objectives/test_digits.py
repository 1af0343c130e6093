import logging

import numpy as np
import pytest
import torch

from objectives.datasets.digits import digits_data
from objectives.digits import DigitsCNN, Recipe, digits_cnn, train, trained_weights

QUICK = Recipe(n_epochs=1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_split_is_fixed_and_has_each_image_once():
    data = digits_data()
    assert data.train_images.shape == (1000, 8, 8)
    assert data.evaluation_images.shape == (797, 8, 8)
    assert data.train_images.dtype == np.uint8
    assert (data.train_images.max(), data.train_images.min()) == (255, 0)
    assert np.bincount(data.train_labels).tolist() == [100] * 10
    both = np.concatenate([data.train_images, data.evaluation_images]).reshape(1797, 64)
    assert len(np.unique(both, axis=0)) == 1797


def test_the_trained_network_recognises_digits_it_never_saw():
    data = digits_data()
    network = digits_cnn(pretrained=True).eval()
    configuration = network.pretrained_cfg
    images = torch.from_numpy(data.evaluation_images)[:, None] / 255
    with torch.inference_mode():
        predicted = network((images - configuration["mean"][0]) / configuration["std"][0]).argmax(1)
    assert (predicted == torch.from_numpy(data.evaluation_labels)).double().mean() >= 0.97


def test_normalisation_is_that_of_the_images():
    data = digits_data()
    pixels = np.concatenate([data.train_images, data.evaluation_images]) / 255
    configuration = digits_cnn().pretrained_cfg
    assert configuration["mean"][0] == pytest.approx(pixels.mean(), abs=1e-4)
    assert configuration["std"][0] == pytest.approx(pixels.std(), abs=1e-4)


def test_it_has_enough_filters_to_prune():
    convolutions = [module for module in DigitsCNN().modules() if isinstance(module, torch.nn.Conv2d)]
    assert (len(convolutions), sum(module.out_channels for module in convolutions)) == (9, 336)


def test_training_depends_on_the_recipe_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    n_threads = torch.get_num_threads()
    first = train(QUICK).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == n_threads
    torch.manual_seed(8)
    second = train(QUICK).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_weights_are_kept_and_read_again(cache, caplog):
    caplog.set_level(logging.INFO)
    first = trained_weights(QUICK)
    assert "training digits_cnn" in caplog.text
    caplog.clear()
    second = trained_weights(QUICK)
    assert not caplog.text
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert [path.name for path in cache.iterdir()] == [f"digits_cnn-{QUICK.fingerprint[:16]}.safetensors"]


def test_another_recipe_has_another_file(cache):
    trained_weights(QUICK)
    trained_weights(Recipe(n_epochs=1, seed=1))
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_a_damaged_file_is_trained_anew(cache, caplog, content):
    weights = trained_weights(QUICK)
    (path,) = cache.iterdir()
    path.write_bytes(content)
    again = trained_weights(QUICK)
    assert "can't be read" in caplog.text
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert path.stat().st_size > 1000


def test_without_a_cache_it_is_trained_each_time(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HPO_CACHE", str(tmp_path / "file" / "cache"))
    assert "fc.weight" in trained_weights(QUICK)
    assert "can't be kept" in caplog.text
