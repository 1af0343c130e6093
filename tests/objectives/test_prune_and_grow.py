"""The procedure of elastic networks on the digits: its core, what is rebuilt around it, and what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from objectives.datasets import load_task
from objectives.errors import TrainingError
from objectives.models import load_model
from objectives.objective import Objective, ObjectiveOptions
from objectives.pruning.fine_tuning import fine_tuned
from objectives.pruning.slimming import slim
from objectives.racing import Correctness, Race
from objectives.training import GRADIENT_NORM, TrainingOptions
from search_spaces.heuristics import heuristic
from search_spaces.procedures import PruneAndGrow
from search_spaces.repairs import RepairSpec

RATES = (0.0, 0.1, 0.25, 0.5, 0.75)
EPSILON = heuristic("epsilon-abs")
GROWN = PruneAndGrow(0.5, 0.25, finetune_epochs=1, finetune_learning_rate=0.01, finetune_batch_size=10)
OPTIONS = TrainingOptions(
    n_epochs=1, batch_size=10, learning_rate=0.01, schedule="cosine", max_gradient_norm=GRADIENT_NORM
)


@pytest.fixture(scope="module")
def model(_own_cache):
    return load_model("digits_cnn")


@pytest.fixture(scope="module")
def task(model):
    return load_task("digits", model, evaluation_images=200, references_per_class=3)


@pytest.fixture
def objective(model, task):
    def make(procedure=GROWN, **options):
        return Objective(model, task, replace(ObjectiveOptions(RATES, procedure=procedure, device="cpu"), **options))

    return make


def test_networks_are_rebuilt_around_the_core_that_steps_have_trained(objective):
    own = objective()
    path, network, n = own.path(EPSILON), own.network, own.n_components
    first = own.ranking(EPSILON)
    trained = fine_tuned(network, first.masks(n // 4), own.references, OPTIONS)
    second = own.ranking(EPSILON, first.masks(n // 4), trained)
    masks = second.masks(n // 2)
    core = fine_tuned(trained.on(network), masks, own.references, OPTIONS)
    assert path.weights(n // 2).fingerprint == core.fingerprint
    for ranking, n_pruned in ((first, n // 10), (first, n // 4), (second, n // 3)):
        larger = ranking.masks(n_pruned)
        grown = fine_tuned(core.on(network), larger, own.references, OPTIONS, frozen=core)
        assert path.weights(n_pruned).fingerprint == grown.fingerprint
        assert all(torch.equal(mask, path.masks(n_pruned)[name]) for name, mask in larger.items())
        images = own.task.search.images
        assert torch.equal(slim(grown.on(network), masks)(images), slim(core.on(network), masks)(images))
    assert path.weights(0) is None
    assert path.weights(n * 3 // 4) is path.weights(n // 2)
    assert [step.n_pruned for step in path.steps] == [n // 4, n // 2, n]


def test_the_core_is_repaired_before_it_is_trained(objective):
    own = objective(replace(GROWN, step_share=1), repair=RepairSpec("refit", 0.1))
    path, masks = own.path(EPSILON), own.ranking(EPSILON).masks(own.n_components // 2)
    start = own.repairer.repaired(masks, RepairSpec("refit", 0.1))
    core = fine_tuned(start, masks, own.references, OPTIONS)
    assert path.weights(own.n_components // 2).fingerprint == core.fingerprint
    larger = path.masks(own.n_components // 4)
    grown = fine_tuned(core.on(own.network), larger, own.references, OPTIONS, frozen=core)
    assert path.weights(own.n_components // 4).fingerprint == grown.fingerprint


def test_a_trial_is_the_same_again_and_goes_on_where_it_was_killed(objective, tmp_path, caplog):
    evaluation = objective().evaluate(EPSILON)
    assert [step.n_pruned for step in evaluation.steps] == [0, 84, 168]
    own = objective(checkpoints=tmp_path)
    assert own.path(EPSILON).weights(84) is not None  # then killed
    (folder,) = tmp_path.iterdir()
    assert {file.name for file in folder.iterdir()} == {
        f"{name}.safetensors" for name in ("fine-tuning-84", "fine-tuning-168", "growth-84")
    }
    assert own.evaluate(EPSILON).curve == evaluation.curve
    assert "another training" not in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_training_for_the_records_alone_is_a_trainings_time(objective, monkeypatch):
    """A network of a step that is of no rate is rebuilt when all masks are known."""
    now = 0.0

    def trained(*arguments, **options):
        nonlocal now
        now += 1
        return fine_tuned(*arguments, **options)

    monkeypatch.setattr("objectives.objective.time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr("objectives.objective.fine_tuned", trained)
    evaluation = objective(rates=(0.0, 0.75)).evaluate(EPSILON)
    assert [step.n_pruned for step in evaluation.steps] == [0, 84, 168]
    assert evaluation.seconds == {"attribution": 0, "training": 3, "evaluation": 0}


def test_a_lost_race_rebuilds_no_network_that_it_does_not_measure(objective, monkeypatch):
    n_trained = 0

    def counted(*arguments, **options):
        nonlocal n_trained
        n_trained += 1
        return fine_tuned(*arguments, **options)

    monkeypatch.setattr("objectives.objective.fine_tuned", counted)
    own = objective()
    always = Correctness.of(np.ones((len(RATES), len(own.task.search)), dtype=np.bool_))
    given_up = own.race(EPSILON, Race(0, always, RATES, (0.0, 0.0, 0.0, 0.0, 1.0), 0.05))
    assert given_up.lowest_rate == 0.75
    assert n_trained == 2  # the core's steps
    assert given_up.seconds.keys() == {"attribution", "training", "evaluation"}


def test_a_step_of_the_cores_share_is_one_shot(objective):
    own = objective(replace(GROWN, step_share=1))
    path, ranking = own.path(EPSILON), own.ranking(EPSILON)
    n = own.n_components // 2
    core = fine_tuned(own.network, ranking.masks(n), own.references, OPTIONS)
    assert path.weights(n).fingerprint == core.fingerprint
    assert [step.n_pruned for step in path.steps] == [n]


def test_what_cannot_be_ends_in_one_line(objective, tmp_path):
    own = objective(replace(GROWN, finetune_learning_rate=1e12), checkpoints=tmp_path)
    with pytest.raises(TrainingError, match=r"^Fine-tuning, 25 % pruned: The training diverged in epoch 1 of 1 "):
        own.evaluate(EPSILON)
    assert not list(tmp_path.iterdir())
