"""Options of models and data sets, written NAME=VALUE."""

import math
import tomllib
from typing import Any

__all__ = ["OptionValue", "parse_option"]

OptionValue = bool | int | float | str | list[Any]


def parse_option(text: str) -> tuple[str, OptionValue]:
    """The name and value of an option; a value that isn't TOML of a kind that JSON holds is text.

        >>> parse_option("pad_type=same"), parse_option("width=2"), parse_option("bias=False")
        (('pad_type', 'same'), ('width', 2), ('bias', False))

    Raises:
        ValueError: The text isn't of that form.
    """
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name.isidentifier():
        raise ValueError("must be NAME=VALUE, for example pad_type=same")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    try:
        content = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return name, value
    parsed = content["value"]
    # A line break would let the text hold more keys than one; dates and infinities have no form in JSON.
    if len(content) > 1 or not isinstance(parsed, bool | int | float | str | list):
        return name, value
    if isinstance(parsed, float) and not math.isfinite(parsed):
        return name, value
    return name, parsed
