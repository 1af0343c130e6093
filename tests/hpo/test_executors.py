import threading
import time

import pytest

from hpo.errors import ConfigurationError
from hpo.executors import Job, Outcome, make_executor
from objectives.errors import RelevanceError
from search_spaces.errors import SpaceError
from search_spaces.heuristics import HEURISTICS

ZPLUS = HEURISTICS["zplus"]


def test_a_job_has_its_evaluation(make_problem):
    with make_executor("local", make_problem().evaluate) as executor:
        assert executor.n_workers == 1
        executor.submit(Job(3, ZPLUS, "confirmation"))
        outcome = executor.wait(10)
    assert outcome.job == Job(3, ZPLUS, "confirmation")
    assert outcome.failure is None
    assert outcome.evaluation.figures["auc"] > 0


def test_nothing_has_ended_yet(make_problem):
    with make_executor("local", make_problem().evaluate) as executor:
        assert executor.wait(0.01) is None


@pytest.mark.parametrize(
    ("error", "failure", "by_composite"),
    [
        (SpaceError("Write it so."), "Write it so.", False),
        (RelevanceError("No relevance."), "No relevance.", True),
        (ZeroDivisionError("by 0"), "ZeroDivisionError: by 0", False),
        (SystemExit(3), "SystemExit: 3", False),
    ],
)
def test_an_error_is_an_outcome(error, failure, by_composite):
    def evaluate(composite, images):
        raise error

    with make_executor("local", evaluate) as executor:
        executor.submit(Job(0, ZPLUS))
        outcome = executor.wait(10)
        assert (outcome.failure, outcome.by_composite) == (failure, by_composite)
        executor.submit(Job(1, ZPLUS))
        assert executor.wait(10).job.number == 1


def test_leaving_does_not_wait_for_a_running_job():
    running, end = threading.Event(), threading.Event()

    def evaluate(composite, images):
        running.set()
        end.wait(60)

    start = time.monotonic()
    with make_executor("local", evaluate) as executor:
        executor.submit(Job(0, ZPLUS))
        assert running.wait(10)
    assert time.monotonic() - start < 30  # the job would take 60 seconds
    end.set()


def test_unknown_executors_are_refused():
    with pytest.raises(ConfigurationError, match=r"Unknown executor 'locla'\. Did you mean 'local'\?"):
        make_executor("locla", lambda composite, images: None)


def test_an_outcome_is_one_thing_or_the_other():
    with pytest.raises(ValueError, match="either an evaluation or a failure"):
        Outcome(Job(0, ZPLUS))
