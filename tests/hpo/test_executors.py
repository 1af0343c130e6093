import threading
import time

import pytest

from hpo.executors import Job, Outcome
from hpo.executors.local import LocalExecutor
from objectives.errors import RelevanceError, TrainingError
from search_spaces.errors import SpaceError
from search_spaces.heuristics import HEURISTICS

ZPLUS = HEURISTICS["zplus"]


class Stub:
    def __init__(self, evaluate, prepare=lambda composites: None):
        self.evaluate = lambda composite, images: evaluate(composite)
        self.prepare = prepare


def raise_(error):
    raise error


def test_a_job_has_its_evaluation(make_problem):
    with LocalExecutor(make_problem()) as executor:
        assert executor.n_workers == 1
        executor.submit([Job(3, ZPLUS, "confirmation")])
        outcome = executor.wait(10)
    assert outcome.job == Job(3, ZPLUS, "confirmation")
    assert outcome.failure is None
    assert outcome.evaluation.figures["auc"] > 0


def test_nothing_has_ended_yet(make_problem):
    with LocalExecutor(make_problem()) as executor:
        assert executor.wait(0.01) is None


@pytest.mark.parametrize(
    ("error", "failure", "cause"),
    [
        (SpaceError("Write it so."), "Write it so.", "objective"),
        (RelevanceError("No relevance."), "No relevance.", "composite"),
        (TrainingError("It diverged."), "It diverged.", "composite"),
        (ZeroDivisionError("by 0"), "ZeroDivisionError: by 0", "objective"),
        (SystemExit(3), "SystemExit: 3", "objective"),
        (StopIteration(), "StopIteration", "objective"),
        (RuntimeError("size mismatch:\n\t2 != 3\n"), "RuntimeError: size mismatch: 2 != 3", "objective"),
    ],
)
def test_an_error_is_an_outcome(error, failure, cause):
    with LocalExecutor(Stub(lambda composite: raise_(error))) as executor:
        executor.submit([Job(0, ZPLUS)])
        outcome = executor.wait(10)
        assert (outcome.failure, outcome.cause) == (failure, cause)
        executor.submit([Job(1, ZPLUS)])
        assert executor.wait(10).job.number == 1


def test_leaving_does_not_wait_for_a_running_job():
    running, end = threading.Event(), threading.Event()

    def evaluate(composite):
        running.set()
        end.wait(60)

    start = time.monotonic()
    with LocalExecutor(Stub(evaluate)) as executor:
        executor.submit([Job(0, ZPLUS)])
        assert running.wait(10)
    assert time.monotonic() - start < 30  # the job would take 60 seconds
    end.set()


def test_who_leaves_when_all_is_done_waits_for_the_thread_to_end():
    freed = threading.Event()

    class Tensors:
        def __del__(self):
            time.sleep(0.5)
            freed.set()

    with LocalExecutor(Stub(lambda composite: Tensors())) as executor:
        executor.submit([Job(0, ZPLUS)])
        assert executor.wait(10) is not None
    # Else the interpreter may end meanwhile, which aborts the process.
    assert freed.is_set()


def test_an_executor_says_how_far_its_job_is():
    running, end = threading.Event(), threading.Event()
    worker = Stub(lambda composite: running.set() or end.wait(60))
    worker.stage = "35 % pruned"
    with LocalExecutor(worker) as executor:
        assert executor.stages() == {}
        executor.submit([Job(4, ZPLUS)])
        assert running.wait(10)
        assert executor.stages() == {4: "35 % pruned"}
        end.set()


def test_a_batch_is_prepared_whole_and_computed_in_order():
    prepared = []
    worker = Stub(lambda composite: raise_(SpaceError(composite.key)), prepare=prepared.append)
    batch = [Job(0, ZPLUS), Job(1, HEURISTICS["epsilon"])]
    with LocalExecutor(worker) as executor:
        executor.submit(batch)
        assert [executor.wait(10).job for _ in batch] == batch
    assert prepared == [[job.composite for job in batch]]


def test_a_failed_preparation_fails_no_trial(make_problem):
    problem = make_problem()
    with LocalExecutor(Stub(lambda composite: problem.evaluate(composite, "search"), prepare=int)) as executor:
        executor.submit([Job(0, ZPLUS)])
        assert executor.wait(10).evaluation is not None


def test_an_outcome_is_one_thing_or_the_other():
    with pytest.raises(ValueError, match="an evaluation, a lost race or a failure"):
        Outcome(Job(0, ZPLUS))


def test_a_failure_has_a_cause():
    with pytest.raises(ValueError, match="a cause where it failed"):
        Outcome(Job(0, ZPLUS), failure="No.")
