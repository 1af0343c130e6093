"""`hpo launch`, timed by phase.

    python benchmarks/timed_launch.py --study s --storage sqlite:///s.db ...

Prints, after what the command prints, a line of JSON: of each phase its wall seconds and its process CPU seconds; the
CPU seconds of the thread that computes trials; the driver's CPU seconds in asking for trials; and the wall seconds from
the process's start to its first finished trial.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from hpo.progress import Progress, TrialReport

_START = time.monotonic()

HERE = Path(__file__).resolve().parent


class Stopwatch:
    """A `Progress` that notes when each phase began, and what CPU time this process had taken by then."""

    def __init__(self) -> None:
        self.began: dict[str, tuple[float, float]] = {}
        self.first_trial_s: float | None = None

    def phase(self, name: str, total: int | None = None, done: int = 0) -> None:
        """See `Progress.phase`."""
        self.began[name.partition(",")[0]] = (time.monotonic(), time.process_time())

    def trial(self, report: TrialReport) -> None:
        """See `Progress.trial`."""
        if self.first_trial_s is None:
            self.first_trial_s = time.monotonic() - _START

    def stages(self, stages: Mapping[int, str]) -> None:
        """See `Progress.stages`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def seconds(self) -> dict[str, tuple[float, float]]:
        """Wall and CPU seconds of each phase."""
        moments = [*self.began.values(), (time.monotonic(), time.process_time())]
        return {
            name: (end[0] - start[0], end[1] - start[1])
            for name, start, end in zip(self.began, moments, moments[1:], strict=False)
        }


class Thread:
    """CPU seconds that a function takes, of the thread that calls it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - start

        return call


def timed_launch(arguments: Sequence[str]) -> dict[str, Any]:
    """A launch in a process of its own, with one thread: what it prints in the end."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Launches."""
    sys.path.insert(0, str(HERE.parent))
    import hpo.executors.local
    import hpo.progress
    from hpo.cli import cli
    from storage.store import StudyStore

    stopwatch, computing, asking = Stopwatch(), Thread(), Thread()
    progress: Progress = stopwatch
    hpo.progress.make_progress = lambda *arguments: progress
    hpo.executors.local.compute = computing.timed(hpo.executors.local.compute)
    hpo.executors.local.prepare = computing.timed(hpo.executors.local.prepare)
    StudyStore.ask = asking.timed(StudyStore.ask)  # type: ignore[method-assign]
    if status := cli(["launch", *sys.argv[1:]], prog_name="hpo", standalone_mode=False):
        sys.exit(status)
    result = {
        "phases": stopwatch.seconds(),
        "computing_s": computing.seconds,
        "asking_s": asking.seconds,
        "first_trial_s": stopwatch.first_trial_s,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
