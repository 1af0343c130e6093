"""The driver of many workers that end in any order, die and are replaced."""

import random
from collections import Counter
from contextlib import suppress

import pytest
from optuna.trial import TrialState
from stand_in import RandomOrderExecutor, StandInProblem

from hpo.driver import CONFIRMATION
from hpo.errors import TrialsFailedError
from hpo.trials import composite_of, curve_of, role
from objectives.errors import RelevanceError
from search_spaces.heuristics import HEURISTICS
from storage.store import StudyStore


class Losses:
    """Which jobs are lost: the first `n` evaluations of each composite that is named, or a share of all."""

    def __init__(self, n=0, keys=(), *, share=0.0, images="search", seed=0):
        self.left = Counter(dict.fromkeys(keys, n))
        self.share = share
        self.images = images
        self.random = random.Random(seed)

    def __call__(self, job):
        if job.images != self.images:
            return False
        self.left[job.composite.key] -= 1
        return self.left[job.composite.key] >= 0 or self.random.random() < self.share


def search_trials(study):
    return [trial for trial in study.get_trials() if role(trial) == "search"]


def keys(trials):
    return [composite_of(trial).key for trial in trials]


@pytest.mark.parametrize("seed", range(2))
def test_each_point_of_a_grid_is_complete_once_whatever_is_lost(drive, load, seed):
    executor = RandomOrderExecutor(problem := StandInProblem(), 4, seed=seed, lose=Losses(share=0.25, seed=seed))
    drive(problem, sampler_name="grid", n_trials=40, executor=executor, max_losses=1000)
    study = load()
    assert {trial.state for trial in study.get_trials()} == {TrialState.COMPLETE}
    assert len(set(keys(search_trials(study)))) == len(search_trials(study)) == 40
    assert Counter(trial.user_attrs.get("heuristic") for trial in study.get_trials()) == {
        None: 40,
        **dict.fromkeys(HEURISTICS, 1),
    }
    for trial in study.get_trials():
        assert trial.value == pytest.approx(curve_of(trial).figures()["auc"])
    assert sum(trial.user_attrs.get("losses", 0) for trial in study.get_trials()) >= 5
    assert max(Counter(problem.calls).values()) == 1


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_the_budget_is_met_whatever_is_lost(drive, load, sampler, narrow):
    executor = RandomOrderExecutor(problem := StandInProblem(), 3, lose=Losses(share=0.2))
    drive(problem, space=narrow, sampler_name=sampler, n_trials=25, executor=executor, max_losses=1000)
    trials = search_trials(load())
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 25
    assert max(Counter(problem.calls).values()) == 1
    by_composite = {composite_of(trial).key: trial for trial in reversed(load().get_trials())}
    for trial in trials:
        assert trial.value == by_composite[composite_of(trial).key].value


def test_every_worker_has_a_batch_and_one_to_go_on_with(drive):
    executor = RandomOrderExecutor(problem := StandInProblem(), 3)
    drive(problem, sampler_name="grid", n_trials=80, executor=executor)
    assert executor.most_batches == 6
    batches = [jobs for jobs in executor.submitted if jobs[0].number >= len(HEURISTICS) and jobs[0].images == "search"]
    # Whoever has nothing to do gets one trial at once, and the end is dealt out evenly.
    assert [len(jobs) for jobs in batches[:6]] == [1] * 3 + [8] * 3
    assert [len(jobs) for jobs in batches[-3:]] == [1] * 3
    numbers = [job.number for jobs in batches for job in jobs]
    assert numbers == sorted(numbers), "neighbours of the grid go to one worker"


@pytest.mark.parametrize(("n_workers", "most"), [(1, 1), (2, 4)])
def test_one_worker_learns_from_every_trial(drive, n_workers, most):
    executor = RandomOrderExecutor(problem := StandInProblem(), n_workers)
    drive(problem, n_trials=10, executor=executor)
    assert executor.most_batches == most
    assert {len(jobs) for jobs in executor.submitted if jobs[0].images == "search"} == {1}


def test_equal_composites_in_flight_are_computed_once(drive, load, narrow):
    executor = RandomOrderExecutor(problem := StandInProblem(), 4)
    drive(problem, space=narrow, sampler_name="random", n_trials=24, executor=executor)
    assert max(Counter(problem.calls).values()) == 1
    trials = load().get_trials()
    for trial in trials:
        if (number := trial.user_attrs.get("reused_from")) is not None:
            assert (trial.value, composite_of(trial)) == (trials[number].value, composite_of(trials[number]))
    assert sum("reused_from" in trial.user_attrs for trial in trials) == 24 - 8 + 2


@pytest.mark.parametrize("conduct", ["lost", "failed"])
def test_where_the_first_of_equals_has_no_result_the_next_is_computed(drive, load, narrow, conduct):
    missing = next(composite for composite in narrow.grid() if composite not in HEURISTICS.values())
    problem, calls = StandInProblem(), Counter()
    evaluate = problem.evaluate

    def evaluate_but_the_first(composite, images):
        calls[composite.key] += 1
        if conduct == "failed" and composite == missing and calls[composite.key] == 1:
            raise RelevanceError("no relevance")
        return evaluate(composite, images)

    problem.evaluate = evaluate_but_the_first
    losses = Losses(1, [missing.key] if conduct == "lost" else [])
    executor = RandomOrderExecutor(problem, 8, lose=losses)
    drive(problem, space=narrow, sampler_name="random", n_trials=24, executor=executor)
    states = Counter(trial.state for trial in search_trials(load()))
    assert states == ({TrialState.COMPLETE: 24} if conduct == "lost" else {TrialState.COMPLETE: 23, TrialState.FAIL: 1})
    assert sum(trial.user_attrs.get("losses", 0) for trial in load().get_trials()) == (conduct == "lost")
    assert len({trial.value for trial in search_trials(load()) if composite_of(trial) == missing}) <= 2


