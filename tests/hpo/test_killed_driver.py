"""A driver with one worker, killed at random moments: the study is the one that nobody has interrupted."""

import os
import random
import signal
import threading

import pytest
import stand_in
from forked_python import fork

from hpo.driver import CONFIRMATION
from storage.store import StudyStore

N_TRIALS = 10


def drive(url, sampler, killed_after_s=None):
    if killed_after_s is not None:
        threading.Timer(killed_after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    problem = stand_in.StandInProblem(seconds=0.01)
    stand_in.drive_study(url, problem, sampler_name=sampler, n_trials=N_TRIALS)


def content(url):
    with StudyStore.open(url, read_only=True) as store:
        study = store.load("s")
        trials = [
            (trial.number, trial.state, trial.values, trial.params, trial.intermediate_values, trial.user_attrs)
            for trial in study.get_trials()
        ]
        return trials, study.user_attrs[CONFIRMATION]


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_kills_leave_no_trace(tmp_path, sampler):
    whole, parts = (f"sqlite:///{tmp_path / name}" for name in ("whole.db", "parts.db"))
    drive(whole, sampler)
    generator, exit_codes = random.Random(sampler), []
    while 0 not in exit_codes:
        moment_s = generator.uniform(0.0, 0.6) if len(exit_codes) < 8 else None
        process = fork(drive, parts, sampler, moment_s)
        process.join(120)
        exit_codes.append(process.exitcode)
        assert exit_codes[-1] in (0, -signal.SIGKILL)
    assert exit_codes.count(-signal.SIGKILL) >= 3
    assert content(parts) == content(whole)
