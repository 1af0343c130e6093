"""Task-relevant pruning (Avé et al. 2025, Algorithm 1) of a small network of digits, step by step."""

from dataclasses import replace

import pytest
import torch

from objectives.adaptation import Adaptation, AdaptationOptions, AdaptationRecord, pretrain
from objectives.datasets import LabelledImages, load_task
from objectives.datasets.task_splits import split_data
from objectives.digits import DigitsCNN
from objectives.errors import DataError, OptionError, RepairError, TrainingError
from objectives.fingerprints import state_fingerprint
from objectives.models import load_model
from objectives.procedures.task_relevant import TaskRelevant
from objectives.pruning.fine_tuning import fine_tuned
from objectives.pruning.ranking import rank
from objectives.pruning.slimming import cost, slim
from objectives.training import TrainingOptions
from search_spaces.heuristics import heuristic
from search_spaces.repairs import RepairSpec
from search_spaces.task_splits import TaskSplit

NEW_CLASSES = TaskSplit("new_classes", T=("4", "5"), P=("0", "1", "2"), F=("3",))
NEW_SUBCLASSES = TaskSplit(
    "new_subclasses",
    T=("4", "5"),
    P=("0", "1"),
    F=("2", "3"),
    superclasses={"even": ("0", "2", "4"), "odd": ("1", "3", "5")},
)
EPSILON, WEIGHT = heuristic("epsilon-abs"), heuristic("weight")
TRAINING = TrainingOptions(n_epochs=5, batch_size=10, learning_rate=1e-2, optimizer="adamw", patience=4)
OPTIONS = AdaptationOptions(TaskRelevant(0.4, 2, TRAINING), device="cpu")


@pytest.fixture(scope="module")
def digits(_own_cache):
    """20 training and some 20 evaluation images of each class."""
    model = load_model("digits_cnn")
    return model, load_task("digits", model, references_per_class=20, evaluation_images=200, confirmation_share=0)


@pytest.fixture(scope="module", params=[NEW_CLASSES, NEW_SUBCLASSES], ids=lambda split: split.scenario)
def split(request):
    return request.param


@pytest.fixture(scope="module")
def data(digits, split):
    _, task = digits
    return split_data(split, task.references, task.search, task.class_names)


