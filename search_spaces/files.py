"""Files that are there whole or not at all."""

import os
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(target: Path, content: bytes) -> None:
    """Writes a file, which is never seen half-written.

    Args:
        target: In a directory that exists; replaced where it is a file.
        content: All of the file.

    Raises:
        OSError: There is no room or permission; a file that was there before is left as it was.
    """
    temporary = target.parent / f".{os.urandom(8).hex()}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
