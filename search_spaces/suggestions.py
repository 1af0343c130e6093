"""The end of a message about an unknown name."""

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]

_MOST_LISTED = 36  # of 1,300 timm names, only the closest help


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Text to append to a message that ends in a full stop.

        >>> did_you_mean("epsilom", ["ZPlus", "Epsilon"])
        " Did you mean 'Epsilon'? Known: Epsilon, ZPlus."

    Args:
        name: What the user wrote; case does not matter.
        known: What may be written. Up to 36 names are listed, in sorted order.

    Returns:
        The closest names, if any come close, then the known ones; begins with a space unless empty.
    """
    names = sorted(set(known))
    by_folded = {candidate.casefold(): candidate for candidate in names}
    close = [by_folded[match] for match in difflib.get_close_matches(name.casefold(), by_folded, n=3)]
    listed = len(names) <= _MOST_LISTED
    if listed:
        close = close[:1]
    text = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return text + (f" Known: {', '.join(names)}." if names and listed else "")
