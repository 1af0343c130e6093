import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from random_ranking import random_ranking
from torch import nn

from objectives.canonization import canonize
from objectives.errors import CheckpointMismatchError, ModelError, SlimFileError, UnsupportedNetworkError
from objectives.memory import Batches
from objectives.pruning.masking import masked
from objectives.pruning.slim_files import (
    check_output,
    load_coupled,
    load_slim,
    new_directory,
    write_program,
    write_state,
    write_weights,
)
from objectives.pruning.slimming import slim
from objectives.pruning.structured import prune_coupled
from objectives.repair.repairer import Repairer, with_layers
from search_spaces.documents import CompositeDocument
from search_spaces.heuristics import HEURISTICS
from search_spaces.repairs import RepairSpec

NETWORKS = ["cifar_resnet20", "mobilenetv3_small_100"]
SIZE = 256 * 1024


def _network(name, seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=10, **options).eval().requires_grad_(False)


def _document(name, canonical, **model):
    return CompositeDocument(
        composite=HEURISTICS["epsilon-abs"],
        layer_groups=dict.fromkeys(canonical.layers, "LLR"),
        abs_scope="sum",
        output_relevance="one",
        rates=(0.0, 0.5),
        preprocessing={"size": [32, 32], "mean": [0.5] * 3, "std": [0.25] * 3},
        references={"per_class": 10, "seed": 0, "sha256": "0" * 64, "source": "npz"},
        model={
            "name": name,
            "fingerprint": "f",
            "num_classes": 10,
            "component_widths": canonical.components,
            **model,
        },
        data={"source": "npz", "fingerprint": "f", "classes": list(range(10))},
        versions={},
    )


def _images(n=7):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small_disk(mount_disk):
    return mount_disk(SIZE)


ALONE = """
import json, sys
import torch
images = torch.load("images.pt")
for name in sys.argv[1:]:
    network = torch.export.load(f"{name}.pt2").module()
    torch.save([network(images[:n]) for n in (1, 7)], f"{name}.logits")
ours = ("hpo", "objectives", "search_spaces", "storage", "timm", "zennit")
print(json.dumps(sorted(name for name in sys.modules if name.partition(".")[0] in ours)))
"""


