"""The cache, in a directory of its own."""

import os
import time
from datetime import timedelta

from objectives.cache import clear_directories


def test_what_nobody_has_written_to_for_long_goes(tmp_path):
    """A checkpoint that is written again keeps its directory, which says when."""
    for name in ("old", "used"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - 3600,) * 2)
    (tmp_path / "used" / "step.safetensors").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    os.utime(tmp_path / "file", (0, 0))
    clear_directories(tmp_path, timedelta(minutes=30))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "used"]
    clear_directories(tmp_path / "missing", timedelta(0))
