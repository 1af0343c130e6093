import io
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from objectives.datasets import SOURCES, SourcePair, load_task
from objectives.datasets.sources import ArraySource
from objectives.errors import DataError
from objectives.models import load_model
from search_spaces.imports import DATA_SCHEMES


@pytest.fixture(scope="module")
def model():
    return load_model("digits_cnn")


def images(seed, n_images=60):
    pixels = np.random.RandomState(seed).randint(0, 256, (n_images, 8, 8), dtype=np.uint8)
    return ArraySource(pixels, np.arange(n_images) % 3, f"images{seed}")


def pair(train=None, evaluation=None):
    return SourcePair(train or images(0), evaluation or images(1))


def test_the_registered_sources_are_known():
    assert sorted(SOURCES) == ["digits", "domains", "folder", "npz", "timm"]


def test_digits_have_no_files(model):
    task = load_task("digits", model)
    assert (len(task.references), len(task.search), len(task.confirmation)) == (100, 399, 398)
    assert task.references.labels.tolist() == np.repeat(np.arange(10), 10).tolist()
    assert task.classes == tuple(range(10))
    assert task.class_names == model.label_names
    assert task.source == "digits"
    assert task.preprocessing is model.preprocessing
    with torch.inference_mode():
        accuracy = (model.network(task.search.images).argmax(1) == task.search.labels).double().mean()
    assert accuracy > 0.97


def test_digits_take_no_argument(model):
    with pytest.raises(DataError, match="`digits` takes no argument, but got 'all'"):
        load_task("digits:all", model)


@pytest.mark.parametrize("source", ["digist", "floder:/DIR", "", "folder DIR"])
def test_unknown_data_is_named(model, source):
    with pytest.raises(
        DataError, match=f"Unknown data '{source}'; write NAME or NAME:ARGUMENT.* Known: digits, domains, folder"
    ):
        load_task(source, model)


def test_unknown_data_in_the_form_of_an_import_is_named(model):
    with pytest.raises(
        DataError, match=r"'floder:DIR' can't be imported.* Did you mean 'folder'\? Known: digits, domains, folder"
    ):
        load_task("floder:DIR", model)


def test_the_schemes_that_are_no_imports_are_the_registered_sources():
    assert sorted(SOURCES) == sorted(DATA_SCHEMES)


def test_code_is_not_run_where_imports_are_not_allowed(model, tmp_path, monkeypatch):
    (tmp_path / "own_marker.py").write_text("open('PWNED', 'w').close()")
    monkeypatch.chdir(tmp_path)
    for source in ("own_marker:data", "timm:hfds/x?trust_remote_code=true"):
        with pytest.raises(DataError, match="are not opened from here; pass them as `--data`"):
            load_task(source, model, allow_imports=False)
    assert not (tmp_path / "PWNED").exists()


def test_images_are_prepared_in_order(model):
    train = images(0)
    task = load_task(pair(train), model, references_per_class=2)
    expected = torch.stack([model.preprocessing(train.image(index)) for index in task.reference_indices])
    assert torch.equal(task.references.images, expected)
    assert task.references.images.dtype == torch.float32
    assert task.references.labels.dtype == torch.int64
    assert train.labels[list(task.reference_indices)].tolist() == task.references.labels.tolist()


def test_first_takes_the_sources_order(model):
    task = load_task(pair(), model, references_per_class=2, sample="first")
    assert task.reference_indices == (0, 3, 1, 4, 2, 5)


def test_classes_are_selected_and_indexed_anew(model):
    task = load_task(pair(), model, classes=["2", "0"], references_per_class=3)
    assert task.classes == (0, 2)
    assert task.class_names == ("0", "2")
    assert task.references.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(task.search) + len(task.confirmation) == 40
    full = load_task(pair(), model, references_per_class=3)
    assert torch.equal(task.references.images, full.references.images[[0, 1, 2, 6, 7, 8]])


def test_confirmation_may_be_empty(model):
    task = load_task(pair(), model, confirmation_share=0, references_per_class=1)
    assert len(task.confirmation) == 0
    assert task.confirmation.images.shape == (0, 1, 8, 8)


def test_images_move_to_a_dtype(model):
    moved = load_task(pair(), model, references_per_class=1).search.to("cpu", torch.float64)
    assert moved.images.dtype == torch.float64
    assert moved.labels.dtype == torch.int64


