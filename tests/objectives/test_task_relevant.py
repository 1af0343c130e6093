"""Task-relevant pruning (Avé et al. 2025, Algorithm 1) of a small network of digits, step by step."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from objectives.datasets import LabelledImages, load_task
from objectives.datasets.digits import digits_data
from objectives.datasets.task_splits import load_split_task
from objectives.digits import DigitsCNN
from objectives.errors import DataError, OptionError, TrainingError
from objectives.fingerprints import state_fingerprint
from objectives.models import load_model
from objectives.objective import Objective, ObjectiveOptions
from objectives.pretraining import pretrain, pretrained
from objectives.procedures.task_relevant import training_options
from objectives.pruning.fine_tuning import fine_tuned
from objectives.pruning.slimming import cost, slim
from search_spaces.heuristics import heuristic
from search_spaces.procedures import OneShot, TaskRelevant
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
DOMAINS = TaskSplit("new_subclasses", T=("faint",), P=("dark",), F=("light",), by="domain")
EPSILON, WEIGHT = heuristic("epsilon-abs"), heuristic("weight")
PROCEDURE = TaskRelevant(0.4, finetune_epochs=5, finetune_learning_rate=1e-2, finetune_batch_size=10)
OPTIONS = ObjectiveOptions((0.0, 0.4, 0.64), PROCEDURE, ranking="layer", device="cpu")
TRAINING = training_options(PROCEDURE)


@pytest.fixture(scope="module", params=[NEW_CLASSES, NEW_SUBCLASSES], ids=lambda split: split.scenario)
def split(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(_own_cache, split):
    """A small network before training, and 20 training and some 10 + 10 evaluation images of each class."""
    n_outputs = len(split.superclasses) or 10
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DigitsCNN(n_outputs, channels=(6, 8, 10)).eval()
    network.pretrained_cfg = {"label_names": tuple("0123456789")}
    model = replace(load_model("digits_cnn"), network=network, num_classes=n_outputs)
    model = replace(model, fingerprint=state_fingerprint(network.state_dict()))
    return model, load_split_task("digits", model, split, references_per_class=20, evaluation_images=50)


@pytest.fixture(scope="module")
def model(loaded, tmp_path_factory):
    """The network, trained on T and P."""
    model, task = loaded
    return pretrained(model, task.split, replace(TRAINING, n_epochs=8), tmp_path_factory.mktemp("cache"), "cpu")


@pytest.fixture(scope="module")
def task(loaded):
    return loaded[1]


@pytest.fixture(scope="module")
def objective(model, task):
    return Objective(model, task, OPTIONS)


@pytest.fixture(scope="module")
def evaluation(objective):
    return objective.evaluate(EPSILON)


def joined(*parts):
    return LabelledImages(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


def accuracy(network, images):
    return float((network(images.images).argmax(dim=1) == images.labels).double().mean())


def test_a_loaded_split_has_the_images_of_its_classes(task, split):
    data, replay = task.split, split.scenario == "new_classes"
    assert task.class_names == (tuple("0123456789") if replay else ("even", "odd"))
    assert len(data.training.task) == 18 * len(split.P)  # two of twenty are held out
    assert torch.equal(task.references.images, data.training.task.images)
    assert len(data.evaluation.extra) == 0
    for images in (task.search, task.confirmation):
        assert set(images.labels.tolist()) == ({0, 1, 2, 3} if replay else {0, 1})
    assert len(data.evaluation.task) + len(data.evaluation.new) == 50
    assert len(task.search) == (50 if replay else len(data.evaluation.new))


def test_each_size_is_retrained_on_the_task_and_a_copy_of_it_adapted(objective, task, split, evaluation):
    """Algorithm 1 written out: which components go, what is trained on what, and what is measured."""
    network, masks, weights = objective.network, None, None
    widths, data = network.components, task.split
    replay = split.scenario == "new_classes"
    to_adapt, to_stop, to_measure = (
        joined(part.task, part.new) if replay else part.new
        for part in (data.training, data.validation, data.evaluation)
    )
    curve, path = evaluation.curve, objective.path(EPSILON)
    for index, share in enumerate(OPTIONS.rates):
        if index:
            scores = objective.scores(EPSILON, masks, weights)
            kept = {name: torch.ones(n, dtype=torch.bool) for name, n in widths.items()} if masks is None else masks
            masks = {}
            for name, mask in kept.items():
                n_gone = int(share * widths[name]) - int((~mask).sum())
                lowest = mask.nonzero().flatten()[scores[name].argsort(stable=True)[:n_gone]]
                masks[name] = mask.index_fill(0, lowest, False)
            trained = network if weights is None else weights.on(network)
            weights = fine_tuned(trained, masks, data.training.task, TRAINING, validation=data.validation.task)
        else:
            masks = {name: torch.ones(n, dtype=torch.bool) for name, n in widths.items()}
        n_pruned = path.n_pruned(share)
        assert all(torch.equal(masks[name], mask) for name, mask in path.masks(n_pruned).items())
        unadapted = path.unadapted(n_pruned)
        assert unadapted is weights is None or unadapted.fingerprint == weights.fingerprint
        retrained = network if weights is None else weights.on(network)
        adapted = fine_tuned(retrained, masks, to_adapt, TRAINING, validation=to_stop)
        assert path.weights(n_pruned).fingerprint == adapted.fingerprint
        before, after = slim(retrained, masks), slim(adapted.on(network), masks)
        assert (curve.parameters[index], curve.flops[index]) == (cost(after).parameters, cost(after).flops)
        assert curve.accuracies[index] == accuracy(after, to_measure)
        step = evaluation.steps[index]
        assert (step.n_pruned, step.accuracy) == (n_pruned, curve.accuracies[index])
        assert step.accuracy_task == accuracy(before, data.evaluation.task)
        assert len(curve.class_accuracies[index]) == (4 if replay else 2)


def test_the_figure_is_the_area_under_accuracy_after_adaptation(evaluation):
    curve = evaluation.curve
    x = [*(1 - parameters / curve.parameters[0] for parameters in curve.parameters), 1]
    y = [*curve.accuracies, curve.collapsed_accuracy]
    area = sum((x[i + 1] - x[i]) * (y[i + 1] + y[i]) / 2 for i in range(3))
    assert evaluation.figures["auc_parameters"] == pytest.approx(area)
    assert curve.accuracies[0] > 0.6


def test_what_was_new_is_learnt_and_the_task_is_replayed(evaluation, split, objective, task):
    unadapted = accuracy(objective.network.module, task.split.evaluation.new)
    *replayed, new = evaluation.curve.class_accuracies[0]
    if split.scenario == "new_classes":
        assert unadapted == 0  # an output that never was right
        assert new > 0.3
        assert sum(replayed) / 3 > 0.5
    else:
        assert evaluation.curve.accuracies[0] > unadapted


def test_imp_is_the_same_procedure(objective, evaluation):
    imp = objective.evaluate(WEIGHT)
    assert imp.curve.parameters[0] == evaluation.curve.parameters[0]
    assert imp.curve.accuracies[0] == evaluation.curve.accuracies[0]  # the unpruned network is nobody's choice
    assert [step.n_pruned for step in imp.steps] == [step.n_pruned for step in evaluation.steps]


def test_a_run_that_was_killed_goes_on_from_its_checkpoints(model, task, evaluation, tmp_path):
    own = Objective(model, task, replace(OPTIONS, checkpoints=tmp_path))
    path = own.path(EPSILON)
    n_pruned = path.n_pruned(0.4)
    path.weights(0)
    path.unadapted(n_pruned)  # retrained, not adapted, when it is killed
    (folder,) = tmp_path.iterdir()
    left = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert left.keys() == {"adaptation-0.safetensors", f"retraining-{n_pruned}.safetensors"}
    again, seen = Objective(model, task, replace(OPTIONS, checkpoints=tmp_path)), {}
    forget = again._forget
    again._forget = lambda composite: (
        seen.update({file.name: file.stat().st_mtime_ns for file in folder.iterdir()}),
        forget(composite),
    )
    result = again.evaluate(EPSILON)
    assert (result.curve, result.steps) == (evaluation.curve, evaluation.steps)
    assert {name: seen[name] for name in left} == left  # read, not written
    assert len(seen) == 5
    assert list(tmp_path.iterdir()) == []
    assert again.stage is None


def test_the_trained_network_is_kept(loaded, tmp_path):
    untrained, task = loaded
    before = state_fingerprint(untrained.network.state_dict())
    own = pretrained(untrained, task.split, replace(TRAINING, n_epochs=2), tmp_path, "cpu")
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again = pretrained(untrained, task.split, replace(TRAINING, n_epochs=2), tmp_path, "cpu")
    assert own.fingerprint == again.fingerprint != untrained.fingerprint
    assert file.stat().st_mtime_ns == written
    assert state_fingerprint(untrained.network.state_dict()) == before == untrained.fingerprint


def test_progress_names_the_training(model, task):
    own = Objective(model, task, OPTIONS)
    path = own.path(WEIGHT)
    path.weights(0)
    assert own.stage.startswith("0 % pruned, adaptation, epoch ")
    path.unadapted(path.n_pruned(0.4))
    assert own.stage.endswith(" of at most 5")
    assert own.stage.startswith("38 % pruned, retraining, epoch ")


def test_a_rate_between_steps_is_a_shorter_step(model, task, evaluation):
    own = Objective(model, task, replace(OPTIONS, rates=(0.0, 0.2, 0.4)))
    between = own.evaluate(EPSILON).curve
    assert between.accuracies[::2] == evaluation.curve.accuracies[:2]
    assert between.parameters[0] > between.parameters[1] > between.parameters[2]


def test_a_step_that_removes_a_whole_layer_ends_in_one_line(model, task):
    own = Objective(
        model,
        task,
        replace(OPTIONS, rates=(0.0, 0.98), ranking="global", procedure=replace(PROCEDURE, step_share=0.98)),
    )
    with pytest.raises(
        TrainingError, match=r"^The step to \d+ pruned components removes the whole layer '\S+', so that"
    ):
        own.evaluate(heuristic("random-0"))
    assert own.stage is None


def test_a_training_that_diverges_says_which_it_was(model, task):
    diverging = replace(PROCEDURE, finetune_learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"^Training on T and P: The training diverged in epoch 1 of 5"):
        pretrain(DigitsCNN(model.num_classes, channels=(2, 2, 2)), task.split, training_options(diverging))
    path = Objective(model, task, replace(OPTIONS, procedure=diverging)).path(WEIGHT)
    with pytest.raises(
        TrainingError, match=r"^Adaptation, 0 % pruned: The training diverged in epoch 1 of 5 .*rate`\)"
    ):
        path.weights(0)
    with pytest.raises(TrainingError, match=r"^Retraining, 3\d % pruned: The training diverged"):
        path.unadapted(path.n_pruned(0.4))


def test_a_composite_repairs_before_it_retrains(objective):
    ranking, split, repair = objective.ranking(EPSILON), objective.task.split, RepairSpec("bn")
    masks = ranking.masks(ranking.n_pruned(0.2))
    path = objective.path(replace(EPSILON, repair=repair))
    expected = fine_tuned(
        objective.repairer.repaired(masks, repair),
        masks,
        split.training.task,
        training_options(objective.options.procedure),
        validation=split.validation.task,
    )
    assert path.unadapted(ranking.n_pruned(0.2)).fingerprint == expected.fingerprint


def test_a_network_of_other_outputs_is_refused(loaded, split):
    wrong = replace(loaded[0], num_classes=7 if split.superclasses else 6)
    with pytest.raises(DataError, match=r"The network has 7 outputs, but the split 2 \(even, odd\); build|label 6"):
        load_split_task("digits", wrong, split, references_per_class=20)


def test_procedure_and_split_go_together(model, task):
    digits = load_model("digits_cnn")
    plain = load_task("digits", digits, evaluation_images=20)
    for one, other, procedure in ((digits, plain, PROCEDURE), (model, task, OneShot())):
        with pytest.raises(OptionError, match="Procedure task_relevant and a split of the data go together: pass"):
            Objective(one, other, replace(OPTIONS, procedure=procedure))


@pytest.mark.usefixtures("_own_cache")
def test_a_split_goes_by_the_names_of_a_class_map():
    named = TaskSplit("new_classes", T=(), P=("zero", "one"), F=("two",))
    given = {"references_per_class": 4, "evaluation_images": 12, "class_map": {"zero": 0, "one": 1, "two": 2}}
    task = load_split_task("digits", load_model("digits_cnn"), named, **given)
    assert task.class_names[:4] == ("zero", "one", "two", "3")
    assert task.split.training.new.labels.tolist() == [2, 2, 2]


def test_splits_that_the_images_do_not_fit_are_refused():
    unknown = TaskSplit("new_classes", T=(), P=("0", "1"), F=("eleven",))
    with pytest.raises(DataError, match=r"^--splits: no class is called 'eleven'; give its index"):
        load_split_task("digits", load_model("digits_cnn"), unknown, references_per_class=20)
    with pytest.raises(
        DataError, match=r"has 100 training images, fewer than the 101 references wanted; .* by --splits"
    ):
        load_split_task("digits", load_model("digits_cnn"), NEW_CLASSES, references_per_class=101)
    with pytest.raises(DataError, match="digits doesn't tell the domains of its images, so it can't be split by dom"):
        load_split_task("digits", load_model("digits_cnn"), DOMAINS, references_per_class=20)


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    """`--data` of digits in three styles; those that are faint have no nines."""
    folder, digits = tmp_path_factory.mktemp("styles"), digits_data()
    for name, images, labels in (
        ("train", digits.train_images, digits.train_labels),
        ("eval", digits.evaluation_images, digits.evaluation_labels),
    ):
        parts = {"dark": images, "faint": images[labels < 9] // 4, "light": 255 - images}
        y = np.concatenate([labels, labels[labels < 9], labels])
        if name == "train":
            parts["half"], y = images[labels < 2] // 2, np.append(y, labels[labels < 2])
        else:
            parts["half"], y = images[labels < 1] // 2, np.append(y, labels[labels < 1])
            parts["new"], y = images[:1] // 2, np.append(y, labels[:1])
        domain = np.repeat(list(parts), [len(part) for part in parts.values()])
        np.savez(folder / f"{name}.npz", x=np.concatenate(list(parts.values())), y=y, domain=domain)
    return f"npz:{folder / 'train.npz'},{folder / 'eval.npz'}"


@pytest.mark.usefixtures("_own_cache")
def test_domains_are_new_subclasses_of_all_classes(styles):
    model = load_model("digits_cnn")
    task = load_split_task(styles, model, DOMAINS, references_per_class=10, evaluation_images=90)
    assert (task.source, task.split.split, task.class_names) == (styles, DOMAINS, tuple("0123456789"))
    assert not task.split.is_replayed
    # Of each class and domain a tenth is held out; T isn't evaluated.
    assert task.split.training.extra.labels.bincount().tolist() == [9] * 9
    assert task.split.training.task.labels.bincount().tolist() == [9] * 10
    assert task.split.validation.new.labels.bincount().tolist() == [1] * 10
    assert set(task.search.labels.tolist()) == set(range(10))
    assert len(task.split.evaluation.extra) == 0
    faint, dark, light = (getattr(task.split.training, key).images.mean().item() for key in ("extra", "task", "new"))
    assert faint < dark < light
    assert task.references.images.mean().item() == pytest.approx(dark)
    assert task.search.images.mean().item() == pytest.approx(light, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"F": ("lihgt",)}, r"^Unknown domain 'lihgt' in F of a split. Did you mean 'light'\?"),
        ({"T": ("new",)}, r"^The domain 'new' in T of a split has no training images; leave it out or add some"),
        ({"P": ("faint",), "T": ()}, r"^The class '9' has images in the domain 'light' of F, but in none of P; add"),
        ({"F": ("half",)}, r"^The class '1' of the domain 'half' has no evaluation images, but others; add some, or"),
    ],
)
@pytest.mark.usefixtures("_own_cache")
def test_domains_that_the_images_do_not_fit_are_refused(styles, changes, message):
    with pytest.raises(DataError, match=message):
        load_split_task(styles, load_model("digits_cnn"), replace(DOMAINS, **changes), references_per_class=10)
