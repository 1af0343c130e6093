"""Processes of Python that need not import what others have: forks of a server, used like `subprocess.Popen`.

Each is a process of its own, with its own pid, pipes, directory and environment, that can be killed as any other.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import IO
from unittest.mock import patch

PRELOADED = ("storage.engine", "storage.roles", "storage.store", "optuna_dashboard._app", "stand_in")
"""What the server imports, once."""

_HERE = Path(__file__).resolve().parent


def fork_context() -> ForkServerContext:
    """A context of `multiprocessing` whose processes are forks of one that has imported `PRELOADED`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    path = [str(_HERE), str(_HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path)):  # the server doesn't inherit `sys.path`
        forkserver.ensure_running()
    return context


class ForkedPython:
    """Runs code as `python -W error -c` does.

    Args:
        code: Of the program.
        arguments: `sys.argv[1:]`.
        environment: All of it.
    """

    def __init__(self, code: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        context = fork_context()
        (stdin, ours), (output, stdout), (errors, stderr) = (context.Pipe(duplex=False) for _ in range(3))
        theirs = (stdin, stdout, stderr)
        self._process = context.Process(target=_run, args=(code, list(arguments), dict(environment), theirs))
        self._process.start()
        self.stdin: IO[str] = os.fdopen(os.dup(ours.fileno()), "w")
        self.stdout: IO[str] = os.fdopen(os.dup(output.fileno()))
        self.stderr: IO[str] = os.fdopen(os.dup(errors.fileno()))
        for end in (*theirs, ours, output, errors):
            end.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired("python", timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Ends its input, and reads what it still says until it ends."""
        with suppress(BrokenPipeError):
            self.stdin.close()
        texts = {"stdout": "", "stderr": ""}

        def read(name: str) -> None:
            with getattr(self, name) as end:
                texts[name] = end.read()

        readers = [threading.Thread(target=read, args=(n,), daemon=True) for n in texts if not getattr(self, n).closed]
        deadline = time.monotonic() + (3600.0 if timeout is None else timeout)
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(deadline - time.monotonic())
        self.wait(max(0.0, deadline - time.monotonic()))
        return texts["stdout"], texts["stderr"]

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(code: str, arguments: Sequence[str], environment: Mapping[str, str], ends: tuple[Connection, ...]) -> None:
    """The life of a forked process; what `os._exit` leaves out at its end is done as well."""
    for descriptor, end in enumerate(ends):
        os.dup2(end.fileno(), descriptor)
        end.close()
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    warnings.simplefilter("error")
    sys.argv = ["-c", *arguments]
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()
