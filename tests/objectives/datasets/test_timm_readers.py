import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from objectives.datasets.labels import LabelSet
from objectives.datasets.timm_readers import open_timm
from objectives.errors import DataError

LABELS = LabelSet(3, ("cat", "dog", "guinea pig"))


def pixels(value):
    return np.full((4, 6, 3), value, dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    for split, base in (("train", 0), ("validation", 100)):
        for offset, name in enumerate(("dog", "guinea pig")):
            for number in (1, 2, 10):
                path = tmp_path / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels(base + 10 * offset + number)).save(path)
    return tmp_path


@pytest.mark.parametrize("name", ["", "folder", "torch/image_folder"])
def test_folders_are_read(root, name):
    pair = open_timm(f"{name}?root={root}", LABELS)
    assert pair.class_names == {1: "dog", 2: "guinea pig"}
    assert pair.train.labels.tolist() == [1, 1, 1, 2, 2, 2]
    assert pair.evaluation.labels.tolist() == [1, 1, 1, 2, 2, 2]
    values = [int(np.asarray(pair.evaluation.image(index))[0, 0, 0]) for index in range(6)]
    assert sorted(values) == [101, 102, 110, 111, 112, 120]
    assert pair.evaluation.name(3) == f"timm:{name} split 'validation'[3]"


def test_as_many_classes_as_outputs_keep_timms_labels(root):
    pair = open_timm(f"?root={root}", LabelSet(2))
    assert pair.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_each_side_may_have_its_split_and_root(root):
    (root / "validation").rename(root / "held_out")
    pair = open_timm(f"?root={root}&validation_split=held_out", LABELS)
    assert int(np.asarray(pair.evaluation.image(0))[0, 0, 0]) == 101
    pair = open_timm(f"?train_root={root / 'train'}&validation_root={root / 'held_out'}", LABELS)
    assert int(np.asarray(pair.evaluation.image(0))[0, 0, 0]) == 101


def test_labels_of_both_sides_agree_though_one_lacks_a_class(root):
    for path in (root / "validation" / "dog").iterdir():
        path.unlink()
    pair = open_timm(f"?root={root}", LABELS)
    assert pair.evaluation.labels.tolist() == [2, 2, 2]


def test_a_class_that_training_lacks_is_refused(root):
    (root / "validation" / "dog").rename(root / "validation" / "cat")
    with pytest.raises(
        DataError, match=r"The class 'cat' is in timm: split 'validation', but timm: split 'train' lacks it"
    ):
        open_timm(f"?root={root}", LABELS)


@pytest.mark.parametrize("name", ["", "torch/image_folder"])
def test_the_same_files_on_both_sides_are_refused(root, name):
    with pytest.raises(DataError, match="are the same files, so reference images would be evaluated on; give"):
        open_timm(f"{name}?root={root / 'train'}", LABELS)


def test_tar_files_are_read(root):
    for split in ("train", "validation"):
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            archive.add(root / split, arcname=".")
    pair = open_timm(f"?train_root={root / 'train.tar'}&validation_root={root / 'validation.tar'}", LABELS)
    assert sorted(pair.evaluation.labels.tolist()) == [1, 1, 1, 2, 2, 2]
    assert np.asarray(pair.evaluation.image(5)).shape == (4, 6, 3)
    pair.evaluation.samples.tar_state.tf.close()  # the reader keeps it open


def test_an_unreadable_image_is_an_error_not_its_neighbour(root):
    (root / "train" / "dog" / "2.png").write_bytes(b"")
    pair = open_timm(f"?root={root}", LABELS)
    with pytest.raises(OSError, match="cannot identify image file"):
        pair.train.image(1)


def test_torchvision_data_sets_are_read(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, n_images in (("train", 5), ("t10k", 3)):
        images = np.arange(n_images * 784, dtype=np.uint32).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, n_images, 28, 28) + images.tobytes()
        )
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n_images) + bytes(range(n_images)))
    pair = open_timm(f"torch/mnist?root={tmp_path}", LabelSet(10))
    assert pair.train.labels.tolist() == [0, 1, 2, 3, 4]
    assert pair.evaluation.labels.tolist() == [0, 1, 2]
    assert pair.train.image(1).size == (28, 28)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("folder", r"timm:folder split 'train' can't be read \(.*\); check the name, give its folder"),
        ("folder?root=/nowhere", r"timm:folder split 'train' can't be read \(AssertionError"),
        ("torch/cifra10?root=/nowhere", r"can't be read \(AssertionError: Unknown torchvision dataset cifra10\)"),
        ("hfds/nobody/nothing", r"can't be read \(.*\); check the name.* install the package that its reader needs"),
        ("folder?root", r"--data timm:folder\?root: an option must be NAME=VALUE"),
    ],
)
def test_what_timm_cannot_open_is_named(argument, message):
    with pytest.raises(DataError, match=message) as caught:
        open_timm(argument, LABELS)
    assert "\n" not in str(caught.value)
