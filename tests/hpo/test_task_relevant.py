"""Studies of task-relevant pruning from the command line, on real digits and a split of their classes."""

import json

import pytest
from click.testing import CliRunner
from PIL import Image

from hpo.cli import cli
from objectives import load_slim
from objectives.datasets.digits import digits_data
from storage.store import StudyStore

SPLITS = """
[new]
scenario = "new_classes"
T = ["4", "5"]
P = ["0", "1"]
F = ["3"]

[odd]
scenario = "new_subclasses"
P = ["0", "1"]
F = ["2", "3"]
[odd.superclasses]
even = ["0", "2"]
odd = ["1", "3"]
"""
QUICK = ["--procedure", "task_relevant", "--rates", "0,0.4", "--step-share", "0.4", "--references-per-class", "4"]
QUICK += ["--evaluation-images", "20", "--pretrain-epochs", "1", "--finetune-epochs", "1"]

pytestmark = pytest.mark.usefixtures("own_logging")


@pytest.fixture(autouse=True)
def splits(tmp_path, monkeypatch):
    """A file of two splits; stores and caches are of each test's own."""
    monkeypatch.setenv("HPO_STORAGE", f"sqlite:///{tmp_path / 'studies.db'}")
    path = tmp_path / "splits.toml"
    path.write_text(SPLITS)
    return path


def hpo(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="hpo")
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def refused(*arguments):
    """The one line that a command ends with."""
    result = hpo(*arguments, code=1)
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1].removeprefix("Error: ")


def test_a_study_is_launched_exported_and_replayed(splits, tmp_path):
    given = ["--splits", f"{splits}:odd", "--confirmation-share", 0]
    launch = hpo("launch", "--study", "s", "--n-trials", 1, *QUICK, *given)
    assert "metric auc_parameters, procedure task_relevant(step_share=0.4, pretrain_epochs=1, " in launch.stdout
    splits.unlink()  # the study and its documents hold the split
    again = hpo("status", "s", "--json").stdout
    assert json.loads(again)["configuration"]["splits"]["F"] == ["2", "3"]
    path = tmp_path / "best.json"
    hpo("export", "s", "-o", path)
    content = json.loads(path.read_text())
    assert (content["procedure"], content["ranking"], content["abs_scope"]) == ("task_relevant", "layer", "element")
    assert content["data"]["split"]["superclasses"] == {"even": ["0", "2"], "odd": ["1", "3"]}
    assert content["model"]["num_classes"] == 2
    evaluated = json.loads(hpo("evaluate", "--composite", path, "--json").stdout)
    assert evaluated["accuracies"] == content["curve"]["accuracies"]
    assert evaluated["auc_parameters"] == content["study"]["value"]
    assert [step["n_pruned"] for step in evaluated["steps"]] == [0, 129]
    assert all(0 <= step["accuracy_task"] <= 1 for step in evaluated["steps"])
    report = json.loads(hpo("prune", path, "--rate", 0.4, "-o", tmp_path / "slim", "--json").stdout)
    assert report["warnings"] == []
    assert report["exact"]["accuracy"] == report["masked_accuracy"] == evaluated["accuracies"][1]
    assert report["exact"]["parameters"] == evaluated["parameters"][1]
    assert load_slim(tmp_path / "slim" / "slim.safetensors").fc.out_features == 2
    assert refused("prune", path, "--elastic", "0.2,0.4", "-o", tmp_path / "elastic") == (
        "`--elastic` makes sizes that share their weights, but procedure task_relevant adapts each of its own; pass "
        "`--rate`, or another procedure."
    )


def test_domains_of_folders_are_learnt_replayed_and_pruned_for(tmp_path):
    path, images = tmp_path / "domains.toml", tmp_path / "images"
    path.write_text('[light]\nscenario = "new_subclasses"\nby = "domain"\nP = ["dark"]\nF = ["light"]\n')
    digits = digits_data()
    for side, pixels, labels in (
        ("train", digits.train_images, digits.train_labels),
        ("val", digits.evaluation_images, digits.evaluation_labels),
    ):
        for label in range(10):
            for number, image in enumerate(pixels[labels == label][:6]):
                for domain, styled in (("dark", image), ("light", 255 - image)):
                    folder = images / side / domain / str(label)
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(styled).save(folder / f"{number}.png")
    given = ["--model", "digits_cnn", "--data", f"domains:{images}", "--splits", path, "--confirmation-share", 0]
    hpo("launch", "--study", "s", "--n-trials", 1, *QUICK, *given)
    path.unlink()
    document = tmp_path / "best.json"
    hpo("export", "s", "-o", document)
    content = json.loads(document.read_text())
    assert content["data"]["split"] == {
        "scenario": "new_subclasses",
        "T": [],
        "P": ["dark"],
        "F": ["light"],
        "by": "domain",
    }
    assert content["data"]["source"] == f"domains:{images}"
    report = json.loads(hpo("prune", document, "--rate", 0.4, "-o", tmp_path / "slim", "--json").stdout)
    assert report["exact"]["accuracy"] == content["curve"]["accuracies"][1]


