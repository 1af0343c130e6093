"""Errors of `objectives`.

    PruningHPOError
    └── ObjectiveError
        ├── UnsupportedNetworkError (ValueError)    a network that cannot be attributed or slimmed correctly
        ├── RelevanceError          (ArithmeticError)    relevance that is not finite, absent or unbalanced
        ├── ModelError              (ValueError)    a model that cannot be built or loaded
        │   └── CheckpointMismatchError    weights that do not fit the architecture
        └── DataError               (ValueError)    images, labels or splits that cannot be used
"""

from search_spaces.errors import PruningHPOError

__all__ = [
    "CheckpointMismatchError",
    "DataError",
    "ModelError",
    "ObjectiveError",
    "RelevanceError",
    "UnsupportedNetworkError",
]


class ObjectiveError(PruningHPOError):
    """Base of the errors of `objectives`."""


class UnsupportedNetworkError(ObjectiveError, ValueError):
    """A network that cannot be attributed or slimmed correctly; the message names the module."""


class RelevanceError(ObjectiveError, ArithmeticError):
    """Relevance that is not finite, is absent from a layer of components, or does not balance."""


class ModelError(ObjectiveError, ValueError):
    """A model that cannot be built or loaded."""


class CheckpointMismatchError(ModelError):
    """Weights that do not fit the architecture; the message names the first keys."""


class DataError(ObjectiveError, ValueError):
    """Images, labels or splits that cannot be used."""
