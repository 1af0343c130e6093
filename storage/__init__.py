"""The study store: studies, trials, curves and artifacts in any database that Optuna takes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.artifacts import ArtifactRecord
    from storage.errors import StorageError
    from storage.identity import Difference, differences
    from storage.lease import LeaseHolder
    from storage.measurements import MeasurementRecord
    from storage.patience import Patience
    from storage.store import StudyStore
    from storage.summaries import StudySummary
    from storage.trials import TrialResult
    from storage.urls import default_storage_url, mask_password

__all__ = [
    "ArtifactRecord",
    "Difference",
    "LeaseHolder",
    "MeasurementRecord",
    "Patience",
    "StorageError",
    "StudyStore",
    "StudySummary",
    "TrialResult",
    "default_storage_url",
    "differences",
    "mask_password",
]

_MODULE_OF = {
    "ArtifactRecord": "artifacts",
    "Difference": "identity",
    "LeaseHolder": "lease",
    "MeasurementRecord": "measurements",
    "Patience": "patience",
    "StorageError": "errors",
    "StudyStore": "store",
    "StudySummary": "summaries",
    "TrialResult": "trials",
    "default_storage_url": "urls",
    "differences": "identity",
    "mask_password": "urls",
}


def __getattr__(name: str) -> Any:
    # Optuna and SQLAlchemy take a while to import; a URL or an error needs neither.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