def test_programs_run_without_this_product(tmp_path):
    expected = {}
    for name in NETWORKS:
        network = _network(name)
        canonical = canonize(network, (3, 32, 32))
        masks = random_ranking(canonical).masks(sum(canonical.components.values()) // 2)
        write_program(slim(canonical, masks), canonical.input_shape, tmp_path / f"{name}.pt2")
        with masked(network, canonical.prunable, masks):
            expected[name] = network(_images())
    torch.save(_images(), tmp_path / "images.pt")
    # Isolated: neither this directory nor PYTHONPATH is searched.
    command = [sys.executable, "-I", "-c", ALONE, *NETWORKS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    for name, rows in expected.items():
        one, seven = torch.load(tmp_path / f"{name}.logits")
        bound = 1e-4 * float(rows.abs().max())
        torch.testing.assert_close(one, rows[:1], rtol=1e-4, atol=bound)
        torch.testing.assert_close(seven, rows, rtol=1e-4, atol=bound)


@pytest.mark.parametrize("n_pruned", ["none", "some", "all"])
def test_programs_of_every_size(tmp_path, n_pruned):
    network = _network("cifar_resnet20")
    canonical = canonize(network, (3, 32, 32))
    masks = random_ranking(canonical).masks({"none": 0, "some": 650, "all": 688}[n_pruned])
    module = slim(canonical, masks)
    write_program(module, canonical.input_shape, tmp_path / "slim.pt2")
    loaded = torch.export.load(tmp_path / "slim.pt2").module()
    for n in (1, 7):
        torch.testing.assert_close(loaded(_images(n)), module(_images(n)))


@pytest.mark.parametrize(("name", "classes"), [("cifar_resnet20", None), ("regnety_002", (7, 2, 5))])
def test_weights_come_back(tmp_path, name, classes):
    canonical = canonize(_network(name), (3, 32, 32), classes)
    masks = random_ranking(canonical).masks(sum(canonical.components.values()) // 2)
    module = slim(canonical, masks)
    path = tmp_path / "slim.safetensors"
    document = _document(name, canonical)
    write_weights(module, masks, document, classes, path)
    for loaded in (load_slim(path), load_slim(str(path), _network(name, seed=9))):
        assert torch.equal(loaded(_images()), module(_images()))
        assert not loaded.training
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert CompositeDocument.from_json(json.loads(metadata["document"])) == document
    kept = json.loads(metadata["kept"])
    assert {layer: len(indices) for layer, indices in kept.items()} == {n: int(m.sum()) for n, m in masks.items()}


@pytest.mark.parametrize("all_of_a_layer", [False, True])
def test_repaired_weights_come_back_with_biases_that_were_not_there(tmp_path, all_of_a_layer):
    def build():
        return nn.Sequential(
            *(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10, bias=False)),
        ).eval()

    torch.manual_seed(0)
    canonical = canonize(build(), (3, 32, 32))
    masks = random_ranking(canonical).masks(6)
    if all_of_a_layer:
        masks["0"][:] = False
    repair = RepairSpec("refit", 0.1)
    layers = Repairer(canonical, _images(), Batches("a test", 4)).layers(masks, repair)
    module = slim(with_layers(canonical, layers), masks)
    document, path = _document("own:build", canonical), tmp_path / "slim.safetensors"
    write_weights(module, masks, document, None, path, repair, layers)
    assert torch.equal(load_slim(path, build())(_images()), module(_images()))
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["repair"]) == {"method": "refit", "strength": 0.1}
    assert set(json.loads(metadata["repaired"])) == {"2", "6"}


def test_options_of_the_model_are_used(tmp_path):
    network = _network("mobilenetv3_small_100", act_layer="relu")
    canonical = canonize(network, (3, 32, 32))
    masks = random_ranking(canonical).masks(3000)
    module = slim(canonical, masks)
    path = tmp_path / "slim.safetensors"
    write_weights(
        module, masks, _document("mobilenetv3_small_100", canonical, options={"act_layer": "relu"}), None, path
    )
    assert torch.equal(load_slim(path)(_images()), module(_images()))


def test_a_network_of_ones_own_class_is_passed_and_left_alone(tmp_path):
    class Own(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    network = Own().eval()
    canonical = canonize(network, (3, 32, 32))
    masks = random_ranking(canonical).masks(2)
    module = slim(canonical, masks)
    path = tmp_path / "slim.safetensors"
    write_weights(module, masks, _document("os:system", canonical), None, path)
    with pytest.raises(ModelError, match="made from 'os:system'; pass a network of that class"):
        load_slim(path)
    other = Own().eval()
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert torch.equal(load_slim(path, other)(_images()), module(_images()))
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(UnsupportedNetworkError, match="layer '0' has 4 components; this one has no such layer"):
        load_slim(path, _network("cifar_resnet20"))
    write_weights(module, masks, _document("resnet_no_such", canonical), None, path)
    with pytest.raises(ModelError, match="'resnet_no_such' can't be built"):
        load_slim(path)


def test_a_network_of_other_outputs_is_refused(tmp_path):
    canonical = canonize(_network("cifar_resnet20"), (3, 32, 32))
    masks = random_ranking(canonical).masks(100)
    path = tmp_path / "slim.safetensors"
    other = timm.create_model("cifar_resnet20", num_classes=7).eval()
    for classes in (None, (0, 3)):
        restricted = canonize(_network("cifar_resnet20"), (3, 32, 32), classes)
        write_weights(slim(restricted, masks), masks, _document("cifar_resnet20", canonical), classes, path)
        with pytest.raises(UnsupportedNetworkError, match="has 10 outputs; this one has 7"):
            load_slim(path, other)


def test_a_slim_transformer_needs_a_transformer(tmp_path):
    network = _network("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=4, num_heads=3)
    canonical = canonize(network, (3, 32, 32)).choosing("heads")
    masks, path = random_ranking(canonical).masks(2), tmp_path / "slim.safetensors"
    document = replace(_document("vit_tiny_patch16_224", canonical), components="heads")
    write_weights(slim(canonical, masks), masks, document, None, path)
    with pytest.raises(UnsupportedNetworkError, match=r"^The document was made for a vision transformer's heads; this"):
        load_slim(path, _network("cifar_resnet20"))


def test_weights_of_another_slim_network_are_refused(tmp_path):
    canonical = canonize(_network("cifar_resnet20"), (3, 32, 32))
    few, many = (random_ranking(canonical).masks(n) for n in (10, 100))
    path = tmp_path / "slim.safetensors"
    write_weights(slim(canonical, few), many, _document("cifar_resnet20", canonical), None, path)
    with pytest.raises(SlimFileError, match="doesn't hold the weights of its own document's network") as caught:
        load_slim(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_slim_networks(tmp_path):
    with pytest.raises(SlimFileError, match="can't be read"):
        load_slim(tmp_path / "no_such_file")
    (tmp_path / "text").write_text("text")
    with pytest.raises(SlimFileError, match="can't be read") as caught:
        load_slim(tmp_path / "text")
    assert "\n" not in str(caught.value)
    write_state(nn.Linear(2, 2), tmp_path / "plain")
    with pytest.raises(
        SlimFileError, match="holds no slim network of format pruning-hpo/slim/1; `hpo prune` writes one"
    ):
        load_slim(tmp_path / "plain")
    with pytest.raises(SlimFileError, match="can't be read"):
        load_coupled(tmp_path / "text", nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["resnet18", "regnety_002"])
def test_a_coupled_network_comes_back(tmp_path, name):
    network = _network(name)
    canonical = canonize(network, (3, 32, 32))
    generator = torch.Generator().manual_seed(0)
    scores = {layer: torch.rand(n, generator=generator) for layer, n in canonical.components.items()}
    result = prune_coupled(network, canonical, scores, sum(scores[layer].numel() for layer in scores) // 2)
    path = tmp_path / "coupled.safetensors"
    write_state(result.network, path)
    fresh = _network(name, seed=9)
    loaded = load_coupled(path, fresh)
    assert loaded is fresh
    assert torch.equal(loaded(_images()), result.network(_images()))
    assert canonize(loaded, (3, 32, 32)).components == result.widths
    for module in loaded.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
    with pytest.raises(CheckpointMismatchError, match="doesn't fit CifarResNet: only one of them has"):
        load_coupled(path, _network("cifar_resnet20"))


def test_a_directory_appears_whole(tmp_path):
    target = tmp_path / "new" / "slim"
    with new_directory(target) as directory:
        (directory / "file").write_text("x")
        assert not target.parent.exists()
    assert [path.name for path in target.iterdir()] == ["file"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_empty_directory_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("slim").mkdir()
    with new_directory(Path("slim")) as directory:
        (directory / "file").write_text("x")
    assert [path.name for path in (tmp_path / "slim").iterdir()] == ["file"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_block_that_fails(tmp_path, error):
    def fail():
        with new_directory(tmp_path / "new" / "slim") as directory:
            (directory / "file").write_text("x")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == []


def _enter(target):
    with new_directory(target):
        raise AssertionError


@pytest.mark.parametrize("enter", [_enter, check_output])
def test_what_exists_is_never_overwritten(tmp_path, enter):
    (tmp_path / "slim").mkdir()
    (tmp_path / "slim" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for target, message in (
        (tmp_path / "slim", "already exists; choose another directory or remove it"),
        (tmp_path / "file", "already exists"),
        (tmp_path / "file" / "slim", "can't be written"),
    ):
        with pytest.raises(SlimFileError, match=message) as caught:
            enter(target)
        assert "\n" not in str(caught.value)
        assert str(target) in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "slim"]


def _fill(disk):
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", ["program", "weights", "text"])
def test_a_full_disk_is_one_clear_error(small_disk, kind, full):
    """Full at once, or after the first part of a file; torch's own writer would end the process."""
    network = _network("cifar_resnet20")
    canonical = canonize(network, (3, 32, 32))
    if full:
        _fill(small_disk)
    before = sorted(small_disk.iterdir())

    def write():
        with new_directory(small_disk / "deep" / "slim") as directory:
            if kind == "program":
                write_program(canonical.module, canonical.input_shape, directory / "slim.pt2")
            elif kind == "weights":
                write_state(network, directory / "slim.safetensors")
            else:
                (directory / "report.json").write_text("x" * 2 * SIZE)

    with pytest.raises(SlimFileError) as caught:
        write()
    reason = "can't be written (No space left on device); make room or choose another path."
    assert str(caught.value) == f"{str(small_disk / 'deep' / 'slim')!r} {reason}"
    assert sorted(small_disk.iterdir()) == before
