"""Splits of classes or domains into T, P and F: what a TOML table may say."""

from pathlib import Path
from typing import Any

import pytest

from search_spaces import SplitError, TaskSplit, read_split, read_splits

SPLITS = Path(__file__).parents[2] / "benchmarks" / "task_relevant.toml"
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SUPERCLASSES = {"animal": ["cat", "dog"], "vehicle": ["ship", "truck"]}


def toml(**changes: Any) -> dict[str, Any]:
    table = {"scenario": "new_classes", "T": ["cat"], "P": ["dog", "ship"], "F": ["truck"], **changes}
    return {key: value for key, value in table.items() if value is not None}


def test_the_papers_splits() -> None:
    splits = read_splits(SPLITS)
    assert {name: (len(each.T) + len(each.P), len(each.P)) for name, each in splits.items()} == {
        "CIFAR-9/3": (9, 3),
        "CIFAR-7/4": (7, 4),
    }
    for split in splits.values():
        assert sorted((*split.T, *split.P, *split.F)) == sorted(CIFAR10)
    assert splits["CIFAR-9/3"].outputs(CIFAR10) == tuple(CIFAR10)
    assert splits["CIFAR-7/4"].outputs(CIFAR10) == ("vehicle", "animal")
    baseline = splits["CIFAR-7/4"].without_extra()
    assert baseline.T == ()
    assert baseline.P == splits["CIFAR-7/4"].P


def test_a_table_comes_back() -> None:
    subclasses = toml(scenario="new_subclasses", T=[], superclasses=SUPERCLASSES)
    domains = {"scenario": "new_subclasses", "T": [], "P": ["sketch"], "F": ["photo"], "by": "domain"}
    for table in (toml(), subclasses, domains):
        assert TaskSplit.from_toml(table).to_json() == table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenario": "new_clases"}, "Unknown scenario of a split 'new_clases'. Did you mean 'new_classes'?"),
        ({"by": "style"}, "Unknown by of a split 'style'."),
        ({"F": ["truck", "cat"]}, "The class 'cat' is in both T and F of a split; leave it in one place."),
        ({"P": ["dog", "dog"]}, "The class 'dog' is twice in P of a split; leave it in one place."),
        ({"P": []}, "P of a split is empty; name at least one class."),
        ({"F": []}, "F of a split is empty; name at least one class."),
        ({"F": None}, "A split needs 'F'; add it."),
        ({"F": "truck"}, "F of a split is a list of names, but got 'truck'."),
        ({"R": ["cat"]}, "A split takes no 'R'."),
        ({"superclasses": SUPERCLASSES}, "A split by class of scenario 'new_classes' takes no `superclasses`"),
        ({"superclasses": ["cat"]}, "`superclasses` of a split are a table of lists of classes, but got ['cat']."),
        ({"by": "domain"}, "A split by domain has no new classes"),
        ({"scenario": "new_subclasses"}, "The class 'cat' of a split has no superclass; put it into one of"),
        (
            {"scenario": "new_subclasses", "superclasses": {**SUPERCLASSES, "all": ["cat"]}},
            "The class 'cat' of a split is in the superclasses 'animal' and 'all'; leave it in one.",
        ),
        (
            {"scenario": "new_subclasses", "P": ["dog"], "T": [], "superclasses": SUPERCLASSES},
            "The class 'truck' in F of a split is of superclass 'vehicle', of which P has no class; put one into P",
        ),
    ],
)
def test_a_split_that_cannot_be_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SplitError) as error:
        TaskSplit.from_toml(toml(**changes))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_file_of_splits_names_the_split(tmp_path: Path) -> None:
    path = tmp_path / "splits.toml"
    path.write_text('[mine]\nscenario = "new_classes"\nP = []\nF = ["cat"]\n')
    with pytest.raises(SplitError, match=r"Split 'mine' of .*: P of a split is empty"):
        read_splits(path)
    path.write_text("P = 1\n")
    with pytest.raises(SplitError, match=r"'P' in .* is no table"):
        read_splits(path)
    path.write_text("P = \n")
    with pytest.raises(SplitError, match="aren't TOML"):
        read_splits(path)
    with pytest.raises(SplitError, match="can't be read"):
        read_splits(tmp_path / "none.toml")


def test_one_split_of_a_file_is_read_by_its_name(tmp_path: Path) -> None:
    assert read_split(f"{SPLITS}:CIFAR-9/3") == read_splits(SPLITS)["CIFAR-9/3"]
    with pytest.raises(SplitError, match=r"has 2 splits; name one of them, as .*task_relevant.toml:CIFAR-9/3\.$"):
        read_split(str(SPLITS))
    with pytest.raises(SplitError, match=r"has no split 'CIFAR-9'\. Did you mean 'CIFAR-9/3'\?"):
        read_split(f"{SPLITS}:CIFAR-9")
    path = tmp_path / "splits.toml"
    path.write_text('[mine]\nscenario = "new_classes"\nP = ["dog"]\nF = ["cat"]\n')
    assert read_split(str(path)).T == ()
    path.write_text("")
    with pytest.raises(SplitError, match="has no splits; write one as a table"):
        read_split(str(path))
