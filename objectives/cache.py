"""The cache: what takes long to compute again, and may be removed at any time."""

import os
import shutil
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import platformdirs

__all__ = ["cache_directory", "clear_directories"]


def cache_directory() -> Path:
    """`HPO_CACHE`, or the user's cache directory; it need not exist."""
    return Path(os.environ.get("HPO_CACHE") or platformdirs.user_cache_dir("pruning-hpo"))


def clear_directories(parent: Path, unused_for: timedelta) -> None:
    """Removes the directories in another one that nothing was written into for so long; what can't be removed stays."""
    with suppress(OSError):  # there is none
        for directory in parent.iterdir():
            if directory.is_dir() and time.time() - directory.stat().st_mtime > unused_for.total_seconds():
                shutil.rmtree(directory, ignore_errors=True)
