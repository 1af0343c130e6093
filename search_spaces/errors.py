"""Errors that a user can cause.

Every message is one line that names the offending value and the remedy; the command line prints it as it is.

    PruningHPOError
    └── SearchSpaceError
        ├── CompositeError           (ValueError)    values that make no rule or composite
        │   ├── UnknownRuleError                     a rule that has no such name
        │   └── RepairSpecError                      values that make no repair
        ├── CriterionError           (ValueError)    values that make no criterion
        ├── ProcedureError           (ValueError)    values that make no procedure
        ├── SplitError               (ValueError)    values that make no split of classes or domains
        ├── UnknownHeuristicError    (KeyError)      a heuristic that has no such name
        ├── SpaceError               (ValueError)    a search space that cannot be read or used
        │   ├── UnknownSpaceError                    a space that has no such name
        │   ├── SpaceImportError     (ImportError)   an import path that leads to no search space
        │   ├── SpaceNotFiniteError                  the grid of a continuous space
        │   └── OutsideSpaceError                    a composite that is no point of the space
        ├── DocumentError            (ValueError)    a document that cannot be read
        │   └── DocumentVersionError                 a document of another version
        └── DocumentWriteError       (OSError)       a document that cannot be written
"""

__all__ = [
    "CompositeError",
    "CriterionError",
    "DocumentError",
    "DocumentVersionError",
    "DocumentWriteError",
    "OutsideSpaceError",
    "ProcedureError",
    "PruningHPOError",
    "RepairSpecError",
    "SearchSpaceError",
    "SpaceError",
    "SpaceImportError",
    "SpaceNotFiniteError",
    "SplitError",
    "UnknownHeuristicError",
    "UnknownRuleError",
    "UnknownSpaceError",
]


class PruningHPOError(Exception):
    """Root of every error that a user can cause, in any of the four packages."""

    def __str__(self) -> str:
        # A subclass that is a KeyError too would otherwise print its message in quotes.
        return Exception.__str__(self)


class SearchSpaceError(PruningHPOError):
    """Base of the errors of `search_spaces`."""


class CompositeError(SearchSpaceError, ValueError):
    """Values that make no rule or composite."""


class UnknownRuleError(CompositeError):
    """A rule that has no such name."""


class RepairSpecError(CompositeError):
    """Values that make no repair."""


class CriterionError(SearchSpaceError, ValueError):
    """Values that make no criterion."""


class ProcedureError(SearchSpaceError, ValueError):
    """Values that make no procedure."""


class SplitError(SearchSpaceError, ValueError):
    """Values that make no split of classes or domains, or a file of splits that cannot be read."""


class UnknownHeuristicError(SearchSpaceError, KeyError):
    """A heuristic that has no such name."""


class SpaceError(SearchSpaceError, ValueError):
    """A search space that cannot be read or used."""


class UnknownSpaceError(SpaceError):
    """A search space that has no such name."""


class SpaceImportError(SpaceError, ImportError):
    """An import path that leads to no search space, or one that may not be imported."""


class SpaceNotFiniteError(SpaceError):
    """The grid of a continuous space."""


class OutsideSpaceError(SpaceError):
    """A composite that is no point of the space."""


class DocumentError(SearchSpaceError, ValueError):
    """A document that cannot be read; the message names the JSON path and the value."""


class DocumentVersionError(DocumentError):
    """A document of a version that this release does not know."""


class DocumentWriteError(SearchSpaceError, OSError):
    """A document that cannot be written: no such directory, no permission, no space."""
