"""A launch as a process on the real digits: interrupted, killed, resumed, and met by a second one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from optuna.trial import TrialState

from hpo.driver import CONFIRMATION
from hpo.trials import role
from storage.store import StudyStore

SMALL = "--exact --rates 0,0.2,0.4,0.6,0.8 --evaluation-images 100 --confirmation-share 0.2"


class Launch:
    """A running `hpo launch` whose log can be waited for."""

    def __init__(self, url, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hpo.cli", "launch", *SMALL.split(), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HPO_STORAGE": url, "OMP_NUM_THREADS": "1"},
        )

    def wait_for(self, beginning):
        for line in self.process.stderr:
            if line.startswith(beginning):
                return
        raise AssertionError(f"no line begins with {beginning!r}")

    def end(self):
        stdout, stderr = self.process.communicate(timeout=120)
        return self.process.returncode, stdout, stderr


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'studies.db'}"


@pytest.fixture
def launch(url):
    launches = []

    def start(*arguments):
        launches.append(Launch(url, *arguments))
        return launches[-1]

    yield start
    for each in launches:
        each.process.kill()
        each.process.communicate()


def stored(url):
    with StudyStore.open(url, read_only=True) as store:
        study = store.load("digits")
        return study.get_trials(), study.user_attrs


def results(trials):
    return [(trial.number, role(trial), trial.params, trial.value, trial.intermediate_values) for trial in trials]


def test_an_interrupted_and_killed_launch_loses_nothing_and_resumes(launch, url):
    complete = []
    for number, moment in ((signal.SIGINT, "3/10"), (signal.SIGTERM, "1/4")):
        interrupted = launch("--n-trials", "4")
        interrupted.wait_for(f"{moment}  trial")
        start = time.monotonic()
        interrupted.process.send_signal(number)
        code, stdout, stderr = interrupted.end()
        assert time.monotonic() - start < 15
        assert (code, stdout) == (130, "")
        assert stderr.endswith(
            f"Interrupted: no finished trial is lost. To go on:\n  hpo launch {SMALL} --n-trials 4\n"
        )
        before, _ = stored(url)
        states = Counter(trial.state for trial in before)
        assert TrialState.RUNNING not in states
        assert states[TrialState.WAITING] <= 1
        assert results(before)[: len(complete)] == results(complete)
        complete = [trial for trial in before if trial.state == TrialState.COMPLETE]

    killed = launch("--n-trials", "4")
    n_searched = sum(role(trial) == "search" for trial in complete)
    killed.wait_for(f"{n_searched + 1}/4  trial")
    killed.process.kill()
    killed.end()
    code, stdout, _ = launch("--n-trials", "4").end()
    assert code == 0
    assert stdout.startswith("Study digits: 4 of 4 trials, 10 heuristics, metric auc.")
    after, attributes = stored(url)
    assert {trial.state for trial in after} == {TrialState.COMPLETE}
    assert results(after)[: len(complete)] == results(complete)
    assert len(after) == 14
    assert Counter(trial.user_attrs.get("heuristic") for trial in after)[None] == 4
    assert CONFIRMATION in attributes


def test_a_second_launcher_is_told_who_drives(launch, url):
    first = launch("--n-trials", "400")
    first.wait_for("1/10  trial")
    code, stdout, stderr = launch("--n-trials", "400").end()
    assert (code, stdout) == (1, "")
    assert stderr.startswith(f"Error: Study 'digits' is driven by pid {first.process.pid} on host ")
    # Readers need no lease.
    status = subprocess.run(
        [sys.executable, "-m", "hpo.cli", "status", "--storage", url, "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(status.stdout)["study"] == "digits"
    first.process.send_signal(signal.SIGINT)
    assert first.end()[0] == 130
