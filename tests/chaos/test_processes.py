"""Processes that die, stand still or are interrupted: workers and drivers, at any moment and at each step."""

import itertools
import os
import random
import signal
import time
from functools import partial

import pytest
from chaos.faults import every, kill_ray_worker
from chaos.invariants import assert_no_orphans, composite_key, marked
from chaos.launches import EXIT_INTERRUPTED, GRID_6, GRID_60, RAY, full_only
from chaos.stub import StubSettings
from optuna.trial import TrialState

from hpo import trials
from storage.store import StudyStore

QUICK = StubSettings(seconds=0.02)
STEPS = (  # in the order in which one study comes by them
    "create_or_resume:before:1",
    "create_or_resume:after:1",
    "add_waiting:before:1",
    "add_waiting:after:1",
    "adopt_orphans:before:1",
    "adopt_orphans:after:1",
    "claim:before:1",
    "claim:after:1",
    "write_artifact:before:1",
    "write_artifact:after:1",
    "finish:before:1",
    "finish:after:1",
    "add_artifact:before:1",
    "add_artifact:after:1",
    "ask:before:1",
    "ask:after:1",
    "set_attribute:before:1",
    "set_attribute:after:1",
)


@full_only  # the next one does all of it
def test_workers_are_killed(postgresql_server, make_study, record):
    study = make_study(postgresql_server.new_database(), options=(*RAY, "--max-losses", "20"))
    choose = random.Random(0)
    with study.witness:
        launch = study.start()
        launch.wait_for("/10  trial")
        with every(lambda: 3.0, lambda: kill_ray_worker(study.mark, choose)) as kills:
            assert launch.end() == 0, launch.log
    tally = study.check()
    assert kills.n >= 2
    assert tally.complete == 60
    record(1, tally, workers_killed=kills.n)


@pytest.mark.parametrize(("sampler", "n_trials"), [("grid", None), pytest.param("tpe", 200, marks=full_only)])
def test_drivers_and_workers_are_killed(postgresql_server, make_study, full, record, sampler, n_trials):
    """Reduced, one of each while the other trials are computed."""
    study = make_study(
        postgresql_server.new_database(),
        space_path="cnn" if full else GRID_6,
        sampler=sampler,
        n_trials=n_trials,
        options=(*RAY, "--max-losses", "20"),
    )
    choose = random.Random(0)
    if full:
        lives_s = (choose.uniform(20, 40) for _ in itertools.count())
        with study.witness, every(lambda: 3.0, lambda: kill_ray_worker(study.mark, choose)) as kills:
            n_drivers, n_workers = study.run_killed(lives_s), kills.n
    else:
        n_drivers = n_workers = 1
        with study.witness:
            killed = study.start()
            killed.wait_for("1/10  trial")
            assert kill_ray_worker(killed.mark, choose)
            killed.wait_for("1/6  trial")  # the lost one is done by then
            killed.kill()
            assert_no_orphans(killed.mark)
            study.run()
    tally = study.check()
    assert n_drivers >= 1
    assert n_workers >= 1
    record(2, tally, workers_killed=n_workers, drivers_killed=n_drivers)


def test_a_kill_at_each_step(new_url, make_study, full, record):
    """In full, each step has a study of its own.

    Reduced, one study comes by them, where the store differs: what is there before a step was there after the last.
    """
    for steps in [[step] for step in STEPS] if full else [[STEPS[0], *STEPS[1::2]]]:
        study = make_study(new_url(), space_path=GRID_6, settings=QUICK)
        with study.witness:
            for step in steps:
                killed = study.start(kill_at=step)
                assert killed.end() == -signal.SIGKILL, f"{step}: {killed.log}"
            study.run()
        record(3, study.check(), drivers_killed=len(steps))


@full_only
def test_a_kill_at_a_release(postgresql_server, make_study, record):
    for step in ("release:before:1", "release:after:1"):
        study = make_study(postgresql_server.new_database(), options=RAY)
        choose = random.Random(0)
        with study.witness:
            killed = study.start(kill_at=step)
            killed.wait_for("/60  trial")
            with every(lambda: 0.5, partial(kill_ray_worker, killed.mark, choose)) as kills:
                assert killed.end() == -signal.SIGKILL, killed.log
            assert_no_orphans(killed.mark)
            study.run()
        record(3, study.check(), drivers_killed=1, workers_killed=kills.n)


@full_only
@pytest.mark.parametrize("program", ["raylet", "gcs_server"])
def test_a_process_of_ray_is_killed(postgresql_server, make_study, record, program):
    """Ray may go on without it for a while; else the launch ends, and says so, and the next one goes on."""
    study = make_study(postgresql_server.new_database(), options=RAY)
    with study.witness:
        launch = study.start()
        launch.wait_for("3/60  trial")
        [pid] = [pid for pid, title in marked(launch.mark).items() if f"/{program} " in title]
        os.kill(pid, signal.SIGKILL)
        if launch.end(120) != 0:
            assert launch.log.splitlines()[-1].startswith("Error: "), launch.log
        assert_no_orphans(launch.mark)
        study.run()
    record(2, study.check())


