"""The command line `hpo` as a process of its own on the stub problem, killed at a step on demand.

    PYTHONPATH=tests python -m chaos.launcher launch --study s --storage sqlite:///s.db

`HPO_CHAOS_KILL_AT=finish:before:3` kills it before the third call of `StudyStore.finish`, `finish:after:3` after it;
`commit` in place of a method counts the transactions of the process, Optuna's too.
"""

import functools
import os
import signal
import sys
import time
from typing import Any

from chaos.stub import StubProblem, StubSettings

KILL_AT = "HPO_CHAOS_KILL_AT"
ASK_LOG = "HPO_CHAOS_ASK_LOG"


def load_stub(*arguments: Any, **options: Any) -> StubProblem:
    """Takes the place of `hpo.problem.load_problem`."""
    return StubProblem(StubSettings.of_environment())


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """Kills this process at the N-th call."""

    def __init__(self, count: int) -> None:
        self._left = count

    def __call__(self, *arguments: Any) -> None:
        self._left -= 1
        if self._left == 0:
            die()


def kill_at(point: str) -> None:
    """Have this process die at a step of the store, as `METHOD:before|after:N`."""
    from sqlalchemy.engine.default import DefaultDialect

    from storage.store import StudyStore

    name, when, count = point.split(":")
    owner, method = (DefaultDialect, "do_commit") if name == "commit" else (StudyStore, name)
    original, tick = getattr(owner, method), Countdown(int(count))

    @functools.wraps(original)
    def counted(*arguments: Any, **options: Any) -> Any:
        if when == "before":
            tick()
        returned = original(*arguments, **options)
        if when == "after":
            tick()
        return returned

    setattr(owner, method, counted)


def log_asks(path: str) -> None:
    """Write the seconds that each ask takes, one a line."""
    from storage.store import StudyStore

    original = StudyStore.ask

    @functools.wraps(original)
    def ask(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        returned = original(*arguments, **options)
        with open(path, "a") as log:
            log.write(f"{time.perf_counter() - start:.6f}\n")
        return returned

    StudyStore.ask = ask  # type: ignore[method-assign]


def main() -> None:
    import hpo.study
    from hpo.cli import main as command_line

    hpo.study.load_problem = load_stub  # type: ignore[assignment]
    if point := os.environ.get(KILL_AT):
        kill_at(point)
    if path := os.environ.get(ASK_LOG):
        log_asks(path)
    sys.exit(command_line())


if __name__ == "__main__":
    main()
