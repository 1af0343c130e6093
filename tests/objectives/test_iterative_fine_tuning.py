"""Scenario 1 of Yeom et al. 2021 on the digits: what each step's network is, restarts, and what is refused."""

from dataclasses import replace

import pytest
import torch

from objectives.datasets import load_task
from objectives.errors import TrainingError
from objectives.models import load_model
from objectives.objective import Objective, ObjectiveOptions
from objectives.pruning.fine_tuning import fine_tuned
from objectives.pruning.slimming import cost, slim
from objectives.pruning.zeroing import zeroed
from objectives.racing import Race
from objectives.repair.repairer import Repairer
from objectives.repair.strength import choose_strength
from objectives.training import GRADIENT_NORM, TrainingOptions
from search_spaces.heuristics import heuristic
from search_spaces.procedures import Iterative
from search_spaces.repairs import RepairSpec

RATES = (0.0, 0.25, 0.3, 0.5, 0.75)
EPSILON, TAYLOR = heuristic("epsilon-abs"), heuristic("taylor")
TUNED = Iterative(0.25, finetune_epochs=2, finetune_learning_rate=0.01, finetune_batch_size=10)
OPTIONS = TrainingOptions(n_epochs=2, batch_size=10, learning_rate=0.01, max_gradient_norm=GRADIENT_NORM)
REFIT = RepairSpec("refit", 0.1)


@pytest.fixture(scope="module")
def model(_own_cache):
    return load_model("digits_cnn")


@pytest.fixture(scope="module")
def task(model):
    return load_task("digits", model, evaluation_images=200, references_per_class=3)


@pytest.fixture
def objective(model, task):
    def make(procedure=TUNED, **options):
        return Objective(model, task, replace(ObjectiveOptions(RATES, procedure=procedure, device="cpu"), **options))

    return make


def kept(masks):
    return torch.cat(list(masks.values()))


