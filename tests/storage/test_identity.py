from __future__ import annotations

from typing import Any

import pytest

from storage.identity import ABSENT, Difference, differences


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ({}, {}),
        ({"rates": [0, 0.5]}, {"rates": (0.0, 0.5)}),
        ({"model": {"name": "resnet18", "options": None}}, {"model": {"options": None, "name": "resnet18"}}),
    ],
)
def test_equal_identities_differ_nowhere(stored: Any, asked: Any) -> None:
    assert differences(stored, asked) == ()


def test_differences_have_dotted_keys_in_order() -> None:
    stored = {"seed": 0, "model": {"name": "resnet18"}, "classes": [1, 2], "abs": True, "gone": None}
    asked = {"seed": 1, "model": {"name": "vgg16"}, "classes": [1, 3], "abs": 1, "new": {"deep": 1}}
    assert differences(stored, asked) == (
        Difference("abs", True, 1),
        Difference("classes[1]", 2, 3),
        Difference("gone", None, ABSENT),
        Difference("model.name", "resnet18", "vgg16"),
        Difference("new", ABSENT, {"deep": 1}),
        Difference("seed", 0, 1),
    )


def test_lists_of_other_lengths_differ_as_a_whole() -> None:
    assert differences({"classes": [1]}, {"classes": [1, 2]}) == (Difference("classes", [1], [1, 2]),)


def test_difference_reads_stored_then_asked() -> None:
    assert str(Difference("model.name", "resnet18", "vgg16")) == 'model.name: "resnet18" -> "vgg16"'
    assert str(Difference("seed", ABSENT, 1)) == "seed: absent -> 1"
    assert len(str(Difference("rates", list(range(100)), None))) < 80
