from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from storage.errors import TrialResultError
from storage.trials import TrialResult


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("value", lambda number: {"value": number, "curve": {}}),
        (r"curve\[5\]", lambda number: {"value": 0.5, "curve": {0: 0.9, 5: number}}),
        (r"attributes\['auc'\]", lambda number: {"value": 0.5, "curve": {}, "attributes": {"auc": number}}),
        (r"attributes\['a'\]", lambda number: {"value": 0.5, "curve": {}, "attributes": {"a": {"b": [1, number]}}}),
    ],
)
def test_number_that_is_not_finite_is_refused(name: str, arguments: Any, number: float) -> None:
    with pytest.raises(TrialResultError, match=f"`{name}` must be.* finite"):
        TrialResult(**arguments(number))


@pytest.mark.parametrize("step", [0.5, "5", True])
def test_step_that_is_no_integer_is_refused(step: Any) -> None:
    with pytest.raises(TrialResultError, match=f"must be an integer, a rate in percent, but got {step!r}"):
        TrialResult(value=0.5, curve={step: 0.9})


@pytest.mark.parametrize("value", [{1, 2}, np.float32(0.5), b"png", object()])
def test_value_that_is_not_json_is_refused(value: Any) -> None:
    with pytest.raises(TrialResultError, match=r"`attributes\['a'\]` must be JSON"):
        TrialResult(value=0.5, curve={}, attributes={"a": value})
