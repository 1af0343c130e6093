"""The cache: what takes long to compute again, and may be removed at any time."""

import os
from pathlib import Path

import platformdirs

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """`HPO_CACHE`, or the user's cache directory; it need not exist."""
    return Path(os.environ.get("HPO_CACHE") or platformdirs.user_cache_dir("pruning-hpo"))
