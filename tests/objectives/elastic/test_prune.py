import json
import re
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from objectives.canonization import canonize
from objectives.datasets import load_task
from objectives.elastic.files import load_elastic, save_elastic
from objectives.elastic.model import ElasticModel
from objectives.elastic.prune import Growth, _with_repaired_core, parse_levels, prune_elastic
from objectives.errors import OptionError, SlimFileError, TrainingError
from objectives.memory import Batches
from objectives.models import load_model
from objectives.objective import Objective, ObjectiveOptions
from objectives.pruning.fine_tuning import fine_tuned
from objectives.pruning.slimming import cost, slim
from objectives.pruning.trained import TrainedWeights
from objectives.repair.repairer import Repairer
from objectives.training import TrainingOptions
from search_spaces.criteria import CriterionSpec
from search_spaces.heuristics import HEURISTICS
from search_spaces.procedures import Iterative
from search_spaces.repairs import RepairSpec

LEVELS = (0.25, 0.5)
COMPOSITE = HEURISTICS["epsilon-abs"]
OPTIONS = TrainingOptions(2, 50, 1e-3, schedule="cosine")


@pytest.fixture(scope="module")
def objective(_own_cache):
    model = load_model("digits_cnn")
    task = load_task("digits", model, evaluation_images=40)
    return Objective(model, task, ObjectiveOptions((0.0, 0.5), ranking="layer", device="cpu"))


@pytest.fixture
def growth(objective):
    return Growth(objective.task.references, OPTIONS)


def test_without_growth_each_level_is_the_exact_slim_network(objective, tmp_path):
    report = prune_elastic(objective, COMPOSITE, levels=LEVELS, output=tmp_path / "elastic")
    ranking, images = objective.ranking(COMPOSITE), objective.task.confirmation
    path = tmp_path / "elastic" / "elastic.safetensors"
    assert report.files == (str(path), str(tmp_path / "elastic" / "report.json"))
    assert [file.name for file in tmp_path.iterdir()] == ["elastic"]
    assert json.loads((path.parent / "report.json").read_text()) == json.loads(json.dumps(report.to_json()))
    assert (report.sparsities, report.ungrown_accuracies, report.growth) == ((0, *LEVELS), None, None)
    assert report.images == {"set": "confirmation", "n_images": len(images)}
    model = load_elastic(path)
    assert model.n_levels == 3
    for figures, rate in zip(report.levels, report.sparsities, strict=True):
        exact = slim(objective.network, ranking.masks(ranking.n_pruned(rate)))
        model.set_level(figures.level)
        with torch.inference_mode():
            logits = model(images.images)
            torch.testing.assert_close(logits, exact(images.images), rtol=1e-4, atol=1e-3)
        assert figures.accuracy == float((logits.argmax(1) == images.labels).double().mean())
        size = cost(exact)
        assert (figures.parameters, figures.flops) == (size.parameters, size.flops)
        assert figures.n_components == report.n_components - ranking.n_pruned(rate)


def test_levels_grow_around_the_trained_core(objective, growth, tmp_path):
    calls = []
    report = prune_elastic(
        objective,
        CriterionSpec("weight"),
        levels=LEVELS,
        output=tmp_path / "elastic",
        growth=growth,
        on_epoch=lambda level, epoch: calls.append((level, epoch.number)),
    )
    assert calls == [(2, 1), (2, 2), (1, 1), (1, 2), (0, 1), (0, 2)]
    assert report.ranker == "weight"
    assert report.growth["n_images"] == 100
    assert report.growth["schedule"] == "cosine"
    assert len(report.ungrown_accuracies) == 3
    model = load_elastic(tmp_path / "elastic" / "elastic.safetensors")
    original = ElasticModel(objective.network, model.masks)
    for level in range(3):
        assert any(
            not torch.equal(value, original.weights(level)[name]) for name, value in model.weights(level).items()
        )
    assert [file.name for file in tmp_path.iterdir()] == ["elastic"]


