import logging

import numpy as np
import pytest
from PIL import Image

from objectives.datasets.folder import open_domains, open_folder
from objectives.datasets.labels import LabelSet
from objectives.errors import DataError

LABELS = LabelSet(3, ("cat", "dog", "guinea pig"))


def pixels(value):
    return np.full((4, 6, 3), value, dtype=np.uint8)


def write(root, split, name, file, value=0):
    path = root / split / name / file
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(value)).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    for value, name in enumerate(("dog", "cat")):
        for file in ("b.png", "a.BMP"):
            write(tmp_path, "train", name, file, value)
        write(tmp_path, "val", name, "c.png", value + 10)
    return tmp_path


def test_folders_become_labels(root):
    pair = open_folder(str(root), LABELS)
    assert [pair.train.name(i).removeprefix(str(root)) for i in range(4)] == [
        "/train/cat/a.BMP",
        "/train/cat/b.png",
        "/train/dog/a.BMP",
        "/train/dog/b.png",
    ]
    assert pair.train.labels.tolist() == [0, 0, 1, 1]
    assert pair.evaluation.labels.tolist() == [0, 1]
    assert pair.class_names == {0: "cat", 1: "dog"}
    assert np.array_equal(np.asarray(pair.train.image(2)), pixels(0))


def test_folders_of_domains_become_labels_and_domains(tmp_path):
    for number, (domain, name) in enumerate([("sketch", "dog"), ("real", "cat"), ("real", "dog")]):
        for side in ("train", "val"):
            write(tmp_path, f"{side}/{domain}", name, "a.png", number + 10 * (side == "val"))
    pair = open_domains(str(tmp_path), LABELS)
    assert pair.train.domains == pair.evaluation.domains == ("real", "real", "sketch")
    assert pair.train.labels.tolist() == pair.evaluation.labels.tolist() == [0, 1, 1]
    assert pair.train.name(2) == f"{tmp_path}/train/sketch/dog/a.png"
    assert np.array_equal(np.asarray(pair.evaluation.image(1)), pixels(12))


def test_folders_without_domains_are_refused(root, tmp_path):
    with pytest.raises(DataError, match=r"/train/cat' has no images in sub-folders; put them into .*/cat/CLASS/"):
        open_domains(str(root), LABELS)
    with pytest.raises(DataError, match=r"train' isn't a directory; --data domains:DIR reads DIR/train/DOMAIN/CLASS"):
        open_domains(str(tmp_path / "none"), LABELS)
    with pytest.raises(DataError, match="The data `domains` needs a directory; write --data domains:DIR"):
        open_domains("", LABELS)


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "gif", "tif", "ppm"])
def test_every_format_of_pillow_is_read(root, extension):
    path = write(root, "train", "cat", f"x.{extension}", 100)
    source = open_folder(str(root), LABELS).train
    index = [source.name(i) for i in range(len(source.labels))].index(str(path))
    assert abs(int(np.asarray(source.image(index).convert("RGB"))[0, 0, 0]) - 100) <= 2


def test_other_files_are_left_out(root, caplog):
    caplog.set_level(logging.INFO)
    (root / "train" / "cat" / "readme.txt").write_text("cats")
    (root / "train" / "cat" / ".hidden.png").write_text("")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    assert len(open_folder(str(root), LABELS).train.labels) == 4
    assert "cat: 1 files are no images" in caplog.text


def test_as_many_folders_as_outputs_stand_in_sorted_order(root, caplog):
    caplog.set_level(logging.INFO)
    write(root, "train", "bird", "a.png")
    pair = open_folder(str(root), LabelSet(3))
    assert pair.class_names == {0: "bird", 1: "cat", 2: "dog"}
    assert pair.evaluation.labels.tolist() == [1, 2]
    assert "0 bird, 1 cat, 2 dog" in caplog.text


def test_a_class_map_names_the_folders(root):
    pair = open_folder(str(root), LabelSet(1000, class_map={"cat": 281, "dog": 207}))
    assert pair.train.labels.tolist() == [281, 281, 207, 207]


def test_folders_of_no_class_are_refused(root):
    with pytest.raises(
        DataError, match=r"'cat' \(2 of 2 classes\) is no class of the network, which has 1000 outputs; .*--class-map"
    ):
        open_folder(str(root), LabelSet(1000))


def test_a_class_that_train_lacks_is_refused(root):
    write(root, "val", "guinea pig", "a.png")
    with pytest.raises(
        DataError, match=r"The class 'guinea pig' is in '.*val', but '.*train' lacks it; add its images"
    ):
        open_folder(str(root), LABELS)


def test_the_same_directory_twice_is_refused(root):
    for file in (root / "val").glob("*/*"):
        file.unlink()
        file.parent.rmdir()
    (root / "val").rmdir()
    (root / "val").symlink_to(root / "train")
    with pytest.raises(DataError, match="are the same directory, so reference images would be evaluated on"):
        open_folder(str(root), LABELS)


def test_missing_directories_are_named(tmp_path):
    with pytest.raises(DataError, match=r"write --data folder:DIR"):
        open_folder("", LABELS)
    with pytest.raises(DataError, match=r"train' isn't a directory; --data folder:DIR reads DIR/train/CLASS"):
        open_folder(str(tmp_path), LABELS)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train' has no images in sub-folders; put them into"):
        open_folder(str(tmp_path), LABELS)
