"""An S3 service of the tests' own: moto's server, a process that answers boto3 over HTTP."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STARTS_WITHIN_S = 60.0


@contextmanager
def running_s3_server() -> Iterator[str]:
    """The endpoint of a started service without buckets."""
    # Its log goes to a file: nobody empties a pipe while it runs.
    with tempfile.NamedTemporaryFile(prefix="s3-", suffix=".log") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from moto.server import main; main()", "-p", "0"],
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            yield _endpoint(process, Path(log.name))
        finally:
            process.kill()
            process.wait()


def _endpoint(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _STARTS_WITHIN_S
    while process.poll() is None and time.monotonic() < deadline:
        if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)\n", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"The S3 server does not answer: {log.read_text()}")