def test_a_kill_before_a_commit(new_url, make_study, full, record):
    """In full, before every seventh one of a study."""
    n_killed = 0
    for commit in itertools.count(1, 7) if full else (17, 42):
        study = make_study(new_url(), space_path=GRID_6, settings=QUICK)
        with study.witness:
            killed = study.start(kill_at=f"commit:before:{commit}")
            if killed.end() == 0:
                break
            assert killed.process.returncode == -signal.SIGKILL, killed.log
            study.run()
        n_killed += 1
        record(3, study.check(), drivers_killed=1)
    assert n_killed >= 2


def test_a_driver_that_stands_still_keeps_its_study(url, make_study, full, record):
    study = make_study(url, space_path=GRID_60 if full else GRID_6, settings=StubSettings(seconds=0.3))
    with study.witness:
        first = study.start()
        first.wait_for("1/10  trial")
        first.process.send_signal(signal.SIGSTOP)
        for pause_s in (0, 60 if full else 2):
            time.sleep(pause_s)
            second = study.start()
            assert second.end() == 1, second.log
            assert f"is driven by pid {first.process.pid} on host " in second.log
        first.process.send_signal(signal.SIGCONT)
        assert first.end() == 0, first.log
    record(9, study.check(), drivers_stopped=1)


def test_a_driver_that_wakes_without_its_lease_writes_nothing(new_postgresql, make_study, full, record):
    """Its connections are cut while it stands still, and another driver takes the study."""
    server = new_postgresql()
    space_path, settings = GRID_60 if full else GRID_6, StubSettings(seconds=0.3)
    study = make_study(server.new_database(), space_path=space_path, settings=settings)
    with study.witness:
        first = study.start()
        first.wait_for("1/10  trial")
        first.process.send_signal(signal.SIGSTOP)
        server.restart("immediate")
        time.sleep(60 if full else 1)
        second = study.start()
        second.wait_for("4/10  trial")
        first.process.send_signal(signal.SIGCONT)
        assert first.end(60) == 1, first.log
        assert f"pid {second.process.pid} on host " in first.log
        assert second.end() == 0, second.log
    record(9, study.check(), drivers_stopped=1, restarts=1)


@pytest.mark.parametrize(
    ("executor", "how"),
    [
        pytest.param("ray", "Ctrl-C", marks=full_only),  # with the real objective in hpo/test_ray_executor.py
        pytest.param("ray", "Ctrl-C twice", marks=full_only),
        pytest.param("ray", "SIGTERM", marks=full_only),
        pytest.param("local", "Ctrl-C", marks=full_only),
        ("local", "Ctrl-C twice"),
        pytest.param("local", "SIGTERM", marks=full_only),
    ],
)
def test_an_interrupted_driver_leaves_nothing(postgresql_server, make_study, full, record, how, executor):
    study = make_study(
        postgresql_server.new_database(),
        space_path=GRID_60 if full else GRID_6,
        options=RAY if executor == "ray" else (),
    )
    with study.witness:
        launch = study.start()
        launch.wait_for("2/60  trial" if full else "2/10  trial")
        if how == "SIGTERM":
            launch.process.terminate()
        else:
            launch.press_ctrl_c()
        if how == "Ctrl-C twice":
            launch.press_ctrl_c()
        assert launch.end(30) == EXIT_INTERRUPTED, launch.log
        assert "Interrupted: no finished trial is lost. To go on:" in launch.log
        assert_no_orphans(launch.mark)
        if how != "Ctrl-C twice":
            with StudyStore.open(study.url, read_only=True) as store:
                assert TrialState.RUNNING not in {trial.state for trial in store.load("s").get_trials()}
        study.options, study.settings = (), QUICK
        study.run()
    record(11, study.check(), drivers_interrupted=1)


@full_only  # on SQLite in hpo/test_killed_driver.py
def test_kills_leave_the_sequence_of_trials_as_it_is(new_url, make_study, record):
    """Search trials of TPE, of which each depends on all before, at concurrency 1."""
    settings = StubSettings(seconds=0.1)
    calm, stormy = (make_study(new_url(), sampler="tpe", n_trials=16, settings=settings) for _ in range(2))
    moments = range(1, 16)
    calm.run()
    with stormy.witness:
        for number in moments:
            killed = stormy.start()
            killed.wait_for(f"{number}/16  trial")
            killed.kill()
        stormy.run()
    assert sequence(stormy) == sequence(calm)
    calm.check()
    record(15, stormy.check(), drivers_killed=len(moments))


def sequence(study):
    with StudyStore.open(study.url, read_only=True) as store:
        stored = store.load("s").get_trials()
    return [(trial.number, trials.role(trial), composite_key(trial), trial.value) for trial in stored]