@pytest.mark.parametrize("composite", [EPSILON, TAYLOR], ids=["composite", "criterion"])
def test_each_step_ranks_and_trains_what_the_last_one_has_trained(objective, composite):
    """Step by step: a network of the trained weights is a network of its own, ranked and pruned as such."""
    own = objective()
    path = own.path(composite)
    network, masks, widths, weights = own.network, None, own.component_widths, None
    n = own.n_components
    for end in (n // 4, n // 2):
        ranking = own.ranking(composite, masks, weights)
        for n_pruned in (end - n // 10, end):  # a rate within a step ends a step of its own
            masks = ranking.masks(n_pruned)
            trained = fine_tuned(network, masks, own.references, OPTIONS)
            assert torch.equal(kept(path.masks(n_pruned)), kept(masks))
            assert path.weights(n_pruned).fingerprint == trained.fingerprint
        network, weights = trained.on(network), trained
    assert [step.n_pruned for step in path.steps] == [n // 4, n // 2]
    assert path.weights(0) is None
    assert list(masks) == list(widths)
    # Ranked on the network of the weights, not on the unpruned one's under the same masks.
    assert not torch.equal(own.ranking(composite, masks, weights).order, own.ranking(composite, masks).order)


def test_the_curve_is_that_of_the_trained_networks(objective, task):
    own = objective()
    evaluation = own.evaluate(EPSILON)
    path, search = own.path(EPSILON), task.search
    for index, rate in enumerate(RATES):
        n = path.n_pruned(rate)
        weights = path.weights(n)
        module = slim(own.network if weights is None else weights.on(own.network), path.masks(n))
        accuracy = float((module(search.images).argmax(1) == search.labels).double().mean())
        assert evaluation.curve.accuracies[index] == accuracy
        assert evaluation.curve.parameters[index] == cost(module).parameters
    plain = objective(Iterative(0.25)).evaluate(EPSILON)
    assert evaluation.curve.accuracies[0] == plain.curve.accuracies[0]
    assert evaluation.figures["auc"] > plain.figures["auc"]
    assert [step.n_pruned for step in evaluation.steps] == [0, 84, 168, 252]
    assert all(tuned.loss < other.loss for tuned, other in zip(evaluation.steps[1:], plain.steps[1:], strict=True))
    assert evaluation.seconds.keys() == {"attribution", "training", "evaluation"}
    assert plain.seconds.keys() == {"attribution", "evaluation"}
    # A second time, in the same objective and in another, and in a race that nobody can win.
    assert own.evaluate(EPSILON).curve == objective().evaluate(EPSILON).curve == evaluation.curve
    race = Race(0, evaluation.correct, RATES, (0.2,) * 5, 0.01)
    assert objective().race(EPSILON, race).curve == evaluation.curve


def test_an_evaluation_that_was_killed_goes_on_from_its_last_epoch(objective, tmp_path):
    expected = objective().evaluate(EPSILON).curve
    own = objective(checkpoints=tmp_path / "here")
    ranking, n_ranked = own.ranking, 0

    def killed(*arguments):
        nonlocal n_ranked
        n_ranked += 1
        if n_ranked == 3:  # two steps are trained
            raise KeyboardInterrupt
        return ranking(*arguments)

    own.ranking = killed
    with pytest.raises(KeyboardInterrupt):
        own.evaluate(EPSILON)
    (folder,) = (tmp_path / "here").iterdir()
    left = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert left.keys() == {"fine-tuning-84.safetensors", "fine-tuning-168.safetensors"}
    # Half of a file, as no kill leaves it, is noticed, and the step trained anew.
    file = folder / "fine-tuning-168.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    again = objective(checkpoints=tmp_path / "here")
    ranking, seen = again.ranking, []
    again.ranking = lambda *arguments: (
        seen.append({file.name: file.stat().st_mtime_ns for file in folder.iterdir()}) or ranking(*arguments)
    )
    assert again.evaluate(EPSILON).curve == expected
    assert seen[2]["fine-tuning-84.safetensors"] == left["fine-tuning-84.safetensors"]  # read, not written
    assert seen[2]["fine-tuning-168.safetensors"] != left["fine-tuning-168.safetensors"]
    assert not folder.exists()


def test_another_composites_checkpoints_are_its_own(objective, tmp_path):
    own = objective(checkpoints=tmp_path)
    own.path(EPSILON).weights(84)
    own.path(TAYLOR).weights(84)
    assert len(list(tmp_path.iterdir())) == 2
    other = objective(replace(TUNED, finetune_epochs=1), checkpoints=tmp_path)
    other.path(EPSILON).weights(84)
    assert len(list(tmp_path.iterdir())) == 3
    own.evaluate(TAYLOR)
    assert len(list(tmp_path.iterdir())) == 2


def test_without_room_for_checkpoints_it_goes_on_without(objective, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    path = objective(checkpoints=tmp_path / "file").path(EPSILON)
    assert path.weights(84) is not None
    assert "Fine-tuning keeps no checkpoints" in caplog.text


def test_progress_shows_the_epoch(objective):
    own, stages = objective(), []
    fine_tune = own.ranking
    own.ranking = lambda *arguments: stages.append(own.stage) or fine_tune(*arguments)
    own.evaluate(EPSILON)
    assert stages == [None, "25 % pruned", "50 % pruned"]
    own.path(EPSILON).weights(84)
    assert own.stage == "25 % pruned, fine-tuning, epoch 2 of 2"


def test_a_diverging_training_ends_in_one_line(objective, tmp_path):
    own = objective(replace(TUNED, finetune_learning_rate=1e12), checkpoints=tmp_path)
    with pytest.raises(TrainingError) as caught:
        own.evaluate(EPSILON)
    assert str(caught.value).startswith("Fine-tuning, 25 % pruned: The training diverged in epoch 1 of 2 (loss ")
    assert str(caught.value).endswith("use a smaller one (`--finetune-learning-rate`).")
    assert own.stage is None
    assert list(tmp_path.iterdir()) == []


def test_a_repair_comes_before_each_training(objective, task):
    """Towards the outputs of the network that the step began with, pruned and trained as it was."""
    own = objective(repair=REFIT)
    path, network, n = own.path(EPSILON), own.network, own.n_components
    first = own.ranking(EPSILON).masks(n // 4)
    start = own.repairer.repaired(first, REFIT)
    trained = fine_tuned(start, first, own.references, OPTIONS)
    assert path.weights(n // 4).fingerprint == trained.fingerprint
    assert trained.fingerprint != fine_tuned(network, first, own.references, OPTIONS).fingerprint
    second = own.ranking(EPSILON, first, trained).masks(n // 2)
    target = zeroed(trained.on(network), first)
    repairer = Repairer(target, own.references.images, own.repairer.batches)
    again = fine_tuned(repairer.repaired(second, REFIT), second, own.references, OPTIONS)
    assert path.weights(n // 2).fingerprint == again.fingerprint
    # Measured as it is: what was trained isn't repaired once more.
    evaluation = own.evaluate(EPSILON)
    network = slim(again.on(network), second)
    correct = network(task.search.images).argmax(1) == task.search.labels
    assert evaluation.curve.accuracies[RATES.index(0.5)] == float(correct.double().mean())
    assert evaluation.curve.accuracies[0] == objective().evaluate(EPSILON).curve.accuracies[0]
    assert objective().evaluate(replace(EPSILON, repair=REFIT)).curve == evaluation.curve


def test_checkpoints_know_the_repair(objective, tmp_path):
    for repair in (REFIT, RepairSpec("bn"), RepairSpec()):
        objective(checkpoints=tmp_path, repair=repair).path(EPSILON).weights(84)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_strength_is_chosen_once(objective, monkeypatch):
    chosen = []
    monkeypatch.setattr(
        "objectives.repair.repairer.choose_strength",
        lambda *arguments: chosen.append(choose_strength(*arguments)) or chosen[-1],
    )
    own = objective(repair=RepairSpec("refit"))
    own.path(EPSILON).weights(168)
    assert len(chosen) == 1
    assert own.stage == "50 % pruned, fine-tuning, epoch 2 of 2"