def test_a_core_may_be_repaired_before_it_grows(objective, growth, tmp_path):
    repair = RepairSpec("refit", 0.1)
    plain, repaired = (
        prune_elastic(objective, COMPOSITE, levels=LEVELS, output=tmp_path / str(each.repair), growth=each)
        for each in (growth, replace(growth, repair=repair))
    )
    assert plain.ungrown_accuracies == repaired.ungrown_accuracies
    assert (plain.repair, repaired.repair) == ("none", "refit(0.1)")
    masks = objective.ranking(COMPOSITE).masks(objective.n_components // 2)
    expected = fine_tuned(objective.repairer.repaired(masks, repair), masks, growth.images, OPTIONS)
    core = load_elastic(tmp_path / "refit(0.1)" / "elastic.safetensors").at(2)
    for name, value in core.named_parameters():
        torch.testing.assert_close(value, expected.state[name], rtol=0, atol=1e-6)


def test_what_returns_to_a_repaired_core_has_its_original_weights(objective):
    masks = objective.ranking(COMPOSITE).masks(objective.n_components // 2)
    for repair in (RepairSpec("bn"), RepairSpec("refit", 0.1)):
        made = _with_repaired_core(objective, masks, repair)
        expected = slim(objective.repaired(masks, repair), masks)
        assert torch.equal(slim(made, masks)(objective.references.images), expected(objective.references.images))
        for name, layer in objective.network.module.named_modules():
            if name in masks and not bool(masks[name].all()):
                pruned = ~masks[name]
                assert torch.equal(made.module.get_submodule(name).weight[pruned], layer.weight[pruned])
                assert torch.equal(made.module.get_submodule(name).bias[pruned], layer.bias[pruned])


def test_a_bias_that_a_repair_has_added_is_in_the_file(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, bias=False),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, bias=False),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 10),
    ).eval()
    network, images = canonize(module, (1, 8, 8)), torch.rand(4, 1, 8, 8)
    masks = {name: torch.arange(width) % 2 > 0 for name, width in network.components.items()}
    repaired = Repairer(network, images, Batches("a test", 4)).repaired(masks, RepairSpec("refit", 0.1))
    core = slim(repaired, masks)
    model = ElasticModel(
        TrainedWeights.of(core, masks).on(network),
        [{name: torch.ones_like(mask) for name, mask in masks.items()}, masks],
    )
    save_elastic(model, tmp_path / "elastic.safetensors")
    loaded = load_elastic(tmp_path / "elastic.safetensors", network)
    loaded.set_level(1)
    torch.testing.assert_close(loaded(images), core(images))


def test_a_killed_growing_goes_on_and_ends_with_the_same_file(objective, growth, tmp_path):
    def make(name, on_epoch=None):
        output = tmp_path / name / "elastic"
        prune_elastic(objective, COMPOSITE, levels=LEVELS, output=output, growth=growth, on_epoch=on_epoch)
        return safetensors.torch.load_file(output / "elastic.safetensors")

    def kill(level, epoch):
        if level == 1:
            raise KeyboardInterrupt

    computed = []
    with pytest.raises(KeyboardInterrupt):
        make("killed", kill)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [".elastic.growing"]
    after = make("killed", lambda level, epoch: computed.append((level, epoch.number)))
    assert computed == [(1, 2), (0, 1), (0, 2)]
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["elastic"]
    whole = make("whole")
    assert after.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in after.items())


def test_a_growing_that_diverges_leaves_nothing(objective, tmp_path):
    growth = Growth(objective.task.references, TrainingOptions(1, 50, 1e20))
    message = r"Growing: The training diverged in epoch 1 of 1 .* use a smaller one \(`--grow-learning-rate`\)\."
    with pytest.raises(TrainingError, match=message):
        prune_elastic(objective, COMPOSITE, levels=LEVELS, output=tmp_path / "elastic", growth=growth)
    assert not list(tmp_path.iterdir())


