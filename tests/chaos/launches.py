"""Launches of the stub study as processes: started, killed, and started again until the study is finished."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from chaos.invariants import MARK, Tally, Witness, assert_invariants, assert_no_orphans, marked
from chaos.launcher import KILL_AT
from chaos.stub import StubSettings
from forked_python import ForkedPython

from search_spaces.spaces import SearchSpace, load_space

FULL = os.environ.get("HPO_CHAOS") == "full"
full_only = pytest.mark.skipif(not FULL, reason="is part of the whole suite, see tests/chaos/README.md")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GRID_6, GRID_60 = str(HERE / "grid6.toml"), str(HERE / "grid60.toml")
EXIT_INTERRUPTED = 130
RAY = ("--executor", "ray", "--workers", "4", "--cpus-per-trial", "0.25", "--trials-per-batch", "2")


class Launch:
    """A running launcher in a session of its own; forked from a process with all its imports, unless it starts Ray.

    Attributes:
        mark: In the environment of its process, and the directory that it runs in: both are inherited.
    """

    def __init__(self, arguments: list[str], directory: Path, environment: Mapping[str, str], mark: str) -> None:
        self.mark = mark
        own = directory / mark
        own.mkdir()
        self._log = own / "log"
        environment = {**os.environ, **environment, MARK: mark}
        self.process: ForkedPython | subprocess.Popen[bytes]
        with self._log.open("wb") as log:
            if "ray" in arguments:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "chaos.launcher", *arguments],
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    cwd=own,
                    env=environment,
                    start_new_session=True,
                )
            else:
                code = "from chaos.launcher import main; main()"
                self.process = ForkedPython(code, arguments, environment, directory=own, log=log)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, text: str, timeout_s: float = 60.0) -> None:
        """Return once the log holds a text."""
        deadline = time.monotonic() + timeout_s
        while text not in self.log:
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {text!r}: {self.log}"
            assert time.monotonic() < deadline, f"no {text!r} in {timeout_s} s: {self.log}"
            time.sleep(0.05)

    def press_ctrl_c(self) -> None:
        """SIGINT to all processes that a terminal would send it to."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def end(self, timeout_s: float = 300.0) -> int:
        """Wait for the end; the exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s: {self.log}") from None


@dataclass
class ChaosStudy:
    """A study of the stub, and everything that is done to it.

    Attributes:
        url: The store.
        directory: Where its processes run.
        artifacts: The store's artifacts.
        space_path: What is searched.
        sampler: Who chooses.
        n_trials: The budget; None for the whole grid.
        options: More options of `hpo launch`.
        settings: Of the stub.
        witness_url: Where to watch it, if not at `url`.
        environment: More of its processes' environment.
        mark: Begins the marks of its launches.
    """

    url: str
    directory: Path
    artifacts: Path
    space_path: str = GRID_60
    sampler: str = "grid"
    n_trials: int | None = None
    options: tuple[str, ...] = ()
    settings: StubSettings = field(default_factory=StubSettings)
    witness_url: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self._launches: list[Launch] = []
        self.witness = Witness(self.witness_url or self.url)

    @property
    def space(self) -> SearchSpace:
        return load_space(self.space_path)

    def start(self, *options: str, url: str | None = None, kill_at: str = "", **environment: str) -> Launch:
        """Start a launcher; `kill_at` as in `chaos.launcher`."""
        arguments = ["launch", "--study", "s", "--space", self.space_path, "--sampler", self.sampler, *self.options]
        if self.n_trials is not None:
            arguments += ["--n-trials", str(self.n_trials)]
        own = {
            "HPO_ARTIFACTS": str(self.artifacts),
            "HPO_STORAGE": url or self.url,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
            KILL_AT: kill_at,
        }
        environment = {**own, **self.settings.to_environment(), **self.environment, **environment}
        mark = f"{self.mark}-{len(self._launches):03}"
        self._launches.append(Launch([*arguments, *options], self.directory, environment, mark))
        return self._launches[-1]

    def run(self, *options: str, timeout_s: float = 300.0) -> Launch:
        """Launch, and see it end well."""
        launch = self.start(*options)
        assert launch.end(timeout_s) == 0, launch.log
        return launch

    def run_killed(self, lives_s: Iterable[float], *options: str) -> int:
        """Launch, kill the driver after some seconds, and launch again at once, until the study is finished.

        Args:
            lives_s: How long each driver may live; the study is to be finished before they end.
            options: More options of `hpo launch`.

        Returns:
            How many drivers were killed.
        """
        former: Launch | None = None
        for n_killed, life_s in enumerate(lives_s):
            launch = self.start(*options)
            start = time.monotonic()
            if former is not None:
                assert_no_orphans(former.mark)
            try:
                code = launch.process.wait(max(0.0, start + life_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                launch.kill()
                former = launch
                continue
            assert code == 0, launch.log
            return n_killed
        raise AssertionError(f"not finished: {self._launches[-1].log}")

    def check(self, *, finished: bool = True) -> Tally:
        """Assert the invariants."""
        return assert_invariants(
            self.witness_url or self.url,
            self.artifacts,
            self.space,
            self.settings,
            sampler=self.sampler,
            n_trials=self.n_trials,
            witness=self.witness,
            mark=self.mark,
            finished=finished,
        )

    def end_all(self) -> None:
        """Leave nothing behind, whatever a test has come to."""
        for launch in self._launches:
            launch.kill()
        for pid in marked(self.mark):
            os.kill(pid, signal.SIGKILL)
