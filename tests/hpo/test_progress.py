import io
import logging

import pytest
from rich.console import Console

from hpo.progress import LiveProgress, LogProgress, TrialReport, make_progress

COMPLETE = TrialReport(12, "ZPlus/ZPlus/ZPlus/ZPlus", 0.25, 1.24, "", 0.5, 0.4)
REUSED = TrialReport(13, "ZPlus/ZPlus/ZPlus/ZPlus", 0.25, None, "equals trial 12", 0.5, None)
FAILED = TrialReport(14, "ZPlus/ZPlus/ZPlus/ZPlus", None, None, "failed: no memory", None, None, failed=True)
GIVEN_UP = TrialReport(15, "ZPlus/ZPlus/ZPlus/ZPlus", None, 0.3, "given up against trial 12", 0.5, 0.4)


def test_a_log_line_per_trial(caplog):
    caplog.set_level(logging.INFO, "hpo")
    with LogProgress("auc") as progress:
        progress.phase("Loading")
        progress.phase("Search", 60, 2)
        for report in (COMPLETE, REUSED, FAILED):
            progress.trial(report)
    assert caplog.messages == [
        "Loading",
        "Search (2 of 60 done)",
        "3/60  trial 12  auc 0.2500  best 0.5000  best heuristic 0.4000  1.2 s  ZPlus/ZPlus/ZPlus/ZPlus",
        "4/60  trial 13  auc 0.2500  (equals trial 12)  best 0.5000  best heuristic -  ZPlus/ZPlus/ZPlus/ZPlus",
        "5/60  trial 14  failed: no memory  ZPlus/ZPlus/ZPlus/ZPlus",
    ]


def test_a_live_line_on_a_terminal():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=140)
    with make_progress("auc", console) as progress:
        assert isinstance(progress, LiveProgress)
        progress.phase("Search", 60, 2)
        progress.trial(FAILED)
        progress.trial(GIVEN_UP)
        progress.trial(COMPLETE)
        progress._bar.refresh()
    shown = text.getvalue()
    for part in ("Search", "5/60", "best 0.5000, heuristic 0.4000", " left", "Trial 14 failed: no memory"):
        assert part in shown
    assert "Trial 15" not in shown  # most trials of a race are given up


def test_how_far_a_trial_is_is_shown(monkeypatch, caplog):
    text = io.StringIO()
    with LiveProgress(Console(file=text, force_terminal=True, width=160)) as progress:
        progress.phase("Search", 60)
        progress.stages({7: "35 % pruned"})
        progress._bar.refresh()
    assert "trial 7: 35 % pruned" in text.getvalue()
    caplog.set_level(logging.INFO, "hpo")
    now = 100.0
    monkeypatch.setattr("hpo.progress.time.monotonic", lambda: now)
    with LogProgress("auc") as log:
        for now, stage in ((110.0, "5 % pruned"), (131.0, "35 % pruned"), (140.0, "40 % pruned")):  # noqa: B007
            log.stages({7: stage})
    assert caplog.messages == ["trial 7: 35 % pruned"]  # half a minute after the last line


@pytest.mark.parametrize(("terminal", "kind"), [(True, LiveProgress), (False, LogProgress)])
def test_the_display_suits_the_console(terminal, kind):
    assert type(make_progress("auc", Console(file=io.StringIO(), force_terminal=terminal))) is kind
