"""Errors of `objectives`.

Every message is one line that names the offending value and the remedy; the command line prints it as it is.

    PruningHPOError
    └── ObjectiveError
        ├── UnsupportedNetworkError    (ValueError)       a network that cannot be attributed or slimmed correctly
        ├── RelevanceError             (ArithmeticError)  relevance that is not finite, absent or unbalanced
        ├── RepairError                (ValueError)       a pruned network whose layers cannot be refitted
        ├── TrainingError              (ArithmeticError)  a training that diverges or has nothing to train
        ├── ModelError                 (ValueError)       a model that cannot be built or loaded
        │   └── CheckpointMismatchError                   weights that do not fit the architecture
        ├── DataError                  (ValueError)       images, labels or splits that cannot be used
        ├── OptionError                (ValueError)       an option of an objective or of pruning that cannot be used
        │   ├── PruningRatesError                         rates that do not increase strictly from 0 to below 1
        │   └── DeviceError                               a device that does not exist on this machine
        ├── OutOfMemoryError           (MemoryError)      a device without room for a single image
        └── SlimFileError              (OSError)          files of a slim network that cannot be written or read
"""

from search_spaces.errors import PruningHPOError

__all__ = [
    "CheckpointMismatchError",
    "DataError",
    "DeviceError",
    "ModelError",
    "ObjectiveError",
    "OptionError",
    "OutOfMemoryError",
    "PruningRatesError",
    "RelevanceError",
    "RepairError",
    "SlimFileError",
    "TrainingError",
    "UnsupportedNetworkError",
]


class ObjectiveError(PruningHPOError):
    """Base of the errors of `objectives`."""


class UnsupportedNetworkError(ObjectiveError, ValueError):
    """A network that cannot be attributed or slimmed correctly; the message names the module."""


class RelevanceError(ObjectiveError, ArithmeticError):
    """Relevance that is not finite, is absent from a layer of components, or does not balance."""


class RepairError(ObjectiveError, ValueError):
    """A pruned network that cannot be repaired; the message names the layer or the option."""


class TrainingError(ObjectiveError, ArithmeticError):
    """A training that diverges (the message names epoch and learning rate), or a network without anything to train."""


class ModelError(ObjectiveError, ValueError):
    """A model that cannot be built or loaded."""


class CheckpointMismatchError(ModelError):
    """Weights that do not fit the architecture; the message names the first keys."""


class DataError(ObjectiveError, ValueError):
    """Images, labels or splits that cannot be used."""


class OptionError(ObjectiveError, ValueError):
    """An option of an objective or of pruning that cannot be used."""


class PruningRatesError(OptionError):
    """Rates that do not increase strictly from 0 to below 1."""


class DeviceError(OptionError):
    """A device that does not exist on this machine; the message lists those there are."""


class OutOfMemoryError(ObjectiveError, MemoryError):
    """A device without room for a single image; the message names the sizes."""


class SlimFileError(ObjectiveError, OSError):
    """Files of a slim network that cannot be written or read."""
