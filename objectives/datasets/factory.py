"""The user's own images: `--data package.module:factory`."""

from __future__ import annotations

from objectives.datasets.sources import SourcePair
from objectives.errors import DataError
from search_spaces.imports import import_object
from search_spaces.reasons import reason_of

__all__ = ["open_factory"]


def open_factory(spec: str) -> SourcePair:
    """Calls a factory without arguments; modules in the working directory can be named.

    It returns a `SourcePair`, or two `ImageSource`s: of training and of evaluation images.

    Raises:
        DataError: It can't be imported, fails or returns something else.
    """
    try:
        factory = import_object(spec)
    except ImportError as error:
        raise DataError(f"The data {spec!r} can't be imported: {error}.") from error
    if not callable(factory):
        raise DataError(f"{spec!r} is a {type(factory).__name__}; name a callable that returns two sources.")
    try:
        pair = factory()
    except Exception as error:  # a user's factory may raise anything
        raise DataError(f"{spec!r} failed ({reason_of(error)}); correct it.") from error
    if isinstance(pair, SourcePair):
        return pair
    if (
        not isinstance(pair, tuple)
        or len(pair) != 2
        or not all(hasattr(part, "labels") and callable(getattr(part, "image", None)) for part in pair)
    ):
        raise DataError(
            f"{spec!r} returned a {type(pair).__name__}; it must return two sources (training, evaluation), "
            "each with `labels` and `image(index)`."
        )
    return SourcePair(*pair)
