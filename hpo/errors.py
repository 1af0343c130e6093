"""Errors of `hpo`.

    PruningHPOError
    └── HpoError
        ├── ComparisonFileError (OSError)        files of a comparison that cannot be written, read or gone on with
        ├── ConfigurationError (ValueError)      an option, or a key of a configuration file, that cannot be used
        │   └── SamplerError    a sampler that cannot be imported, built or used
        ├── ExecutorError (RuntimeError)         no worker can be had
        ├── ImportRefusedError (PermissionError)    an import path that only a store or a document names
        ├── NothingFoundError  (LookupError)     a study or a trial that is not what was asked for
        └── TrialsFailedError  (RuntimeError)    trials that failed, so that the study cannot go on

`Interrupted` stands beside the tree: it is Ctrl-C or SIGTERM, and nobody's mistake.
"""

from search_spaces.errors import PruningHPOError

__all__ = [
    "ComparisonFileError",
    "ConfigurationError",
    "ExecutorError",
    "HpoError",
    "ImportRefusedError",
    "Interrupted",
    "NothingFoundError",
    "SamplerError",
    "TrialsFailedError",
]


class HpoError(PruningHPOError):
    """Base of the errors of `hpo`."""


class ComparisonFileError(HpoError, OSError):
    """Files of a comparison that cannot be written or read, or are of another comparison."""


class ConfigurationError(HpoError, ValueError):
    """An option, or a key of a configuration file, that cannot be used."""


class SamplerError(ConfigurationError):
    """A sampler that cannot be imported, built or used."""


class ExecutorError(HpoError, RuntimeError):
    """No worker can be had: what is asked for does not exist, cannot be reached, or keeps dying."""


class ImportRefusedError(HpoError, PermissionError):
    """An import path that only a store or a document names: code runs when this command line names it."""


class NothingFoundError(HpoError, LookupError):
    """A study or a trial that is not what was asked for."""


class TrialsFailedError(HpoError, RuntimeError):
    """Trials that failed, so that the study cannot go on."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, raised where a study can be left: no trial is lost and none is half written."""
