"""Progress of a study: a live display on a terminal, else a log line per trial."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["LiveProgress", "LogProgress", "Progress", "TrialReport", "make_progress"]

_SILENCE_S = 30

_log = logging.getLogger("hpo")


@dataclass(frozen=True, slots=True)
class TrialReport:
    """What is said about a trial that has ended.

    Attributes:
        number: Its number in the study.
        label: Its composite, and the heuristic's name if it is one.
        value: Its value; None if it failed or was given up.
        seconds: What it took; None where an equal trial's value was reused.
        remark: Why it failed or was given up, or which trial it equals.
        best: Best value so far among search trials and heuristics of the space; None if there is none.
        best_heuristic: Best value of a heuristic; None if there is none.
        failed: Whether it failed.
        figure: Which figure the value is, where it isn't the study's metric.
    """

    number: int
    label: str
    value: float | None
    seconds: float | None
    remark: str
    best: float | None
    best_heuristic: float | None
    failed: bool = False
    figure: str | None = None


class Progress(Protocol):
    """Tells the user how far a study is. A context manager; used by the driver's thread only."""

    def phase(self, name: str, total: int | None = None, done: int = 0) -> None:
        """A new phase begins: `total` trials, of which `done` are there already; None for work without trials."""
        ...

    def trial(self, report: TrialReport) -> None:
        """A trial has ended."""
        ...

    def stages(self, stages: Mapping[int, str]) -> None:
        """How far trials at work are, by their numbers; told several times a second."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class LogProgress:
    """A log line per phase and per trial."""

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._said = time.monotonic()
        self._total: int | None = None
        self._done = 0

    def phase(self, name: str, total: int | None = None, done: int = 0) -> None:
        """See `Progress.phase`."""
        self._total, self._done = total, done
        _log.info("%s%s", name, "" if total is None else f" ({done} of {total} done)")

    def stages(self, stages: Mapping[int, str]) -> None:
        """See `Progress.stages`; a line where nothing was said for half a minute."""
        if stages and time.monotonic() - self._said >= _SILENCE_S:
            self._said = time.monotonic()
            _log.info("%s", _stages(stages))

    def trial(self, report: TrialReport) -> None:
        """See `Progress.trial`."""
        self._said = time.monotonic()
        self._done += 1
        seconds = "" if report.seconds is None else f"  {report.seconds:.1f} s"
        outcome = report.remark if report.value is None else f"{report.figure or self._metric} {report.value:.4f}"
        remark = f"  ({report.remark})" if report.remark and report.value is not None else ""
        best = f"  best {_value(report.best)}  best heuristic {_value(report.best_heuristic)}"
        _log.info(
            "%d/%d  trial %d  %s%s%s%s  %s",
            self._done,
            self._total or self._done,
            report.number,
            outcome,
            remark,
            "" if report.best is None and report.best_heuristic is None else best,
            seconds,
            report.label,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


class LiveProgress:
    """One line at the bottom of the terminal: phase, trials done of all, best against best heuristic, time left."""

    def __init__(self, console: "Console") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[stages]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, values="", left="", stages="")
        self._done = 0
        self._total: int | None = None
        self._evaluated = 0
        self._began = time.monotonic()

    def phase(self, name: str, total: int | None = None, done: int = 0) -> None:
        """See `Progress.phase`."""
        self._done, self._total, self._evaluated, self._began = done, total, 0, time.monotonic()
        self._bar.update(self._task, description=name, total=total, completed=done, left="", stages="")

    def trial(self, report: TrialReport) -> None:
        """See `Progress.trial`."""
        self._done += 1
        self._evaluated += 1
        self._bar.update(self._task, stages="")
        self._bar.update(
            self._task,
            completed=self._done,
            values=f"best {_value(report.best)}, heuristic {_value(report.best_heuristic)}",
            left=self._time_left(),
        )
        if report.failed:
            self._bar.console.print(f"Trial {report.number} {report.remark}", highlight=False, markup=False)

    def stages(self, stages: Mapping[int, str]) -> None:
        """See `Progress.stages`."""
        self._bar.update(self._task, stages=_stages(stages))

    def _time_left(self) -> str:
        if self._total is None:
            return ""
        # The mean of this launch: reused trials cost nothing and belong in it.
        seconds = (time.monotonic() - self._began) / self._evaluated * max(0, self._total - self._done)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left"

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


def make_progress(metric: str, console: "Console") -> Progress:
    """The display that suits the console: live on a terminal, log lines elsewhere."""
    return LiveProgress(console) if console.is_terminal else LogProgress(metric)


def _stages(stages: Mapping[int, str]) -> str:
    return ", ".join(f"trial {number}: {stage}" for number, stage in sorted(stages.items()))


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