def test_only_selected_images_are_decoded(model):
    class Counting(ArraySource):
        asked = []  # noqa: RUF012

        def image(self, index):
            self.asked.append(index)
            return self.pixels[index]

    evaluation = Counting(images(1).pixels, images(1).labels, "counting")
    task = load_task(pair(None, evaluation), model, references_per_class=1, evaluation_images=5, confirmation_share=0.2)
    assert len(task.search) == 5
    assert len(Counting.asked) == len(set(Counting.asked)) == 17


def test_the_fingerprint_is_that_of_the_selection(model):
    def fingerprint(source=None, **options):
        return load_task(source or pair(), model, **({"references_per_class": 2} | options)).fingerprint

    base = fingerprint()
    assert fingerprint() == base
    changed = images(1)
    changed.pixels[7] ^= 1
    others = [
        fingerprint(pair(None, changed)),
        fingerprint(seed=1),
        fingerprint(references_per_class=3),
        fingerprint(confirmation_share=0.4),
        fingerprint(evaluation_images=20),
        fingerprint(classes=[0, 1, 2]),
    ]
    assert len({base, *others}) == 7


def test_a_reference_that_is_evaluated_on_is_refused(model):
    train, evaluation = images(0), images(1)
    evaluation.pixels[33] = train.pixels[4]
    with pytest.raises(DataError) as caught:
        load_task(pair(train, evaluation), model, references_per_class=20)
    assert str(caught.value) == (
        "The reference image images0[4] is also the evaluation image images1[33] (1 such); "
        "remove it from one side, or draw other references by --seed."
    )
    task = load_task(pair(train, evaluation), model, references_per_class=1, sample="first")
    assert task.reference_indices == (0, 1, 2)


@pytest.mark.parametrize("part", ["search", "confirmation"])
def test_both_evaluated_parts_are_compared(model, part):
    train, evaluation = images(0), images(1)
    split = load_task(pair(train, evaluation), model, references_per_class=1)
    pixels = getattr(split, part).images[0]
    index = next(i for i in range(60) if torch.equal(model.preprocessing(evaluation.image(i)), pixels))
    evaluation.pixels[index] = train.pixels[split.reference_indices[0]]
    with pytest.raises(DataError, match=rf"is also the evaluation image images1\[{index}\]"):
        load_task(pair(train, evaluation), model, references_per_class=1)


def test_one_source_for_both_is_refused(model):
    source = images(0)
    with pytest.raises(DataError, match="references and evaluation images come from one source"):
        load_task(SourcePair(source, source), model)


def test_images_in_both_evaluated_parts_are_told(model, caplog):
    evaluation = images(1)
    evaluation.pixels[:] = evaluation.pixels[:1]
    load_task(pair(None, evaluation), model, references_per_class=1)
    assert "1 images are both searched on and confirmed with" in caplog.text


def test_a_label_out_of_range_is_named(model):
    train = images(0)
    train.labels[5] = 10
    with pytest.raises(
        DataError, match=r"have the label 10 \(image images0\[5\]\), but the network's outputs are 0 to 9"
    ):
        load_task(pair(train), model)


@pytest.mark.parametrize("labels", [np.zeros((60, 2), dtype=int), np.zeros(60), np.zeros(0, dtype=int)])
def test_labels_of_another_form_are_refused(model, labels):
    with pytest.raises(
        DataError, match=r"The training images of ArraySource have labels of .*; give integers of shape"
    ):
        load_task(pair(ArraySource(images(0).pixels, labels, "x")), model)


def test_more_images_than_memory_are_refused(model):
    large = replace(model, preprocessing=replace(model.preprocessing, size=(2**20, 2**20)))
    with pytest.raises(
        DataError, match=r"63 images of \(1, 1048576, 1048576\) take .* GiB, but the machine has .* GiB"
    ):
        load_task(pair(), large, references_per_class=1)