def test_trials_whose_training_diverges_fail_with_that_reason(splits, tmp_path):
    diverging = ["--pretrain-epochs", 0, "--finetune-learning-rate", 1e30, "--splits", f"{splits}:new"]
    line = refused("launch", "--study", "s", "--n-trials", 1, *QUICK, *diverging)
    assert "Adaptation, 0 % pruned: The training diverged in epoch 1 of 1 " in line
    with StudyStore.open(f"sqlite:///{tmp_path / 'studies.db'}") as store:
        failed = [trial for trial in store.load("s").get_trials() if trial.state.name == "FAIL"]
    assert failed
    assert all("The training diverged in epoch 1 of 1 " in str(trial.user_attrs) for trial in failed)


def test_evaluate_shows_the_task_before_adaptation(splits):
    given = ["--pretrain-epochs", 0, "--splits", f"{splits}:new"]
    text = hpo("evaluate", "--heuristic", "weight", *QUICK, *given).stdout
    (header,) = (line for line in text.splitlines() if line.startswith(" step "))
    columns = "step pruned accuracy on P, unadapted loss (references) parameters FLOPs"
    assert header.split() == columns.split()
    # The digits network knows all of them.
    (before,) = (line.split() for line in text.splitlines() if line.startswith(" before "))
    assert float(before[5]) > 0.9


def test_criteria_are_compared_over_seeds(splits, tmp_path):
    """Each seed has a network of its own, which the criteria share, and more seeds may be added."""
    given = ["compare", *QUICK, "--splits", f"{splits}:odd", "--criteria", "epsilon-abs,weight", "-o", tmp_path / "c"]
    hpo(*given, "--seeds", 3)
    compared = json.loads(hpo(*given, "--seeds", "3,4", "--json").stdout)
    assert (compared["metric"], compared["n_runs"], compared["n_compared"]) == ("auc_parameters", 2, 2)
    settings, *rows = map(json.loads, (tmp_path / "c" / "rows.jsonl").read_text().splitlines())
    assert settings["settings"]["split"]["F"] == ["2", "3"]
    assert [(row["seed"], row["criterion"], row["classes"]) for row in rows] == [
        (seed, criterion, []) for seed in (3, 4) for criterion in ("epsilon-abs", "weight")
    ]
    for what in ("data", "network"):
        of_rows = [row[what] for row in rows]
        assert of_rows[0] == of_rows[1] != of_rows[2] == of_rows[3]
    file = tmp_path / "c" / "rows.jsonl"
    file.write_text(file.read_text().replace(rows[0]["network"], "0" * 32))  # as a GPU might have trained it
    assert refused(*given, "--seeds", "3", "--criteria", "zplus,weight") == (
        "The network of seed 3 was trained anew and is not the one that epsilon-abs pruned; choose another folder."
    )
    line = refused(*(f"{splits}:new" if each == f"{splits}:odd" else each for each in given))
    assert line.startswith(f"{str(tmp_path / 'c')!r} holds a comparison of other settings: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch", *QUICK], "`--procedure task_relevant` needs to know which classes are extra knowledge (T), the"),
        (["launch", "--splits", "{}:new"], "`--splits` is for `--procedure task_relevant`, but the procedure is one_s"),
        (["launch", *QUICK, "--splits", "{}:new", "--classes", "0,1"], "`--splits` says which classes there are; lea"),
        (["launch", *QUICK, "--splits", "{}"], "'{}' has 2 splits; name one of them, as {}:new."),
        (["launch", *QUICK, "--splits", "{}:old"], "'{}' has no split 'old'. Did you mean 'odd'?"),
        (["launch", *QUICK, "--splits", "none.toml"], "The splits 'none.toml' can't be read (No such file or direct"),
        (["launch", *QUICK, "--splits", "{}:new", "--step-share", "1"], "`step_share` of task_relevant must be below"),
        (
            ["launch", *QUICK, "--splits", "{}:odd", "--model-option", "num_classes=3"],
            "The network has 3 outputs, but the split 2 (even, odd); build it with as many, of timm by",
        ),
        (
            ["launch", *QUICK, "--splits", "{}:new", "--references-per-class", "1"],
            "The class '4' in T of a split has 1 training images, too few to train on and to hold out for validation;",
        ),
        (
            ["compare", *QUICK, "--splits", "{}:new", "--criteria", "zplus,weight", "--n-subsets", "2", "-o", "c"],
            "`--n-subsets 2` draws subsets of the classes, but `--splits` says what each class is for; leave it out,",
        ),
    ],
)
def test_refuses(splits, arguments, message):
    line = refused(*(argument.replace("{}", str(splits)) for argument in arguments))
    assert line.startswith(message.replace("{}", str(splits)))
    assert not splits.with_name("studies.db").exists()