@pytest.mark.parametrize("max_losses", [0, 2])
def test_a_trial_that_is_lost_too_often_fails(drive, load, max_losses):
    unlucky = HEURISTICS["zplus"]
    executor = RandomOrderExecutor(problem := StandInProblem(), 2, lose=Losses(100, [unlucky.key]))
    drive(problem, sampler_name="random", n_trials=6, executor=executor, max_losses=max_losses)
    trials = load().get_trials()
    (failed,) = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert composite_of(failed) == unlucky
    times = {0: "once", 2: "3 times"}[max_losses]
    assert failed.user_attrs["failure"] == (
        f"its worker died {times}, and --max-losses is {max_losses}: the process was killed by signal 9"
    )
    assert failed.user_attrs.get("losses", 0) == max_losses
    # Those of its batch were not begun, which is no loss of theirs.
    assert all("losses" not in trial.user_attrs for trial in trials if trial is not failed)


def test_losses_are_counted_over_launches(drive, load):
    unlucky = HEURISTICS["zplus"]
    stopping = RandomOrderExecutor(problem := StandInProblem(), 2, lose=Losses(2, [unlucky.key]))
    wait = stopping.wait

    def wait_until_lost_twice(timeout_s):
        if stopping._lose.left[unlucky.key] == 0:
            raise KeyboardInterrupt
        return wait(timeout_s)

    stopping.wait = wait_until_lost_twice
    with suppress(KeyboardInterrupt):
        drive(problem, n_trials=2, executor=stopping, max_losses=2)
    before = load().get_trials()
    assert TrialState.RUNNING not in {trial.state for trial in before}
    lost = next(trial for trial in before if composite_of(trial) == unlucky)
    assert (lost.state, lost.user_attrs["losses"]) == (TrialState.WAITING, 2)
    drive(problem, n_trials=2, max_losses=2, executor=RandomOrderExecutor(problem, 2, lose=Losses(1, [unlucky.key])))
    assert load().get_trials()[lost.number].user_attrs["failure"].startswith("its worker died 3 times")


def test_workers_that_always_die_end_the_launch(drive, load):
    executor = RandomOrderExecutor(problem := StandInProblem(), 2, lose=Losses(share=1.0))
    with pytest.raises(TrialsFailedError, match=r"6 trials in a row failed, .* because: its worker died 2 times"):
        drive(problem, sampler_name="grid", executor=executor, max_losses=1)
    assert {trial.state for trial in load().get_trials()} == {TrialState.FAIL, TrialState.WAITING}


def test_failures_in_a_row_are_counted_per_worker(drive, load, narrow):
    problem = StandInProblem()
    for composite in list(HEURISTICS.values())[:5]:
        problem.failing[composite.key] = "no memory"
    drive(problem, sampler_name="random", n_trials=2, executor=RandomOrderExecutor(problem, 2, seed=1))
    assert Counter(trial.state for trial in load().get_trials())[TrialState.FAIL] >= 5


def test_progress_says_how_many_workers_there_are(drive, caplog):
    caplog.set_level("INFO", "hpo")
    drive(problem := StandInProblem(), n_trials=2, executor=RandomOrderExecutor(problem, 3))
    phases = [message for message in caplog.messages if "workers" in message]
    assert phases[:2] == ["Heuristics, 3 workers (0 of 10 done)", "Search, 3 workers (0 of 2 done)"]


def test_the_confirmation_runs_on_all_workers_and_outlives_some(drive, load, url):
    wanted = list(HEURISTICS.values())[:3]
    losses = Losses(3, [composite.key for composite in wanted], images="confirmation")
    executor = RandomOrderExecutor(problem := StandInProblem(), 4, lose=losses)
    drive(problem, n_trials=5, executor=executor)
    assert set(load().user_attrs[CONFIRMATION]["heuristics"]) == set(HEURISTICS)
    confirmations = [jobs for jobs in executor.submitted if jobs[0].images == "confirmation"]
    assert [len(jobs) for jobs in confirmations[:3]] == [3] * 3
    assert max(count for (_, images), count in Counter(problem.calls).items() if images == "confirmation") == 1
    with StudyStore.open(url, read_only=True) as store:
        assert all("losses" not in trial.user_attrs for trial in store.load("s").get_trials())


def test_a_confirmation_that_is_lost_too_often_ends_the_launch(drive, load):
    losses = Losses(100, [HEURISTICS["zplus"].key], images="confirmation")
    executor = RandomOrderExecutor(problem := StandInProblem(), 4, lose=losses)
    with pytest.raises(TrialsFailedError, match=r"Trial \d+ could not be confirmed: the process was killed"):
        drive(problem, n_trials=5, executor=executor)
    drive(problem, n_trials=5)
    assert set(load().user_attrs[CONFIRMATION]["heuristics"]) == set(HEURISTICS)


def test_who_need_not_learn_is_not_asked_far_beyond_a_deadline(drive, load):
    executor = RandomOrderExecutor(problem := StandInProblem(seconds=0.1), 1)
    drive(problem, sampler_name="random", n_trials=500, executor=executor, timeout_s="4")
    assert 1 < len(search_trials(load())) < 35