def folder(root, n_images=4, shape=(9, 8, 3)):
    random = np.random.RandomState(0)
    for split in ("train", "val"):
        for name in ("3", "5"):
            (root / split / name).mkdir(parents=True)
            for number in range(n_images):
                pixels = random.randint(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def test_folders_are_read(model, tmp_path):
    task = load_task(f"folder:{folder(tmp_path)}", model, references_per_class=2)
    assert task.classes == tuple(range(10))
    assert task.references.labels.tolist() == [3, 3, 5, 5]
    restricted = load_task(f"folder:{tmp_path}", model, references_per_class=2, classes=["5", "3"])
    assert restricted.classes == (3, 5)
    assert restricted.references.labels.tolist() == [0, 0, 1, 1]


def test_a_class_map_is_a_file_or_a_mapping(model, tmp_path):
    folder(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "3").rename(tmp_path / split / "three")
    (tmp_path / "map.json").write_text('{"three": 3}')
    for class_map in (tmp_path / "map.json", str(tmp_path / "map.json"), {"three": 3}):
        task = load_task(
            f"folder:{tmp_path}", model, references_per_class=1, class_map=class_map, classes=["three", "5"]
        )
        assert task.classes == (3, 5)
        assert task.class_names == ("3", "5")


@pytest.mark.parametrize("content", [b"", b"no image", "truncated"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_unreadable_image_is_named(model, tmp_path, content, split):
    folder(tmp_path, shape=(90, 80, 3))
    path = tmp_path / split / "5" / "2.png"
    path.write_bytes(path.read_bytes()[:9000] if content == "truncated" else content)
    with pytest.raises(DataError) as caught:
        load_task(f"folder:{tmp_path}", model, references_per_class=4)
    message = str(caught.value)
    assert message.startswith(f"The image {path} can't be read (")
    assert message.endswith("); replace or remove it.")
    assert "\n" not in message


def test_an_unreadable_encoded_image_is_named(model, tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "jpeg")
    jpeg = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    np.savez(
        tmp_path / "a.npz",
        jpeg=np.concatenate([jpeg, jpeg[:20]]),
        offset=[0, len(jpeg), len(jpeg) + 20],
        label=[0, 1],
        name=["good.jpg", "bad.jpg"],
    )
    np.savez(tmp_path / "b.npz", x=images(1).pixels[:4], y=[0, 1, 0, 1])
    with pytest.raises(DataError, match=r"The image .*a\.npz\[1\] \(bad\.jpg\) can't be read"):
        load_task(f"npz:{tmp_path / 'a.npz'},{tmp_path / 'b.npz'}", model, references_per_class=1)


def test_too_few_references_are_named_with_class_and_count(model, tmp_path):
    folder(tmp_path)
    (tmp_path / "train" / "5" / "0.png").unlink()
    with pytest.raises(
        DataError, match=r"The class '5' \(output 5\) has 3 training images, fewer than the 4 references"
    ):
        load_task(f"folder:{tmp_path}", model, references_per_class=4)


def test_classes_that_the_network_lacks_are_named(model):
    with pytest.raises(DataError, match="--classes: 10 is out of range; the network's outputs are 0 to 9"):
        load_task("digits", model, classes=[1, 10])


def test_a_factory_is_opened(model, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "own_digits.py").write_text(
        "from objectives.datasets.digits import open_digits\n"
        "from objectives.datasets.labels import LabelSet\n"
        "def data():\n    return open_digits('', LabelSet(10))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_task("own_digits:data", model).fingerprint == load_task("digits", model).fingerprint


@pytest.mark.slow
def test_imagenet_networks_take_wordnet_folders_and_names(data_pack):
    model = load_model(
        "mobilenetv2_100",
        checkpoint=data_pack / "weights" / "imagenet_mobilenetv2_100_qat.safetensors",
        options={"pad_type": "same"},
        mean=0.5,
        std=0.5,
    )
    directory = data_pack / "imagenette160"
    source = f"npz:{directory / 'ref_100_per_class.npz'},{directory / 'ilsvrcval490_dev.npz'}"
    names = ["tench", "n02102040", 482, "chain saw", "church", "French horn", "garbage_truck", "gas pump", 574, "chute"]
    task = load_task(source, model, classes=names, confirmation_share=0, references_per_class=1)
    assert len(task.search) == 245
    with torch.inference_mode():
        logits = torch.cat([model.network(batch) for batch in task.search.images.split(49)])
    top1 = (logits.argmax(1) == torch.tensor(task.classes)[task.search.labels]).double().mean().item()
    ten_way = (logits[:, list(task.classes)].argmax(1) == task.search.labels).double().mean().item()
    assert (round(top1, 4), round(ten_way, 4)) == (0.7061, 0.9755)
