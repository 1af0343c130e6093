import os

import pytest
import safetensors
import safetensors.torch
import torch

from objectives.canonization import canonize
from objectives.elastic.files import Origin, load_elastic, save_elastic
from objectives.elastic.model import ElasticModel
from objectives.errors import ModelError, SlimFileError


@pytest.mark.parametrize("name", ["branches", "cifar_resnet20"])
def test_a_file_is_read_back_bit_for_bit(elastic, tmp_path, name):
    subject, path = elastic(name), tmp_path / "elastic.safetensors"
    model = ElasticModel(subject.canonical, subject.masks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)  # as training would
    model.set_level(2)
    save_elastic(model, path)
    assert os.listdir(tmp_path) == [path.name]
    assert path.stat().st_size < 1.1 * sum(value.nbytes for value in model.state_dict().values()) + 50_000
    loaded = load_elastic(path, subject.canonical)
    assert loaded.level == 0
    assert loaded.n_levels == 4
    for level in range(4):
        assert torch.equal(loaded.at(level)(subject.images), model.at(level)(subject.images))
        for layer, mask in model.masks[level].items():
            assert torch.equal(loaded.masks[level][layer], mask)


def test_a_file_that_names_its_network_is_enough(elastic, tmp_path):
    subject, path = elastic("cifar_resnet20"), tmp_path / "elastic.safetensors"
    canonical = canonize(subject.network, (3, 32, 32), classes=[1, 4, 7])
    model = ElasticModel(canonical, subject.masks)
    named = {"name": "cifar_resnet20", "options": {}, "num_classes": 10}
    save_elastic(model, path, Origin(model=named, input_shape=(3, 32, 32), classes=(1, 4, 7)))
    for loaded in (load_elastic(path), load_elastic(path, subject.network)):
        dtype = next(loaded.parameters()).dtype
        for level in range(4):
            found, expected = loaded.at(level)(subject.images.to(dtype)), model.at(level)(subject.images)
            tolerance = 1e-9 if dtype == expected.dtype else 1e-4
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * 100)


def test_who_loads_must_bring_a_network_that_the_file_does_not_name(elastic, tmp_path):
    subject, path = elastic("branches"), tmp_path / "elastic.safetensors"
    model = ElasticModel(subject.canonical, subject.masks)
    save_elastic(model, path)
    with pytest.raises(ModelError, match="doesn't say what network it was made from; pass its canonical form"):
        load_elastic(path)
    named = {"name": "mine.models:build", "options": {}, "num_classes": 5}
    save_elastic(model, path, Origin(model=named, input_shape=(3, 6, 6)))
    with pytest.raises(ModelError, match="elastic network was made from 'mine\\.models:build'; pass a network of"):
        load_elastic(path)
    assert torch.equal(load_elastic(path, subject.network)(subject.images), model(subject.images))
    content = safetensors.torch.save(model.network.state_dict(), {"format": "pruning-hpo/elastic/1", "origin": "{}"})
    path.write_bytes(content)
    with pytest.raises(SlimFileError, match="is damaged: its origin can't be read"):
        load_elastic(path)


def test_a_file_of_another_network_is_refused(elastic, tmp_path):
    subject, path = elastic("branches"), tmp_path / "elastic.safetensors"
    save_elastic(ElasticModel(subject.canonical, subject.masks), path)
    with pytest.raises(SlimFileError, match="made for a network without the 16 components of 'conv1'"):
        load_elastic(path, elastic("cifar_resnet20").canonical)
    with pytest.raises(SlimFileError, match="doesn't hold weights of this network"):
        load_elastic(path, canonize(subject.network, (3, 6, 6), classes=[0, 1]))


@pytest.mark.parametrize("content", [b"", b"damaged", safetensors.torch.save({"x": torch.zeros(1)})])
def test_what_is_no_elastic_network_is_refused(elastic, tmp_path, content):
    path = tmp_path / "elastic.safetensors"
    path.write_bytes(content)
    with pytest.raises(SlimFileError, match=r"can't be read|holds no elastic network of format pruning-hpo/elastic/1"):
        load_elastic(path, elastic("branches").canonical)


@pytest.mark.parametrize(
    "damage", [{"kept": None}, {"kept": "[["}, {"kept": '[{"elsewhere": [0]}]'}, {"widths": "{"}], ids=str
)
def test_a_damaged_file_says_so(elastic, tmp_path, damage):
    subject, path = elastic("branches"), tmp_path / "elastic.safetensors"
    save_elastic(ElasticModel(subject.canonical, subject.masks), path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in (file.metadata() | damage).items() if value is not None}
    path.write_bytes(safetensors.torch.save(safetensors.torch.load_file(path), metadata=metadata))
    with pytest.raises(SlimFileError, match="is damaged: its "):
        load_elastic(path, subject.canonical)


def test_a_file_that_cannot_be_written_says_so(elastic, tmp_path):
    subject = elastic("branches")
    with pytest.raises(SlimFileError, match=r"can't be written .*; make room or choose another path"):
        save_elastic(ElasticModel(subject.canonical, subject.masks), tmp_path / "no such directory" / "file")
