"""What studies know of each other's measurements: it saves computation, and changes no result."""

import shutil

import numpy as np
import pytest
import torch

from hpo.config import resolve
from hpo.confirmation import read_confirmed
from hpo.problem import load_problem
from hpo.progress import LogProgress
from hpo.report import StudyReport
from hpo.study import launch
from search_spaces.heuristics import HEURISTICS
from storage.store import StudyStore
from storage.urls import sqlite_path

OPTIONS = {
    "evaluation_images": 60,
    "references_per_class": 1,
    "rates": (0.0, 0.3, 0.6),
    "n_trials": 3,
    "pruner": "none",
}
N_MASKS = 4  # of a trial: its rates, and the network without components


def run(url, name, **options):
    """A study, launched: what it says of its trials, its confirmations, and its report."""
    launch(resolve({"study": name, "storage": url, "sampler": "grid", **OPTIONS, **options}), LogProgress("auc"))
    with StudyStore.open(url, read_only=True) as store:
        study = store.load(name)
        stored = store.trials(study)
        says = [(trial.values, trial.params, trial.intermediate_values, said(trial)) for trial in stored]
        confirmed = read_confirmed(study.user_attrs, [trial.number for trial in stored])
        return says, confirmed, StudyReport.of(study)


def said(trial):
    return {name: value for name, value in trial.user_attrs.items() if name not in ("seconds", "masks")}


@pytest.fixture(scope="module")
def _one_thread():
    """As many as workers of Ray have: rounding, and so what is known, depends on it."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture(scope="module")
def cold(_one_thread, tmp_path_factory):
    """A store with a study that knew nothing."""
    url = f"sqlite:///{tmp_path_factory.mktemp('cold') / 'studies.db'}"
    return url, *run(url, "cold")


@pytest.fixture
def copy(cold, tmp_path):
    """A copy of that store."""
    path = tmp_path / "studies.db"
    shutil.copyfile(sqlite_path(cold[0]), path)
    return f"sqlite:///{path}"


def n_stored(url):
    with StudyStore.open(url, read_only=True) as store, store.rdb.engine.connect() as connection:
        return connection.exec_driver_sql("SELECT count(*) FROM hpo_measurement").scalar()


def test_a_study_counts_what_it_knew(cold):
    _, says, _, report = cold
    n_evaluated = sum("reused_from" not in each[-1] for each in says)
    assert report.n_masks == N_MASKS * n_evaluated
    # The unpruned network and the one without components are the same for all.
    assert 2 * (n_evaluated - 1) <= report.n_known_masks < report.n_masks
    share = 100 * report.n_known_masks / report.n_masks
    line = f"Of {report.n_masks} masks, {report.n_known_masks} had been measured before ({share:.1f} %)."
    assert line in report.remarks()
    assert report.to_json()["n_known_masks"] == report.n_known_masks


def test_an_equal_study_of_another_name_measures_nothing(cold, copy):
    _, says, confirmed, report = cold
    before = n_stored(copy)
    again, confirmed_again, report_again = run(copy, "warm")
    assert again == says
    assert confirmed_again == confirmed
    assert report_again.n_masks == report_again.n_known_masks == report.n_masks
    assert n_stored(copy) == before > report.n_masks - report.n_known_masks  # and those of the confirmation


def test_another_search_of_the_network_uses_what_it_can(cold, copy):
    _, _, report = run(copy, "random", sampler="random", seed=0, n_trials=1)
    assert report.n_masks - report.n_known_masks <= N_MASKS - 2
    assert report.n_known_masks >= N_MASKS * len(HEURISTICS)


def test_nothing_is_known_of_another_dtype(cold, copy):
    other, _, report = run(copy, "other", dtype="bf16")
    alone, _, expected = run(copy.replace("studies.db", "alone.db"), "other", dtype="bf16")
    assert other == alone
    assert (report.n_masks, report.n_known_masks) == (expected.n_masks, expected.n_known_masks)


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "bf16"}, {"seed": 1}, {"evaluation_images": 80}, {"batch_size": 7}], ids=str
)
def test_only_a_study_of_the_same_images_in_the_same_batches_knows_something(copy, options):
    problem = load_problem(resolve({"storage": copy, **OPTIONS, **options}), None)
    with StudyStore.open(copy, read_only=True) as store:
        problem.learn(store.measurements([problem.subject("search")]))
    evaluation = problem.worker()().evaluate(HEURISTICS["zplus"], "search")
    assert (evaluation.n_masks, evaluation.n_known) == (N_MASKS, 0 if options else N_MASKS)


def test_a_study_that_is_resumed_uses_what_it_has_measured(cold, tmp_path):
    _, says, _, report = cold
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    _, _, first = run(url, "s", n_trials=1)
    again, _, resumed = run(url, "s")
    assert again == says
    # Of the trials that are new, the unpruned network and the one without components are known, too.
    assert resumed.n_known_masks == report.n_known_masks > first.n_known_masks


def test_trials_that_race_use_what_they_can(cold, copy):
    _, _, _, report = cold
    _, _, raced = run(copy, "raced", pruner="race")
    assert raced.race is not None
    assert raced.n_known_masks == raced.n_masks > 0
    assert raced.best == report.best


def test_wrong_measurements_would_show(cold, copy):
    """The results above are equal because the measurements are, not because they are not looked at."""
    with StudyStore.open(copy) as store, store.rdb.engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE hpo_measurement SET correct = zeroblob(length(correct)) WHERE parameters > 0"
        )
    problem = load_problem(resolve({"storage": copy, **OPTIONS}), None)
    expected = problem.evaluate(HEURISTICS["zplus"], "confirmation")
    with StudyStore.open(copy, read_only=True) as store:
        problem.learn(store.measurements([problem.subject("confirmation")]))
    misled = problem.worker()().evaluate(HEURISTICS["zplus"], "confirmation")
    assert misled.n_known == misled.n_masks == N_MASKS
    assert np.mean(expected.image_auc) > np.mean(misled.image_auc)


def test_workers_of_ray_know_what_the_store_does(cold, copy):
    _, says, confirmed, report = cold
    again, confirmed_again, warm = run(copy, "warm", executor="ray", workers=1, cpus_per_trial=0.5)
    assert again == says
    assert confirmed_again == confirmed
    assert warm.n_known_masks == warm.n_masks == report.n_masks
