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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO
from unittest.mock import patch

PRELOADED = ("storage.engine", "storage.roles", "storage.store", "optuna_dashboard._app", "stand_in", "chaos.launcher")
"""What the server imports, once."""

_HERE = Path(__file__).resolve().parent


def fork(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """Start a process that calls a function, in the caller's environment and directory as any fork is."""
    process = _fork_context().Process(target=_call, args=(target, arguments, dict(os.environ), str(Path.cwd())))
    process.start()
    return process


def _call(
    target: Callable[..., object], arguments: Sequence[object], environment: Mapping[str, str], directory: str
) -> None:
    _enter(environment, directory)
    target(*arguments)


def _enter(environment: Mapping[str, str], directory: str) -> None:
    """Leave those of the server, which has kept what it found when a test first needed it."""
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    os.chdir(directory)


def _fork_context() -> ForkServerContext:
    """A context of `multiprocessing` whose processes are forks of one that has imported `PRELOADED`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    path = [str(_HERE), str(_HERE.parents[1]), str(_HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path)):  # the server doesn't inherit `sys.path`
        forkserver.ensure_running()
    return context


class ForkedPython:
    """Runs code as `python -c` does.

    Args:
        code: Of the program.
        arguments: `sys.argv[1:]`.
        environment: All of it.
        directory: Where it runs.
        log: Open file that takes what it says, and makes it the head of a session of its own, as a service is.
    """

    def __init__(
        self,
        code: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        directory: Path | None = None,
        log: IO[bytes] | None = None,
    ) -> None:
        context = _fork_context()
        (stdin, ours), (output, stdout), (errors, stderr) = (context.Pipe(duplex=False) for _ in range(3))
        theirs = (stdin, stdout, stderr)
        said = None if log is None else Connection(os.dup(log.fileno()), readable=False)
        life = (code, list(arguments), dict(environment), str(directory or Path.cwd()), theirs, said)
        self._process = context.Process(target=_run, args=life)
        self._process.start()
        if said is not None:
            said.close()
        self.stdin: IO[str] = os.fdopen(os.dup(ours.fileno()), "w")
        self.stdout: IO[str] = os.fdopen(os.dup(output.fileno()))
        self.stderr: IO[str] = os.fdopen(os.dup(errors.fileno()))
        for end in (*theirs, ours, output, errors):
            end.close()
        if log is not None:
            for own in (self.stdin, self.stdout, self.stderr):
                own.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
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

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(
    code: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    directory: str,
    ends: tuple[Connection, Connection, Connection],
    said: Connection | None,
) -> None:
    """The life of a forked process; what `os._exit` leaves out at its end is done as well."""
    stdin, stdout, stderr = ends if said is None else (ends[0], said, said)
    if said is not None:
        os.setsid()
    for descriptor, end in enumerate((stdin, stdout, stderr)):
        os.dup2(end.fileno(), descriptor)
    for end in (*ends, *filter(None, [said])):
        end.close()
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    _enter(environment, directory)
    sys.argv = ["-c", *arguments]
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()