@pytest.fixture(scope="module")
def model(digits, data):
    """A small network, trained on T and P."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DigitsCNN(len(data.outputs), channels=(6, 8, 10)).eval()
    pretrain(network, data, replace(TRAINING, n_epochs=8))
    fingerprint = state_fingerprint(network.state_dict())
    return replace(digits[0], network=network, num_classes=len(data.outputs), fingerprint=fingerprint)


@pytest.fixture(scope="module")
def adaptation(model, data):
    return Adaptation(model, data, OPTIONS)


@pytest.fixture(scope="module")
def evaluation(adaptation):
    return adaptation.evaluate(EPSILON)


def joined(*parts):
    return LabelledImages(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


def accuracy(network, images):
    return float((network(images.images).argmax(dim=1) == images.labels).double().mean())


def test_each_size_is_retrained_on_the_task_and_a_copy_of_it_adapted(adaptation, data, split, evaluation):
    """Algorithm 1 written out: which components go, what is trained on what, and what is measured."""
    network, masks, weights = adaptation.objective.network, None, None
    widths = network.components
    training, validation, measured = data.training, data.validation, data.evaluation
    replay = split.scenario == "new_classes"
    to_adapt, to_stop, to_measure = (
        joined(part.task, part.new) if replay else part.new for part in (training, validation, measured)
    )
    steps = [adaptation.steps(EPSILON), evaluation.records]
    for index, (step, record) in enumerate(zip(*steps, strict=True)):
        share = (0, 0.4, 0.64)[index]
        if index:
            scores = adaptation.objective.scores(EPSILON, masks, weights)
            kept = {name: torch.ones(n, dtype=torch.bool) for name, n in widths.items()} if masks is None else masks
            masks = {}
            for name, mask in kept.items():
                n_gone = int(share * widths[name]) - int((~mask).sum())
                lowest = mask.nonzero().flatten()[scores[name].argsort(stable=True)[:n_gone]]
                masks[name] = mask.index_fill(0, lowest, False)
            trained = network if weights is None else weights.on(network)
            weights = fine_tuned(trained, masks, training.task, TRAINING, validation=validation.task)
            assert step.retrained.fingerprint == weights.fingerprint
        else:
            masks = {name: torch.ones(n, dtype=torch.bool) for name, n in widths.items()}
            assert step.retrained is None
        assert all(
            torch.equal(masks[name], mask) for name, mask in step.ranking.masks(step.n_pruned).items()
        )  # also of the unpruned network
        retrained = network if weights is None else weights.on(network)
        adapted = fine_tuned(retrained, masks, to_adapt, TRAINING, validation=to_stop)
        assert step.weights(step.n_pruned).fingerprint == adapted.fingerprint
        before, after = slim(retrained, masks), slim(adapted.on(network), masks)
        assert (record.share, record.n_pruned) == (share, sum(int((~mask).sum()) for mask in masks.values()))
        assert (record.parameters, record.flops) == (cost(after).parameters, cost(after).flops)
        assert record.accuracy_pruned == accuracy(before, measured.task)
        assert record.accuracy == accuracy(after, to_measure)
        assert record.accuracy_task == accuracy(after, measured.task)
        assert record.accuracy_new == accuracy(after, measured.new)
        assert len(record.class_accuracies) == (4 if replay else 2)
    assert index == 2


def test_the_figure_is_the_area_under_accuracy_after_adaptation(evaluation):
    curve, records = evaluation.curve, evaluation.records
    assert curve.rates == (0.0, 0.4, 0.64)
    x = [*(1 - record.parameters / records[0].parameters for record in records), 1]
    y = [*(record.accuracy for record in records), curve.collapsed_accuracy]
    area = sum((x[i + 1] - x[i]) * (y[i + 1] + y[i]) / 2 for i in range(3))
    assert curve.figures()["auc_parameters"] == pytest.approx(area)
    assert records[0].accuracy > 0.6
    assert AdaptationRecord.from_json(records[1].to_json()) == records[1]


def test_what_was_new_is_learnt_and_the_task_is_replayed(evaluation, split, adaptation):
    full = evaluation.records[0]
    unadapted = accuracy(adaptation.objective.network.module, adaptation.data.evaluation.new)
    assert full.accuracy_new > unadapted
    if split.scenario == "new_classes":
        assert unadapted == 0  # an output that never was right
        assert full.accuracy_task > 0.6


def test_imp_and_t_empty_are_the_same_procedure(adaptation, digits, model, evaluation):
    imp = adaptation.evaluate(WEIGHT)
    assert [each.n_pruned for each in imp.records] == [each.n_pruned for each in evaluation.records]
    # The unpruned network is nobody's choice.
    assert imp.records[0] == evaluation.records[0]
    _, task = digits
    split = adaptation.data.split.without_extra()
    data = split_data(split, task.references, task.search, task.class_names)
    assert torch.equal(data.evaluation.task.images, adaptation.data.evaluation.task.images)
    assert torch.equal(data.pretraining(data.training).images, data.training.task.images)


def test_a_run_that_was_killed_goes_on_from_its_checkpoints(model, data, evaluation, tmp_path):
    own = Adaptation(model, data, OPTIONS)
    steps = own.steps(EPSILON, tmp_path)
    assert own.record(next(steps)) == evaluation.records[0]
    next(steps)  # retrained, not adapted
    left = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    (pruned,) = {evaluation.records[1].n_pruned}
    assert left.keys() == {"0-adaptation.safetensors", f"{pruned}-retraining.safetensors"}
    again = Adaptation(model, data, OPTIONS)
    assert again.evaluate(EPSILON, tmp_path).records == evaluation.records
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in left} == left
    assert again.stage is None


def test_fewer_references_are_drawn_from_the_task(model, data, adaptation):
    own = Adaptation(model, data, replace(OPTIONS, n_references=10))
    assert len(own.objective.references) == 10
    assert len(adaptation.objective.references) == len(data.training.task)
    with pytest.raises(OptionError, match="`n_references` must be at least 1, but got 0"):
        replace(OPTIONS, n_references=0)


def test_no_layer_loses_its_last_component(adaptation):
    shares = TaskRelevant(0.5, 12).shares
    ranking = rank(
        {name: torch.rand(n) for name, n in {"wide": 64, "narrow": 3, "single": 1}.items()},
        {name: name for name in ("wide", "narrow", "single")},
    )
    for share in shares:
        masks = ranking.masks(ranking.n_pruned(share))
        assert [int((~mask).sum()) for mask in masks.values()] == [int(share * 64), int(share * 3), 0]
    # Steps in which no layer loses any are none.
    own = Adaptation(adaptation.objective.model, adaptation.data, replace(OPTIONS, procedure=TaskRelevant(0.01, 2)))
    assert [step.n_pruned for step in own.steps(WEIGHT)] == [0]


@pytest.mark.parametrize("share", [0, 1, -0.2, 1.5])
def test_a_step_that_takes_whole_layers_is_refused(share):
    with pytest.raises(OptionError, match=r"`step_share` of task-relevant pruning must lie in \(0, 1\), but got"):
        TaskRelevant(share)


def test_iterations_that_leave_nothing_are_refused():
    with pytest.raises(OptionError, match=r"200 iterations of 0\.2 each prune all there is"):
        TaskRelevant(n_iterations=200)
    with pytest.raises(OptionError, match="`n_iterations` must be at least 1, but got 0"):
        TaskRelevant(n_iterations=0)
    assert TaskRelevant().shares[-1] == 0.8926258176  # ten iterations of 20 %


def test_a_composite_that_repairs_is_refused(adaptation):
    with pytest.raises(RepairError, match="Repair bn is for networks that aren't trained after pruning; leave it out"):
        adaptation.evaluate(replace(EPSILON, repair=RepairSpec("bn")))


def test_a_network_of_other_outputs_is_refused(digits, data):
    with pytest.raises(DataError, match=r"The network has 7 outputs, but the split \d+ \("):
        Adaptation(replace(digits[0], num_classes=7), data, OPTIONS)


def test_a_training_that_diverges_says_which_it_was(model, data):
    diverging = replace(TRAINING, learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"^Training on T and P: The training diverged in epoch 1 of 5"):
        pretrain(DigitsCNN(len(data.outputs), channels=(2, 2, 2)), data, diverging)
    own = Adaptation(model, data, replace(OPTIONS, procedure=TaskRelevant(0.4, 2, diverging)))
    steps = own.steps(WEIGHT)
    with pytest.raises(TrainingError, match=r"^Adaptation, 0 % pruned: The training diverged in epoch 1 of 5 .*\.$"):
        own.record(next(steps))
    with pytest.raises(TrainingError, match=r"^Retraining, 3\d % pruned: The training diverged"):
        next(steps)
