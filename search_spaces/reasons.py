"""Reasons: what foreign code's exceptions say, on one line."""

__all__ = ["message_of", "reason_of"]

_N_SHOWN = 400


def message_of(error: BaseException) -> str:
    """The message of an exception on one line; the name of its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def reason_of(error: BaseException) -> str:
    """The type and the message of an exception on one line, which ends after 400 characters of the message."""
    name, message = type(error).__name__, message_of(error)
    if message == name:
        return name
    return f"{name}: {message if len(message) <= _N_SHOWN else message[: _N_SHOWN - 1] + '…'}"
