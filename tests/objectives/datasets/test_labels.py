import json
import logging

import pytest
from timm.data import ImageNetInfo

from objectives.datasets.labels import LabelSet, read_class_map
from objectives.errors import DataError

INFO = ImageNetInfo()
IMAGENET = LabelSet(1000, tuple(INFO.label_descriptions()), tuple(INFO.label_names()))
PETS = LabelSet(3, ("cat", "dog", "guinea pig"))


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("n01440764", 0),
        ("tench", 0),
        ("Tinca tinca", 0),
        ("tench, Tinca tinca", 0),
        ("Golden_Retriever", 207),
        ("n02012849", 134),
        # A full name goes before another output's synonym.
        ("maillot", 638),
        ("dog", None),
    ],
)
def test_imagenet_outputs_go_by_id_name_and_synonym(name, output):
    assert IMAGENET.find(name) == output


def test_a_name_of_several_outputs_is_refused():
    with pytest.raises(DataError, match="'crane' stands for the outputs 134, 517; use the WordNet id or the index"):
        IMAGENET.find("crane")


def test_the_class_map_goes_before_all():
    labels = LabelSet(3, PETS.names, class_map={"cat": 2, "kitty": 0})
    assert [labels.find(name) for name in ("cat", "kitty", "dog")] == [2, 0, 1]


def test_a_class_map_out_of_range_is_refused():
    with pytest.raises(DataError, match="sends 'bird' to output 3, but the network's outputs are 0 to 2"):
        LabelSet(3, class_map={"bird": 3})


def test_known_names_stand_for_their_outputs():
    assert PETS.assign(["guinea_pig", "Cat"], "data") == {"guinea_pig": 2, "Cat": 0}
    assert IMAGENET.assign(["n01440764", "n02102040"], "data") == {"n01440764": 0, "n02102040": 217}


def test_known_names_are_not_overruled_by_their_order():
    labels = LabelSet(2, ("zebra", "ape"))
    assert labels.assign(["ape", "zebra"], "data") == {"ape": 1, "zebra": 0}


def test_a_misspelt_name_does_not_permute_the_others():
    label_set = LabelSet(3, ("tulip", "rose", "daisy"))
    with pytest.raises(DataError, match=r"'tulips' is no class of the network, but 'daisy' is.* output 2.*'tulip'"):
        label_set.assign(["daisy", "rose", "tulips"], "flowers")


def test_names_that_are_known_are_told_with_their_outputs(caplog):
    caplog.set_level("INFO")
    assert LabelSet(2, ("tulip", "rose")).assign(["rose", "tulip"], "flowers") == {"rose": 1, "tulip": 0}
    assert "flowers: classes stand for outputs by name: 1 rose, 0 tulip" in caplog.text


def test_as_many_unknown_names_as_outputs_are_taken_in_order_and_told(caplog):
    caplog.set_level(logging.INFO)
    assert PETS.assign(["a", "b", "c"], "data") == {"a": 0, "b": 1, "c": 2}
    assert "data: classes stand for outputs in this order: 0 a, 1 b, 2 c" in caplog.text


@pytest.mark.parametrize(
    ("labels", "names"), [(PETS, ["bird", "cat"]), (LabelSet(3, class_map={"cat": 1}), ["bird", "cat", "dog"])]
)
def test_other_names_are_refused(labels, names):
    with pytest.raises(
        DataError, match=r"data: 'bird' \(\d of \d classes\) is no class of the network.*3 outputs.*--class-map"
    ):
        labels.assign(names, "data")


def test_classes_are_selected_by_index_and_name():
    assert PETS.select(["dog", 0], {}) == (0, 1)
    assert PETS.select([" 2", "Dog"], {}) == (1, 2)
    assert PETS.select(["hound", "cat"], {1: "hound"}) == (0, 1)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([0, 3], "--classes: 3 is out of range; the network's outputs are 0 to 2"),
        (["-1", 0], "--classes: -1 is out of range"),
        (["cta", "dog"], r"no class is called 'cta'; give its index\. Did you mean 'cat'\?"),
        (["cat", 0], "has output 0 twice, as 'cat' and 0; remove one"),
        (["cat"], "at least two classes to tell apart, but has 1"),
        ([], "at least two classes to tell apart, but has 0"),
    ],
)
def test_bad_selections_are_named(classes, message):
    with pytest.raises(DataError, match=message):
        PETS.select(classes, {})


def test_a_class_map_is_a_json_object(tmp_path):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"cat": 2}))
    assert read_class_map(path) == {"cat": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"map\.json' isn't JSON"),
        ("[1]", r"map\.json' must be a JSON object from class name to output index"),
        ('{"cat": "2"}', r"sends 'cat' to '2'; give the index of an output"),
        ('{"cat": true}', r"sends 'cat' to True"),
    ],
)
def test_other_class_maps_are_refused(tmp_path, content, message):
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_class_map(tmp_path / "map.json")


def test_a_missing_class_map_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json' can't be read \(No such file or directory\); check --class-map"):
        read_class_map(tmp_path / "none.json")