def test_a_core_that_the_procedure_has_trained_is_grown_around(objective, growth, tmp_path):
    options = replace(objective.options, procedure=Iterative(0.25, finetune_epochs=1), checkpoints=tmp_path / "cache")
    iterative = Objective(objective.model, objective.task, options)
    path = Objective(objective.model, objective.task, replace(options, checkpoints=None)).path(COMPOSITE)
    n = path.n_pruned(0.5)
    core = path.weights(n).on(objective.network)
    calls = []
    output = tmp_path / "elastic"
    report = prune_elastic(
        iterative,
        COMPOSITE,
        levels=LEVELS,
        output=output,
        growth=growth,
        on_epoch=lambda level, epoch: calls.append(level),
    )
    assert calls == [1, 1, 0, 0]
    assert not list((tmp_path / "cache").iterdir())
    model = load_elastic(output / "elastic.safetensors", objective.network)
    images = objective.task.search.images
    with torch.inference_mode():
        expected = slim(core, path.masks(n))(images)
        torch.testing.assert_close(model.at(2)(images), expected, rtol=1e-4, atol=1e-3)
    assert report.levels[2].accuracy == report.ungrown_accuracies[2]
    # What is refused leaves no checkpoints either.
    with pytest.raises(OptionError, match="leave one out"):
        prune_elastic(iterative, COMPOSITE, levels=(0.4, 0.4001), output=tmp_path / "refused")
    assert not list((tmp_path / "cache").iterdir())
    assert iterative.stage is None


def test_coupled_groups_are_removed_whole(objective, tmp_path):
    options = replace(objective.options, ranking="global")
    for each, output in ((objective, "layer"), (Objective(objective.model, objective.task, options), "global")):
        report = prune_elastic(each, CriterionSpec("weight"), levels=(0.1, 0.3), coupled=True, output=tmp_path / output)
        assert report.procedure == "one_shot of coupled groups"
        model = load_elastic(tmp_path / output / "elastic.safetensors", objective.network)
        for share, level, masks in zip(report.sparsities, report.levels, model.masks, strict=True):
            assert (1 - share) * 336 <= level.n_components <= (1 - share) * 336 + 40
            streams = [masks[name] for name in ("layer3.0.conv2", "layer3.0.downsample.0")]
            assert torch.equal(*streams)
            assert not any("index_add" in str(node.target) for node in model.at(level.level).graph.nodes)
    iterative = Objective(objective.model, objective.task, replace(options, procedure=Iterative(0.5)))
    with pytest.raises(OptionError, match=r"in one shot, not by iterative\(step_share=0.5\); leave `--coupled` out"):
        prune_elastic(iterative, COMPOSITE, levels=LEVELS, coupled=True, output=tmp_path / "iterative")


def test_an_output_that_is_there_is_refused(objective, tmp_path):
    (tmp_path / "elastic").write_text("mine")
    with pytest.raises(SlimFileError, match="already exists; choose another directory or remove it"):
        prune_elastic(objective, COMPOSITE, levels=LEVELS, output=tmp_path / "elastic")
    with pytest.raises(SlimFileError, match="can't be written"):
        prune_elastic(objective, COMPOSITE, levels=LEVELS, output=tmp_path / "elastic" / "below")
    assert (tmp_path / "elastic").read_text() == "mine"


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((0.5, 0.99), "The level 0.99 of `--elastic` removes the whole layer 'conv1' and "),
        ((0.001, 0.5), "The levels 0 and 0.001 of `--elastic` both prune 0 of 336 components; leave one out."),
        ((0.5, 0.5001), "The levels 0.5 and 0.5001 of `--elastic` both prune 168 of 336 components; leave one out."),
    ],
)
def test_levels_that_the_network_cannot_have_are_refused(objective, tmp_path, levels, message):
    ranking = "global" if levels[-1] == 0.99 else "layer"
    chosen = Objective(objective.model, objective.task, ObjectiveOptions((0.0, 0.5), ranking=ranking, device="cpu"))
    with pytest.raises(OptionError, match=re.escape(message)):
        prune_elastic(chosen, CriterionSpec("random", seed=0), levels=levels, output=tmp_path / "elastic")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["0,0.5", "0.5,1", "0.5,0.5", "0.7,0.3", "-0.1", "nan", "1.2"])
def test_levels_increase_between_0_and_1(text):
    with pytest.raises(OptionError, match="must increase strictly, above 0 and below 1, but got "):
        parse_levels(text)


@pytest.mark.parametrize("text", ["", "half", "0.3;0.5", "0.3,"])
def test_levels_are_numbers(text):
    with pytest.raises(OptionError, match="a comma-separated list of shares; try"):
        parse_levels(text)


def test_levels_are_read():
    assert parse_levels("0.3, 0.5,0.7") == (0.3, 0.5, 0.7)
