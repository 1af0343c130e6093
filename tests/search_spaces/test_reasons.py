"""What foreign exceptions say is one line, however they say it."""

import pytest

from search_spaces.reasons import message_of, reason_of


@pytest.mark.parametrize(
    ("error", "message", "reason"),
    [
        (ValueError("bad"), "bad", "ValueError: bad"),
        (RuntimeError("CUDA error:\n  illegal\taccess\n"), "CUDA error: illegal access", None),
        (StopIteration(), "StopIteration", "StopIteration"),
        (SystemExit(" \n "), "SystemExit", "SystemExit"),
    ],
)
def test_an_error_is_one_line(error: BaseException, message: str, reason: str | None) -> None:
    assert message_of(error) == message
    assert reason_of(error) == (reason or f"{type(error).__name__}: {message}")


def test_a_long_reason_is_cut() -> None:
    assert reason_of(ValueError("x" * 1000)) == f"ValueError: {'x' * 399}…"
