"""Errors of `storage`.

    PruningHPOError
    └── StorageError
        ├── StoreUrlError            (ValueError)         a storage URL that cannot be read
        ├── StoreUnreachableError    (ConnectionError)    no driver, no server, no access
        │   └── ArtifactsAwayError                        a bucket's service that doesn't answer for now
        ├── StoreNotFoundError       (FileNotFoundError)  nothing has been stored there yet
        ├── StoreFormatError         (ValueError)         not a study store, or one of another Optuna
        ├── StoreFullError           (OSError)            no space left
        ├── StoreBusyError           (TimeoutError)       another process holds what is to be written
        ├── StoreReadOnlyError       (PermissionError)    a write to a store that may only be read
        ├── StudyNameError           (ValueError)         a name that no study can have
        ├── StudyNotFoundError       (KeyError)
        ├── StudyIdentityError       (ValueError)         the same name, another search
        ├── StudyInUseError          (RuntimeError)       another process drives the study
        │   └── LeaseLostError                            another process has taken it over meanwhile
        ├── TrialResultError         (ValueError)         a result that cannot be stored
        ├── AfterTrialError          (RuntimeError)       a sampler that raised on hearing of a result
        ├── TrialNotRunningError     (RuntimeError)
        │   └── TrialAlreadyFinishedError
        ├── TrialNotWaitingError     (RuntimeError)
        ├── ArtifactsMismatchError   (ValueError)         files of artifacts that are another store's
        ├── RoleError                (PermissionError)    a role that cannot be made one that only reads
        └── DashboardAddressError    (OSError)            an address that cannot be served

No message, and no text of an exception that one is raised from, holds a password.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from search_spaces.errors import PruningHPOError

if TYPE_CHECKING:
    from storage.identity import Difference
    from storage.lease import LeaseHolder

__all__ = [
    "AfterTrialError",
    "ArtifactsAwayError",
    "ArtifactsMismatchError",
    "DashboardAddressError",
    "LeaseLostError",
    "RoleError",
    "StorageError",
    "StoreBusyError",
    "StoreFormatError",
    "StoreFullError",
    "StoreNotFoundError",
    "StoreReadOnlyError",
    "StoreUnreachableError",
    "StoreUrlError",
    "StudyIdentityError",
    "StudyInUseError",
    "StudyNameError",
    "StudyNotFoundError",
    "TrialAlreadyFinishedError",
    "TrialNotRunningError",
    "TrialNotWaitingError",
    "TrialResultError",
]


class StorageError(PruningHPOError):
    """Base of the errors of `storage`."""


class StoreUrlError(StorageError, ValueError):
    """A storage URL that cannot be read."""


class StoreUnreachableError(StorageError, ConnectionError):
    """A store that cannot be reached: its driver, its server or its access rights are missing."""


class ArtifactsAwayError(StoreUnreachableError):
    """A bucket whose service does not answer, or says itself that it cannot for now."""


class StoreNotFoundError(StorageError, FileNotFoundError):
    """A store that is to be read, where nothing has been stored yet."""


class StoreFormatError(StorageError, ValueError):
    """A database that is not a study store, or that another version of Optuna has written."""


class StoreFullError(StorageError, OSError):
    """No space left for the database or for an artifact; what was finished before is intact."""


class StoreBusyError(StorageError, TimeoutError):
    """Another process has held the SQLite file, or rows on a server, for longer than its timeout."""


class StoreReadOnlyError(StorageError, PermissionError):
    """A write to a store that may only be read."""


class StudyNameError(StorageError, ValueError):
    """A name that no study can have."""


class StudyNotFoundError(StorageError, KeyError):
    """A study that the store does not hold; the message suggests those that it does."""

    __str__ = Exception.__str__  # KeyError would put the message in quotes


class StudyIdentityError(StorageError, ValueError):
    """A stored study that another search has made; after its first line the message has one line per difference."""

    def __init__(self, message: str, differences: tuple[Difference, ...] = ()) -> None:
        super().__init__("\n".join([message, *(f"  {difference}" for difference in differences)]))
        self.differences = differences


class StudyInUseError(StorageError, RuntimeError):
    """A study that another process drives; the message says which, where that is known."""

    def __init__(self, study_name: str, holder: LeaseHolder | None) -> None:
        super().__init__(
            f"Study {study_name!r} is driven by {holder or 'another process'}; wait until it ends, or stop it."
        )
        self.holder = holder


class LeaseLostError(StudyInUseError):
    """A study that another process has taken over while this one could not be reached; nothing more is written."""

    def __init__(self, study_name: str, holder: LeaseHolder | None) -> None:
        RuntimeError.__init__(
            self,
            f"Study {study_name!r} has been taken over by {holder or 'another process'} while the connection of this "
            "launch to the store was lost; it goes on there, and what had finished here is kept.",
        )
        self.holder = holder


class TrialResultError(StorageError, ValueError):
    """A result that cannot be stored, because a number is not finite or a value is not JSON."""


class AfterTrialError(StorageError, RuntimeError):
    """A sampler whose `after_trial` raised, which is the cause; the trial is stored all the same."""


class TrialNotRunningError(StorageError, RuntimeError):
    """A trial whose state does not allow to finish, fail or release it."""


class TrialAlreadyFinishedError(TrialNotRunningError):
    """A trial that has been finished before; its stored result is left as it is."""


class TrialNotWaitingError(StorageError, RuntimeError):
    """A trial that cannot be claimed, because it is not WAITING."""


class ArtifactsMismatchError(StorageError, ValueError):
    """Files of artifacts that are another store's, as `HPO_ARTIFACTS` says where they are."""


class RoleError(StorageError, PermissionError):
    """A role of a database that cannot be made one that only reads."""


class DashboardAddressError(StorageError, OSError):
    """An address that the dashboard cannot be served on."""
