import numpy as np
import pytest
import torch
from PIL import Image

from objectives.fingerprints import pixels_fingerprint, selection_fingerprint, state_fingerprint

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}


def test_order_and_layout_of_a_state_dict_do_not_count():
    assert state_fingerprint(dict(reversed(STATE.items()))) == state_fingerprint(STATE)
    strided = {**STATE, "a": STATE["a"].t().contiguous().t()}
    assert state_fingerprint(strided) == state_fingerprint(STATE)


@pytest.mark.parametrize(
    "change",
    [
        {"a": STATE["a"] + 1e-6},
        {"a": STATE["a"].reshape(3, 2)},
        {"a": STATE["a"].double()},
        {"d": torch.zeros(0)},
    ],
)
def test_each_bit_of_a_state_dict_counts(change):
    assert state_fingerprint({**STATE, **change}) != state_fingerprint(STATE)


def test_names_count():
    assert state_fingerprint({"x": STATE["a"]}) != state_fingerprint({"a": STATE["a"]})


def test_pixels_count_and_files_do_not(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for name in ("image.png", "image.bmp"):
        image.save(tmp_path / name)
        assert pixels_fingerprint(Image.open(tmp_path / name)) == pixels_fingerprint(pixels)
    assert pixels_fingerprint(pixels.reshape(7, 5, 3)) != pixels_fingerprint(pixels)
    assert pixels_fingerprint(pixels ^ 1) != pixels_fingerprint(pixels)


def test_palettes_count():
    first, second = (Image.new("P", (2, 2)) for _ in range(2))
    first.putpalette([0, 0, 0, 255, 255, 255])
    second.putpalette([9, 9, 9, 255, 255, 255])
    assert pixels_fingerprint(first) != pixels_fingerprint(second)


def test_each_part_of_a_selection_counts():
    part = ([4, 2], [0, 1], ["x", "y"])
    base = selection_fingerprint((0, 1), [part])
    others = [
        selection_fingerprint((0, 2), [part]),
        selection_fingerprint((0, 1), [([2, 4], [0, 1], ["x", "y"])]),
        selection_fingerprint((0, 1), [([4, 2], [1, 1], ["x", "y"])]),
        selection_fingerprint((0, 1), [([4, 2], [0, 1], ["x", "z"])]),
        selection_fingerprint((0, 1), [part, part]),
    ]
    assert len({base, *others}) == 6
