import io

import numpy as np
import pytest
from PIL import Image

from objectives.datasets.labels import LabelSet
from objectives.datasets.npz import open_npz
from objectives.errors import DataError

LABELS = LabelSet(10)
X = np.random.RandomState(0).randint(0, 256, (4, 5, 6, 3), dtype=np.uint8)
Y = np.array([3, 1, 2, 0])


def encoded(n_images=4, **changes):
    files = []
    for pixels in X[:n_images]:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        files.append(np.frombuffer(buffer.getvalue(), dtype=np.uint8))
    arrays = {
        "jpeg": np.concatenate(files),
        "offset": np.cumsum([0, *map(len, files)]),
        "label": Y[:n_images],
        "name": np.array([f"image{i}.png" for i in range(n_images)]),
    }
    return arrays | changes


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.fixture
def other(tmp_path):
    return save(tmp_path / "other.npz", x=X, y=Y)


def test_pixels_and_labels_are_read(tmp_path, other):
    path = save(tmp_path / "train.npz", x=X[:3], y=Y[:3].astype(np.uint8), pos_in_class=np.zeros(3))
    pair = open_npz(f"{path}, {other}", LABELS)
    assert np.array_equal(pair.train.image(2), X[2])
    assert pair.train.labels.tolist() == [3, 1, 2]
    assert pair.train.name(2) == f"{path}[2]"
    assert len(pair.evaluation.labels) == 4


@pytest.mark.parametrize("arrays", [{"x": X, "y": Y}, encoded()])
def test_domains_are_read(tmp_path, other, arrays):
    domains = np.array(["real", "sketch", "real", "real"])
    pair = open_npz(f"{save(tmp_path / 'train.npz', **arrays, domain=domains)},{other}", LABELS)
    assert pair.train.domains == ("real", "sketch", "real", "real")
    assert pair.evaluation.domains is None
    for wrong in (domains[:3], np.arange(4)):
        path = save(tmp_path / "train.npz", **arrays, domain=wrong)
        with pytest.raises(DataError, match=r"`domain` in .* it must be texts of shape \(4,\)"):
            open_npz(f"{path},{other}", LABELS)


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 1)])
def test_grey_pixels_are_read(tmp_path, other, shape):
    path = save(tmp_path / "grey.npz", x=X[..., :1].reshape(shape), y=Y)
    assert open_npz(f"{path},{other}", LABELS).train.image(0).shape == shape[1:]


def test_encoded_images_are_decoded(tmp_path, other):
    path = save(tmp_path / "train.npz", **encoded())
    source = open_npz(f"{path},{other}", LABELS).train
    assert all(np.array_equal(np.asarray(source.image(i)), X[i]) for i in range(4))
    assert source.labels.tolist() == Y.tolist()
    assert source.name(1) == f"{path}[1] (image1.png)"


def test_real_files_are_read(data_pack):
    files = (data_pack / "imagenet" / name for name in ("ref1000.npz", "ccby911_dev.npz"))
    pair = open_npz(",".join(map(str, files)), LabelSet(1000))
    assert (len(pair.train.labels), len(pair.evaluation.labels)) == (1000, 456)
    assert pair.train.image(0).size == (256, 256)


@pytest.mark.parametrize("argument", ["", "one.npz", "a.npz,b.npz,c.npz"])
def test_two_files_are_needed(argument):
    with pytest.raises(DataError, match=r"`npz` needs two files, not '.*'; write --data npz:TRAIN\.npz,EVAL\.npz"):
        open_npz(argument, LABELS)


def test_one_file_for_both_is_refused(other):
    with pytest.raises(
        DataError, match="is given for training and for evaluation, so reference images would be evaluated"
    ):
        open_npz(f"{other},{other.parent}/../{other.parent.name}/other.npz", LABELS)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, r"has the arrays x; it needs `x` and `y`, or `jpeg`, `offset` and `label`"),
        ({"z": X}, r"has the arrays of other names; it needs"),
        ({"x": X / 255, "y": Y}, r"`x` in '.*' is float64 \(4, 5, 6, 3\); it must be uint8 pixels"),
        ({"x": X.transpose(0, 3, 1, 2), "y": Y}, r"`x` in '.*' is uint8 \(4, 3, 5, 6\); it must be"),
        ({"x": X, "y": Y[:3]}, r"`y` in '.*' is int64 \(3,\); it must be integers of shape \(4,\)"),
        ({"x": X, "y": Y / 2}, r"`y` in '.*' is float64 \(4,\)"),
        ({"x": X, "y": Y.astype(object)}, r"isn't a NumPy \.npz archive of plain arrays"),
        (encoded(label=Y[:3]), r"`jpeg` and `offset` in '.*' don't agree: .*`offset` 4 ascending positions"),
        (encoded(offset=np.array([0, 9, 5, 10, 11])), r"don't agree"),
        (encoded(offset=np.array([0, 1, 2, 3, 10**6])), r"don't agree"),
    ],
)
def test_other_arrays_are_refused(tmp_path, other, arrays, message):
    path = save(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_npz(f"{path},{other}", LABELS)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken", b"\x93NUMPY\x01\x00"])
def test_other_files_are_refused(tmp_path, other, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.npz'.*(isn't a NumPy|can't be read)") as caught:
        open_npz(f"{other},{tmp_path / 'bad.npz'}", LABELS)
    assert "\n" not in str(caught.value)


def test_a_single_array_is_refused(tmp_path, other):
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(DataError, match=r"x\.npy' isn't a NumPy \.npz archive"):
        open_npz(f"{tmp_path / 'x.npy'},{other}", LABELS)


def test_a_missing_file_is_named(tmp_path, other):
    with pytest.raises(DataError, match=r"none\.npz' can't be read \(No such file or directory\); check --data"):
        open_npz(f"{tmp_path / 'none.npz'},{other}", LABELS)
