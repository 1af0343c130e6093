"""Options written NAME=VALUE."""

import pytest

from objectives.options import parse_option


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("pad_type=same", "same"),
        ("width=2", 2),
        ("scale=0.5", 0.5),
        ("scale=1e-3", 1e-3),
        ("bias=True", True),
        ("bias=false", False),
        ("name=", ""),
        ("name=a=b", "a=b"),
        ("sizes=[1, 2]", [1, 2]),
        ("name='7'", "7"),
        ("limit=inf", "inf"),
        ("day=2020-01-01", "2020-01-01"),
        ("name=1\nother = 2", "1\nother = 2"),
    ],
)
def test_options_are_typed(text, value):
    name, parsed = parse_option(text)
    assert name == text.split("=")[0]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["pad_type", "=same", "pad type=same", ""])
def test_options_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match="must be NAME=VALUE, for example pad_type=same"):
        parse_option(text)
