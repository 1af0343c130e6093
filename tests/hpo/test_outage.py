"""A driver whose database goes away, and comes back or does not."""

import threading
import time

import pytest
from optuna.artifacts import get_all_artifact_meta
from optuna.trial import TrialState
from stand_in import StandInProblem, drive_study

from hpo.errors import Interrupted
from storage.errors import StoreUnreachableError
from storage.patience import Patience
from storage.store import StudyStore


@pytest.fixture
def server(new_postgresql):
    return new_postgresql()


@pytest.fixture
def url(server):
    return server.new_database()


def at_call(problem, n, act):
    """Have a problem do something else before its Nth evaluation."""
    evaluate = problem.evaluate

    def evaluate_and_act(composite, images):
        if len(problem.calls) == n:
            act()
        return evaluate(composite, images)

    problem.evaluate = evaluate_and_act


@pytest.fixture
def heard():
    return []


def test_an_outage_is_waited_out(server, url, heard):
    problem = StandInProblem()

    def crash():
        server.stop()
        threading.Timer(2.0, server.start).start()

    at_call(problem, 13, crash)
    drive_study(url, problem, n_trials=6, pictures=True, patience=Patience(60, notify=heard.append))
    assert len(heard) == 2
    assert heard[0].endswith("Waiting for it, at most 60 s.")
    assert heard[1].endswith("s; the study goes on.")
    with StudyStore.open(url, read_only=True) as store:
        trials = store.load("s").get_trials()
        assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 16
        for trial in trials:
            artifacts = get_all_artifact_meta(trial, storage=store.storage)
            assert sorted(artifact.filename for artifact in artifacts) == ["curve.csv", "curve.png"]


def test_a_store_that_stays_away_ends_the_launch(server, url):
    problem = StandInProblem()
    at_call(problem, 13, server.stop)
    start = time.monotonic()
    with pytest.raises(StoreUnreachableError, match=r"longer than --store-timeout \(2 s\)"):
        drive_study(url, problem, n_trials=6, pictures=True, patience=Patience(2, notify=print))
    assert time.monotonic() - start < 30  # it is waited for once, not at every step of leaving
    server.start()
    drive_study(url, problem, n_trials=6)
    with StudyStore.open(url, read_only=True) as store:
        assert [trial.state for trial in store.load("s").get_trials()] == [TrialState.COMPLETE] * 16


def test_ctrl_c_ends_the_waiting(server, url):
    problem, stop = StandInProblem(), threading.Event()
    at_call(problem, 13, server.stop)
    patience = Patience(300, stop, notify=lambda message: threading.Timer(0.5, stop.set).start())
    start = time.monotonic()
    with pytest.raises(Interrupted):
        drive_study(url, problem, n_trials=6, stop=stop, patience=patience)
    assert time.monotonic() - start < 60
