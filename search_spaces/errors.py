"""Errors that a user can cause.

Every message is one line that names the offending value and the remedy; the command line prints it as it is.

    PruningHPOError
    └── SearchSpaceError
"""

__all__ = ["PruningHPOError", "SearchSpaceError"]


class PruningHPOError(Exception):
    """Root of every error that a user can cause, in any of the four packages."""


class SearchSpaceError(PruningHPOError):
    """Base of the errors of `search_spaces`."""
