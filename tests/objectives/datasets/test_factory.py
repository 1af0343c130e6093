import sys

import numpy as np
import pytest

from objectives.datasets import SourcePair
from objectives.datasets.factory import open_factory
from objectives.errors import DataError

MODULE = """
import numpy as np
from objectives.datasets import SourcePair

class Source:
    labels = np.array([0, 1])

    def image(self, index):
        return np.zeros((8, 8), dtype=np.uint8)

def two():
    return Source(), Source()

def pair():
    return SourcePair(Source(), Source(), {0: "zero"})

def one():
    return Source()

def arrays():
    return np.zeros(3), np.zeros(3)

def failing():
    raise FileNotFoundError("no disk")

NUMBER = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    name = f"own_data_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return name


@pytest.mark.parametrize("attribute", ["two", "pair"])
def test_a_factory_returns_two_sources(own, attribute):
    pair = open_factory(f"{own}:{attribute}")
    assert isinstance(pair, SourcePair)
    assert np.array_equal(pair.evaluation.labels, [0, 1])


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("one", r"returned a Source; it must return two sources \(training, evaluation\), each with `labels`"),
        ("arrays", r"returned a tuple; it must return two sources"),
        ("failing", r"failed \(FileNotFoundError: no disk\); correct it"),
        ("NUMBER", r"is a int; name a callable that returns two sources"),
        ("tow", r"has no object 'tow' \(Did you mean 'two'\?"),
    ],
)
def test_bad_factories_are_named(own, attribute, message):
    with pytest.raises(DataError, match=message):
        open_factory(f"{own}:{attribute}")


def test_a_module_that_is_missing_is_named():
    with pytest.raises(DataError, match=r"'nowhere:data' can't be imported: .*ModuleNotFoundError"):
        open_factory("nowhere:data")
