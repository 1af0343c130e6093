"""The command line on the real digits: what is printed, and what is refused before anything is written."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from optuna.artifacts import get_all_artifact_meta

from hpo.cli import cli
from hpo.config import OPTIONS
from objectives import load_elastic, load_slim
from objectives.models import load_model
from objectives.pruning.curve import FIGURES
from search_spaces.heuristics import BASELINES, HEURISTICS, TRANSFORMER_BASELINES, TRANSFORMER_HEURISTICS
from storage.store import StudyStore

COMMANDS = [
    "launch",
    "status",
    "list",
    "show",
    "evaluate",
    "compare",
    "export",
    "prune",
    "dashboard",
    "db",
    "gc",
    "spaces",
]
QUICK = ["--rates", "0,0.5", "--evaluation-images", "40", "--references-per-class", "1"]


pytestmark = pytest.mark.usefixtures("own_logging")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("cli") / "studies.db"


@pytest.fixture(autouse=True)
def _own_storage(monkeypatch, store):
    monkeypatch.setenv("HPO_STORAGE", f"sqlite:///{store}")


def hpo(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="hpo")
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def refused(*arguments, code=1):
    """The one line that a command ends with."""
    result = hpo(*arguments, code=code)
    assert result.stdout == ""
    *before, line = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "Traceback" not in result.stderr
    assert code == 1 or before == [], "misuse is seen before anything is done"
    return line.removeprefix("Error: ")


@pytest.fixture(scope="module")
def study(store):
    """A finished study of two search trials."""
    load_model("digits_cnn")  # trained now, if it must be: that would be one more line in the log
    environment = pytest.MonkeyPatch()
    environment.setenv("HPO_STORAGE", f"sqlite:///{store}")
    result = hpo("launch", "--study", "quick", "--exact", "--n-trials", 2, *QUICK)
    environment.undo()
    return result


@pytest.fixture(scope="module")
def document(study, store):
    path = store.with_name("best.json")
    hpo("export", "quick", "--storage", f"sqlite:///{store}", "-o", path)
    return path


# Help


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    heavy = "torch", "optuna", "numpy", "matplotlib", "sqlalchemy", "rich", "timm", "zennit"
    code = (
        "import sys\nfrom hpo.cli import cli\n"
        f"try: cli({arguments!r})\nexcept SystemExit: pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_help_lists_the_commands():
    text = hpo("--help").output
    assert [line.split()[0] for line in text.partition("Commands:\n")[2].splitlines()] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples(command):
    examples = hpo(command, "--help").output.partition("Examples:\n")[2]
    assert examples
    assert all(line.startswith(f"  hpo {command}") for line in examples.splitlines())


def test_launch_offers_every_option():
    text = hpo("launch", "--help").output
    assert all(f"--{name} " in text for name in OPTIONS)


def test_the_timeout_says_what_it_does_not_end():
    assert "Heuristics and confirmation always run." in " ".join(hpo("launch", "--help").output.split())


def test_version():
    assert hpo("--version").output.startswith("hpo, version 0.")


# A study


def test_launch_ends_with_a_table(study):
    lines = study.stdout.splitlines()
    assert lines[0] == "Study quick: 2 of 2 trials, 10 heuristics, metric auc."
    assert re.fullmatch(r"Of \d+ masks, \d+ had been measured before \(\d+\.\d %\)\.", lines[1])
    assert lines[2].startswith("Best: trial ")
    assert [line for line in lines if line.startswith(" best: trial ")]
    for name in HEURISTICS:
        assert [line for line in lines if line.startswith(f" {name} ")]
    assert lines[-4:] == [
        "Next:",
        "  hpo export quick -o best.json",
        "  hpo prune best.json --keep-accuracy 0.95 -o slim",
        "  hpo dashboard",
    ]


def test_launch_logs_a_line_per_trial(study):
    lines = study.stderr.splitlines()
    assert lines[0] == "Loading network and images"
    assert lines[1] == "Heuristics (0 of 10 done)"
    assert lines[2].startswith("1/10  trial 0  auc 0.")
    assert lines[2].endswith("  epsilon: Epsilon/Epsilon/Epsilon/Epsilon")
    assert lines[12] == "Search (0 of 2 done)"
    assert sum("trial " in line for line in lines) >= 22


def test_a_finished_study_says_so_and_does_nothing(study):
    again = hpo("launch", "--study", "quick", "--exact", "--n-trials", 2, *QUICK)
    first, _, rest = again.stdout.partition("\n")
    assert first == "Study quick is finished; a larger --n-trials goes on with it."
    assert rest == study.stdout
    assert again.stderr == "Loading network and images\n"


def test_another_identity_is_refused_with_every_difference(study):
    stderr = hpo(
        "launch", "--study", "quick", "--n-trials", 2, *QUICK, "--seed", 1, "--metric", "top_rate", code=1
    ).stderr
    lines = stderr.splitlines()
    assert "Error: Study 'quick' is another search; choose another --study, or launch as it was" in stderr
    assert '  metric: "auc" -> "top_rate"' in lines
    assert "  seed: 0 -> 1" in lines


def test_status(study):
    text = hpo("status").stdout
    assert text.splitlines()[0] == study.stdout.splitlines()[0]
    assert "confirmation-share" in text


def test_status_as_json(study):
    status = json.loads(hpo("status", "quick", "--json").stdout)
    assert status["study"] == "quick"
    assert status["n_trials"]["complete"] == 2
    assert {heuristic["heuristic"] for heuristic in status["heuristics"]} == set(HEURISTICS)
    assert status["configuration"]["n-trials"] == 2
    assert status["confirmation"]["trial"] == status["best"]["number"]


def test_list(study):
    assert " quick " in hpo("list").stdout
    (entry,) = json.loads(hpo("list", "--json").stdout)
    assert (entry["study"], entry["n_trials"]) == ("quick", {"complete": 12})


def test_show(study):
    rows = [line.split() for line in hpo("show", 0).stdout.splitlines()]
    assert ["role", "heuristic", "epsilon"] in rows
    assert ["LLR", "Epsilon(1e-06)"] in rows
    trial = json.loads(hpo("show", 0, "--study", "quick", "--json").stdout)
    assert (trial["trial"], trial["state"], trial["heuristic"]) == (0, "complete", "epsilon")
    assert trial["curve"]["rates"] == [0, 0.5]
    assert list(trial["figures"]) == list(FIGURES)
    assert trial["value"] == trial["figures"]["auc"]


# Export, evaluate, prune


def test_export_says_what_comes_next(document, tmp_path):
    path = tmp_path / "best.json"
    result = hpo("export", "-o", path)
    first, *rest = result.stdout.splitlines()
    assert first.startswith(f"Wrote {path}: trial ")
    assert rest == ["Next:", f"  hpo prune {path} --keep-accuracy 0.95 -o slim"]
    content = json.loads(path.read_text())
    assert content["study"]["name"] == "quick"
    assert set(content["confirmation"]["differences"]) == set(HEURISTICS)
    assert content["curve"]["rates"] == [0, 0.5]


def test_export_confirms_what_is_not(study):
    printed = hpo("export", "--trial", 11, "--json")
    content = json.loads(printed.stdout)
    status = json.loads(hpo("status", "--json").stdout)
    assert content["study"]["trial"] == 11
    if status["best"]["number"] != 11:
        assert "Confirmation (0 of 1 done)" in printed.stderr
    assert 0 < content["confirmation"]["auc"] < 1


def test_export_of_the_top_writes_numbered_files(study, tmp_path):
    hpo("export", "--top", 3, "-o", tmp_path / "best.json")
    values = [json.loads((tmp_path / f"best-{rank}.json").read_text())["study"]["value"] for rank in (1, 2, 3)]
    assert values == sorted(values, reverse=True)
    assert len(list(tmp_path.iterdir())) == 3


def test_evaluate_prints_json_alone(document):
    result = json.loads(hpo("evaluate", "--composite", document, "--json").stdout)
    exported = json.loads(document.read_text())
    assert result["rates"] == exported["rates"]
    assert result["accuracies"] == exported["curve"]["accuracies"]
    assert {name: result[name] for name in FIGURES} == exported["figures"]


def test_evaluate_takes_heuristics_and_rules(study):
    named = json.loads(hpo("evaluate", "--heuristic", "epsilon-plus-abs", "--json", *QUICK).stdout)
    rules = "LLR=ZPlus,MLL=ZPlus,HLL=ZPlus,FCL=Epsilon"
    spelled = json.loads(hpo("evaluate", "--rules", rules, "--abs", "--epsilon", "1e-6", "--json", *QUICK).stdout)
    for result in (named, spelled):
        del result["seconds"]
    assert named == spelled


@pytest.mark.parametrize("name", BASELINES)
def test_evaluate_takes_baselines(name):
    result = json.loads(hpo("evaluate", "--heuristic", name, "--json", *QUICK).stdout)
    assert result["composite"] == BASELINES[name].to_json()
    assert result["accuracies"][0] > 0.9 > result["accuracies"][1]


def test_baselines_stand_beside_a_study_and_are_not_exported(tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_STORAGE", f"sqlite:///{tmp_path / 'studies.db'}")
    options = "--study", "baselines", "--exact", "--n-trials", 1, *QUICK
    n_beside = len(HEURISTICS) + len(BASELINES)
    first, *_ = hpo("launch", *options, "--baselines").stdout.splitlines()
    assert first == f"Study baselines: 1 of 1 trials, {n_beside} heuristics, metric auc."
    status = json.loads(hpo("status", "baselines", "--json").stdout)
    numbers = {each["heuristic"]: each["number"] for each in status["heuristics"]}
    assert set(numbers) == {*HEURISTICS, *BASELINES}
    assert set(status["confirmation"]["differences"]) == {*HEURISTICS, *BASELINES}
    taylor = numbers["taylor"]
    assert refused("export", "baselines", "--trial", taylor, "-o", tmp_path / "taylor.json") == (
        f"Trial {taylor} is the baseline taylor, no composite; choose another one."
    )
    rows = [line.split() for line in hpo("show", taylor, "--study", "baselines").stdout.splitlines()]
    assert ["criterion", "taylor"] in rows
    shown = json.loads(hpo("show", taylor, "--study", "baselines", "--json").stdout)
    assert shown["composite"] == {"criterion": "taylor", "normalize": "l2"}
    hpo("export", "baselines", "--trial", numbers["alpha1-beta0"], "-o", tmp_path / "alpha1.json")
    again = hpo("launch", *options)  # finished as it is: what was asked for once stays
    assert f"{n_beside} heuristics" in again.stdout


def test_evaluate_prints_a_table(study):
    lines = hpo("evaluate", "--heuristic", "zplus", *QUICK).stdout.splitlines()
    assert lines[0] == "ZPlus/ZPlus/ZPlus/ZPlus on 40 search images"
    assert [line for line in lines if line.startswith(" auc ")]
    assert [line for line in lines if line.startswith(" 0.5 ")]


def test_evaluate_repairs_and_says_so():
    plain, repaired = (
        json.loads(hpo("evaluate", "--heuristic", "zplus", *QUICK, *options, "--json").stdout)
        for options in ((), ("--repair", "refit", "--repair-strength", 0.1))
    )
    assert plain["repair"] == {"method": "none", "strength": None}
    assert repaired["repair"] == {"method": "refit", "strength": 0.1}
    assert repaired["auc"] > plain["auc"]
    lines = hpo("evaluate", "--heuristic", "zplus", *QUICK, "--repair", "bn").stdout.splitlines()
    assert lines[0] == "ZPlus/ZPlus/ZPlus/ZPlus on 40 search images, repaired by bn"
    assert "must be one of none, bn, refit" in refused("evaluate", "--heuristic", "zplus", "--repair", "glue", *QUICK)
    # Before anything is loaded.
    unloadable = ("--model", "no-such-network", "--data", "digits")
    assert refused("evaluate", "--heuristic", "zplus", "--repair-strength", 1, *unloadable) == (
        "Repair none takes no strength, but got 1.0; choose bn or refit, or omit it."
    )


ITERATIVE = ["--procedure", "iterative", "--step-share", "0.25", *QUICK]


@pytest.fixture(scope="module")
def iterative(tmp_path_factory):
    """A study of iterative pruning, begun and gone on with, and its document."""
    folder = tmp_path_factory.mktemp("iterative")
    environment = pytest.MonkeyPatch()
    environment.setenv("HPO_STORAGE", f"sqlite:///{folder / 'studies.db'}")
    for n_trials in (1, 2):
        result = hpo("launch", "--study", "steps", "--exact", "--n-trials", n_trials, *ITERATIVE)
    hpo("export", "steps", "-o", folder / "best.json")
    environment.undo()
    return folder, result.stdout


def test_a_study_of_another_procedure_says_so_and_resumes(iterative, monkeypatch):
    folder, printed = iterative
    monkeypatch.setenv("HPO_STORAGE", f"sqlite:///{folder / 'studies.db'}")
    how = "procedure iterative(step_share=0.25)"
    assert printed.startswith(f"Study steps: 2 of 2 trials, 10 heuristics, metric auc, {how}.")
    stderr = hpo("launch", "--study", "steps", "--exact", *QUICK, code=1).stderr
    assert 'objective.procedure: "iterative" -> "one_shot"' in stderr
    trial = json.loads(hpo("show", 0, "--json").stdout)
    assert [step["n_pruned"] for step in trial["steps"]] == [0, 84, 168]
    assert [step["accuracy"] for step in trial["steps"]][::2] == trial["curve"]["accuracies"]
    assert [sum(step["left"].values()) for step in trial["steps"]] == [336, 252, 168]
    assert trial["steps"][0]["loss"] < trial["steps"][1]["loss"]
    assert " before     0 of 336 " in hpo("show", 0).stdout
    with StudyStore.open(f"sqlite:///{folder / 'studies.db'}", read_only=True) as store:
        first = store.load("steps").get_trials()[0]
        artifacts = {each.filename: each for each in get_all_artifact_meta(first, storage=store.storage)}
        assert set(artifacts) == {"curve.csv", "curve.png", "layers.png", "steps.csv"}
        with store.artifacts.open_reader(artifacts["steps.csv"].artifact_id) as content:
            header, *rows = content.read().decode().splitlines()
    assert header.startswith("pruned,accuracy,loss,parameters,flops,left conv1,")
    assert [row.split(",")[0] for row in rows] == ["0", "84", "168"]


def test_an_iterative_document_is_replayed_exactly(iterative, tmp_path):
    path = iterative[0] / "best.json"
    content = json.loads(path.read_text())
    assert (content["procedure"], content["procedure_options"]) == ("iterative", {"step_share": 0.25})
    evaluated = json.loads(hpo("evaluate", "--composite", path, "--json").stdout)
    assert evaluated["accuracies"] == content["curve"]["accuracies"]
    assert (evaluated["procedure"], evaluated["procedure_options"]) == ("iterative", {"step_share": 0.25})
    options = "--repair", "none", "-o", tmp_path / "slim"
    report = json.loads(hpo("prune", path, "--rate", 0.5, *options, "--json").stdout)
    assert report["procedure"] == "iterative(step_share=0.25)"
    # The report's images are those of the confirmation.
    assert report["exact"]["accuracy"] == report["masked_accuracy"] == content["confirmation"]["accuracies"][1]
    assert report["exact"]["parameters"] == evaluated["parameters"][1]
    once = json.loads(hpo("evaluate", "--composite", path, "--procedure", "one_shot", "--json").stdout)
    assert (once["procedure"], once["procedure_options"], once["steps"]) == ("one_shot", {}, [])
    assert refused("prune", path, "--rate", 0.5, "--coupled", "-o", tmp_path / "coupled") == (
        "Coupled groups are removed in one shot, but the document's procedure is iterative(step_share=0.25); "
        "leave `--coupled` out."
    )


def test_dynamic_pruning_is_evaluated_and_replayed(document, tmp_path):
    options = "--procedure", "dynamic", "--step-share", 0.25, "--search-width", 4, "--evaluations-per-step", 20
    evaluated = json.loads(hpo("evaluate", "--composite", document, *options, "--json").stdout)
    assert evaluated["procedure_options"]["search_width"] == 4
    assert evaluated["procedure_options"]["fixed_order"] is False
    content = json.loads(document.read_text())
    assert evaluated["accuracies"] != content["curve"]["accuracies"]
    names = "procedure", "procedure_options"
    path = tmp_path / "dynamic.json"
    path.write_text(json.dumps(content | {name: evaluated[name] for name in names}))
    again = json.loads(hpo("evaluate", "--composite", path, "--json").stdout)
    assert {**again, "seconds": 0} == {**evaluated, "seconds": 0}
    report = hpo("prune", path, "--rate", 0.5, "--repair", "none", "-o", tmp_path / "slim", "--json").stdout
    assert json.loads(report)["exact"]["parameters"] == evaluated["parameters"][1]


def test_repair_and_training_are_studied_exported_and_replayed(tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_STORAGE", f"sqlite:///{tmp_path / 'studies.db'}")
    training = {"finetune_epochs": 2, "finetune_learning_rate": 0.01, "finetune_batch_size": 4}
    options = [part for name, value in training.items() for part in (f"--{name.replace('_', '-')}", value)]
    procedure = ["--procedure", "iterative", "--step-share", "0.5", "--repair", "refit", *QUICK]
    hpo("launch", "--study", "repaired", "--exact", "--n-trials", 1, *procedure, *options)
    path = tmp_path / "best.json"
    assert hpo("export", "repaired", "-o", path).stdout.splitlines()[0].endswith(", repaired by refit.")
    content = json.loads(path.read_text())
    assert content["procedure_options"] == {"step_share": 0.5, **training}
    assert content["repair"] == {"method": "refit", "strength": None}
    evaluated = json.loads(hpo("evaluate", "--composite", path, "--json").stdout)
    assert evaluated["accuracies"] == content["curve"]["accuracies"]
    assert evaluated["seconds"]["training"] > 0
    plain = json.loads(hpo("evaluate", "--composite", path, "--repair", "none", "--json").stdout)
    assert plain["accuracies"] != evaluated["accuracies"]
    report = json.loads(hpo("prune", path, "--rate", 0.5, "-o", tmp_path / "slim", "--json").stdout)
    assert report["exact"]["accuracy"] == report["masked_accuracy"] == content["confirmation"]["accuracies"][1]
    assert report["procedure"].endswith("finetune_epochs=2, finetune_learning_rate=0.01, finetune_batch_size=4)")
    assert (report["repair"]["method"], report["repair"]["accuracy_without"]) == ("refit", None)
    # What was trained is in the file.
    network, images = load_slim(tmp_path / "slim" / "slim.safetensors"), torch.rand(2, 1, 8, 8)
    program = torch.export.load(tmp_path / "slim" / "slim.pt2").module()
    torch.testing.assert_close(network(images), program(images))
    untuned = json.loads(hpo("evaluate", "--composite", path, "--finetune-epochs", 0, "--json").stdout)
    assert untuned["procedure_options"] == {"step_share": 0.5}
    path.write_text(json.dumps(content | {"repair": {"method": "none", "strength": None}}))
    assert refused("prune", path, "--rate", 0.5, "-o", tmp_path / "b", "--repair-strength", 1) == (
        "Repair none takes no strength, but got 1.0; choose bn or refit, or omit it."
    )
    path.write_text(json.dumps(content))
    shown = hpo("prune", path, "--rate", 0.5, "-o", tmp_path / "shown").stdout
    assert re.search(r"Before each training repaired by refit, strength [\d.]+, on \d+ reference\s+images\.", shown)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--finetune-epochs", "2"],
            "`--finetune-epochs` is for `--procedure iterative or prune_and_grow or task_relevant`, but the procedure",
        ),
        (
            ["--procedure", "dynamic", "--finetune-learning-rate", "0.1"],
            "`--finetune-learning-rate` is for `--procedure iterative or prune_and_grow or task_relevant`, but the",
        ),
        (
            ["--procedure", "iterative", "--finetune-batch-size", "8"],
            "`--finetune-batch-size` says how to fine-tune; add `--finetune-epochs N`.",
        ),
        (["--finetune-epochs", "-1"], "`--finetune-epochs` must be a whole number of at least 0, but got '-1'."),
        (["--finetune-learning-rate", "-1"], "`--finetune-learning-rate` must be a number above 0, but got '-1'."),
    ],
)
def test_fine_tuning_is_refused_where_it_does_not_fit(nothing_written, options, message):
    assert refused("launch", *options).startswith(message)


def test_evaluate_says_how_it_pruned():
    lines = hpo("evaluate", "--heuristic", "taylor", *ITERATIVE, "--ranking", "layer").stdout.splitlines()
    assert lines[0] == "taylor on 40 search images, pruned by iterative(step_share=0.25)"
    assert [line for line in lines if line.startswith(" before     0 of 336 ")]


def test_prune_repairs_unless_told_otherwise(document, tmp_path):
    repaired, plain = (
        json.loads(hpo("prune", document, "--rate", 0.5, "-o", tmp_path / name, *options, "--json").stdout)
        for name, options in (("slim", ()), ("plain", ("--repair", "none")))
    )
    assert repaired["repair"]["method"] == "refit"
    assert plain["repair"]["method"] == "none"
    assert repaired["repair"]["accuracy_without"] == plain["exact"]["accuracy"]
    assert repaired["repair"]["agreement"] > plain["repair"]["agreement"]
    text = hpo("prune", document, "--rate", 0.5, "--repair-strength", 2, "-o", tmp_path / "text").stdout
    assert "Repaired by refit, strength 2, on 10 reference images in " in text
    (line,) = (line for line in text.splitlines() if line.startswith("The exact slim network agrees with the unpruned"))
    assert f" % of {repaired['images']['n_images']} confirmation images, without on " in line


@pytest.mark.parametrize("repair", ["none", "bn", "refit"])
def test_a_documents_strength_is_of_its_own_repair(document, tmp_path, repair):
    content = json.loads(document.read_text()) | {"repair": {"method": "refit", "strength": 0.7}}
    path = tmp_path / "refit.json"
    path.write_text(json.dumps(content))
    pruned = hpo("prune", path, "--rate", 0.5, "--repair", repair, "-o", tmp_path / "slim", "--json").stdout
    assert json.loads(pruned)["repair"]["method"] == repair
    assert json.loads(pruned)["repair"]["strength"] != 0.7
    evaluated = hpo("evaluate", "--composite", path, "--repair", repair, "--rates", "0,0.5", "--json").stdout
    assert json.loads(evaluated)["repair"] == {"method": repair, "strength": None}


def test_prune_writes_a_smaller_network(document, tmp_path):
    result = hpo("prune", document, "--rate", 0.3, "-o", tmp_path / "slim", "--json")
    report = json.loads(result.stdout)
    assert report["exact"]["parameters"] < report["unpruned"]["parameters"]
    assert report["warnings"] == []
    assert {Path(file).name for file in report["files"]} == {"slim.pt2", "slim.safetensors", "report.json"}
    again = refused("prune", document, "--rate", 0.3, "-o", tmp_path / "slim")
    assert "slim" in again


def test_prune_prints_a_table(document, tmp_path):
    text = hpo("prune", document, "--params", 0.8, "-o", tmp_path / "slim").stdout
    assert text.startswith("Pruned ")
    for name in ("unpruned", "masked", "exact slim"):
        assert f" {name} " in text


ELASTIC = ["--elastic", "0.2,0.4", "--ranking", "layer"]


def test_prune_makes_an_elastic_network_of_a_document(document, tmp_path):
    report = json.loads(hpo("prune", document, *ELASTIC, "-o", tmp_path / "elastic", "--json").stdout)
    assert report["sparsities"] == [0, 0.2, 0.4]
    assert (report["growth"], report["procedure"], report["images"]["set"]) == (None, "one_shot", "confirmation")
    parameters = [level["parameters"] for level in report["levels"]]
    assert parameters == sorted(parameters, reverse=True)
    assert sorted(path.name for path in (tmp_path / "elastic").iterdir()) == ["elastic.safetensors", "report.json"]
    assert json.loads((tmp_path / "elastic" / "report.json").read_text()) == report
    model = load_elastic(tmp_path / "elastic" / "elastic.safetensors")
    assert [sum(int(mask.sum()) for mask in masks.values()) for masks in model.masks] == [
        level["n_components"] for level in report["levels"]
    ]
    again = refused("prune", document, *ELASTIC, "-o", tmp_path / "elastic")
    assert again == f"The output '{tmp_path / 'elastic'}' already exists; choose another directory or remove it."


def test_prune_grows_an_elastic_network_of_a_heuristic(tmp_path):
    growing = ["--grow-epochs", 1, "--grow-images", 2, "--grow-learning-rate", 0.01]
    growing += ["--procedure", "iterative", "--step-share", 0.4]
    result = hpo("prune", "--heuristic", "taylor", *ELASTIC, *growing, *QUICK[2:], "-o", tmp_path / "elastic")
    first, *rest = result.stdout.splitlines()
    by = "ranked by taylor, pruned by iterative(step_share=0.4)"
    assert first.startswith(f"An elastic network of 3 levels and 336 components, {by}; ")
    (header,) = (line.split() for line in rest if line.startswith(" level "))
    assert header[:5] == ["level", "pruned", "components", "accuracy", "ungrown"]
    grown = "Grown in 1 epoch a level on 20 images at a learning rate of 0.01"
    assert f"{grown}, the smallest level repaired by refit before;" in result.stdout
    assert "Growing level 0 (3 of 3 done)" in result.stderr
    assert rest[-3:] == ["Wrote:", *(f"  {tmp_path / 'elastic' / n}" for n in ("elastic.safetensors", "report.json"))]


def test_a_strength_alone_is_the_usual_repairs(document, tmp_path):
    made = hpo(
        "prune", document, *ELASTIC, "--grow-epochs", 1, "--repair-strength", 0.1, "-o", tmp_path / "a", "--json"
    )
    assert json.loads(made.stdout)["repair"] == "refit(0.1)"
    made = hpo("prune", document, "--rate", 0.4, "--repair-strength", 0.1, "-o", tmp_path / "b", "--json")
    assert json.loads(made.stdout)["repair"]["strength"] == 0.1


def test_prune_replays_prune_and_grow(document, tmp_path):
    content = json.loads(document.read_text())
    options = {"core_share": 0.4, "step_share": 0.4, "finetune_epochs": 1, "finetune_batch_size": 5}
    path = tmp_path / "grown.json"
    path.write_text(json.dumps(content | {"procedure": "prune_and_grow", "procedure_options": options}))
    report = json.loads(hpo("prune", path, *ELASTIC, "-o", tmp_path / "elastic", "--json").stdout)
    assert report["procedure"].startswith("prune_and_grow(core_share=0.4, step_share=0.4, finetune_epochs=1, ")
    slim = json.loads(hpo("prune", path, "--rate", 0.4, "-o", tmp_path / "slim", "--json").stdout)
    assert slim["repair"]["method"] == "none"
    assert slim["procedure"] == report["procedure"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--elastic", "0.5,0.3"],
            "Levels of `--elastic` must increase strictly, above 0 and below 1, but got 0.5, 0.3.",
        ),
        (
            ["--elastic", "0.2,1"],
            "Levels of `--elastic` must increase strictly, above 0 and below 1, but got 0.2, 1.0.",
        ),
        (["--elastic", "many"], "`--elastic many` isn't a comma-separated list of shares; try 0.3,0.5,0.7."),
        ([*ELASTIC, "--repair", "refit"], "The levels of an elastic network share weights, which a repair fits to the"),
        (["--elastic", "0.99"], "The level 0.99 of `--elastic` removes the whole layer '"),
        (
            [*ELASTIC, "--grow-epochs", 1, "--grow-images", 1000],
            "`--grow-images 1000`: The class '0' (output 0) has 100 training images, fewer than the 1000 "
            "references wanted; add images, lower --grow-images or",
        ),
        (
            [*ELASTIC, "--grow-epochs", 1, "--grow-learning-rate", "1e20"],
            "Growing: The training diverged in epoch 1 of 1 (loss ",
        ),
        ([*ELASTIC, "--procedure", "dynamic"], "The document says how pruning proceeds; leave `--procedure` out."),
        (["--rate", 0.4, "--ranking", "layer"], "The document says how pruning proceeds; leave `--ranking` out."),
    ],
)
def test_elastic_networks_that_cannot_be_are_refused(document, tmp_path, arguments, message):
    assert refused("prune", document, *arguments, "-o", tmp_path / "elastic").startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (ELASTIC, "Give DOCUMENT or --heuristic."),
        (["best.json", *ELASTIC, "--heuristic", "zplus"], "Give DOCUMENT or --heuristic."),
        (
            ["best.json", *ELASTIC, "--rate", 0.4],
            "Give one of --rate, --keep-accuracy, --params, --flops and --elastic.",
        ),
        (["best.json", *ELASTIC, "--grow-images", 3], "--grow-learning-rate and --grow-images go with --grow-epochs."),
        (
            ["best.json", *ELASTIC, "--grow-epochs", 3, "--grow-learning-rate", "nan"],
            "--grow-learning-rate must be a finite number, but got nan.",
        ),
        (["best.json", "--rate", 0.4, "--grow-epochs", 3], "--heuristic and --grow-epochs go with --elastic."),
        (["--rate", 0.4], "Missing argument 'DOCUMENT'."),
    ],
)
def test_options_of_elastic_networks_go_together(tmp_path, arguments, message):
    assert message in refused("prune", *arguments, "-o", tmp_path / "elastic", code=2)


def test_spaces():
    text = hpo("spaces").stdout
    assert " cnn " in text
    assert "1,212" in text
    names = json.loads(hpo("spaces", "--json").stdout)
    assert set(names["heuristics"]) == {*HEURISTICS, *TRANSFORMER_HEURISTICS}
    assert set(names["baselines"]) == {*BASELINES, *TRANSFORMER_BASELINES}
    assert names["baselines"]["random-3"] == {"criterion": "random", "normalize": "none", "seed": 3}
    assert " alpha1-beta0-cp-abs " in text
    assert names["metrics"] == list(FIGURES)
    assert {"grid", "tpe", "random"} <= set(names["samplers"])


# Bad input


@pytest.fixture
def nothing_written(tmp_path, monkeypatch):
    """A store in a folder that does not exist and must not come to be."""
    directory = tmp_path / "new"
    monkeypatch.setenv("HPO_STORAGE", f"sqlite:///{directory / 'studies.db'}")
    yield
    assert not directory.exists()


@pytest.mark.usefixtures("nothing_written")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet81", "--data", "digits"], "Unknown model 'resnet81'"),
        (["--space", "cn"], "Unknown search space 'cn'. Did you mean 'cnn'?"),
        (["--space", "no.toml"], "Search space file '"),
        (["--sampler", "tbe"], "Unknown sampler 'tbe'. Did you mean 'tpe'?"),
        (["--sampler", "grid", "--space", "cnn-continuous"], "Space 'cnn-continuous' is continuous and has no grid"),
        (["--metric", "acu"], "Unknown metric 'acu'. Did you mean 'auc'?"),
        (["--rates", "0.1,0.5"], "Pruning rates must increase strictly from 0"),
        (["--data", "folder:nowhere", "--model", "resnet18"], "The model 'resnet18' can't be loaded"),
        (["--data", "diggits", "--model", "digits_cnn"], "Unknown data 'diggits'"),
        (["--checkpoint", "nowhere.pt"], "The checkpoint '"),
        (["--classes", "3,11"], "--classes: 11 is out of range; the network's outputs are 0 to 9."),
        (
            ["--references-per-class", "100000"],
            "The class '0' (output 0) has 100 training images, fewer than the 100000",
        ),
        (["--device", "cuda:99"], "There is no device 'cuda:99' on this machine"),
        (["--storage", "studies.db"], "'studies.db' is not a storage URL; for a SQLite file write"),
        (["--storage", "postgrse://ann:secret@host/x"], "No database 'postgrse' is known for the storage URL "),
        (
            ["--storage", "mysql://ann:secret@127.0.0.1:1/x"],
            "The driver 'MySQLdb' of the storage URL 'mysql://ann:***@",
        ),
        (["--config", "nowhere.toml"], "Cannot read configuration file 'nowhere.toml': No such file"),
        (["--exact", "--pruner", "race"], "`--pruner race` contradicts `--exact`; leave one out."),
        (["--pruner", "median"], "`--pruner` must be one of none, race, but got 'median'."),
        (["--race-risk", "1"], "`--race-risk` must be a probability above 0 and below 0.5, but got '1'."),
        (["--pruner", "race", "--metric", "top_rate"], "`--metric top_rate` is no weighted sum of accuracies, "),
        (["--study", "a/b"], "`--study` must not hold slashes or line breaks, but got 'a/b'."),
    ],
)
def test_launch_refuses(arguments, message):
    line = refused("launch", *arguments)
    assert line.startswith(message)
    assert "secret" not in line


@pytest.mark.usefixtures("nothing_written")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heuristic", "epsilom"], "Unknown heuristic 'epsilom'. Did you mean 'epsilon'?"),
        (
            ["--rules", "LLR=Epsilom,MLL=Epsilon,HLL=ZPlus,FCL=Epsilon"],
            "Unknown rule 'Epsilom'. Did you mean 'Epsilon'?",
        ),
        (["--rules", "LLR=Epsilon"], "Layer group MLL has no rule"),
        (
            ["--rules", "LLR=ZPlus,MLL=ZPlus,HLL=ZPlus,FCL=ZPlus", "--epsilon", "0.3"],
            "`--epsilon 0.3` is for the Epsilon rule, which --rules lacks; leave it out.",
        ),
        (["--composite", "nowhere.json"], "nowhere.json: document cannot be read: No such file"),
    ],
)
def test_evaluate_refuses(arguments, message):
    assert refused("evaluate", *arguments).startswith(message)


def test_evaluate_wants_one_composite():
    assert "Give one of --composite, --heuristic and --rules." in refused("evaluate", code=2)
    assert "--abs, --epsilon and --attention go with --rules." in refused(
        "evaluate", "--heuristic", "zplus", "--abs", code=2
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "document version 2 is not known; this release reads version 1."),
        ({"kind": "recipe"}, "$.kind is 'recipe', "),
        ({"composite": {"rules": {}, "abs": True}}, "$.composite.rules lacks 'LLR'."),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "prune"])
def test_bad_documents_are_refused(document, tmp_path, command, change, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(json.loads(document.read_text()) | change))
    arguments = ["--composite", path] if command == "evaluate" else [path, "--rate", 0.4, "-o", tmp_path / "slim"]
    assert refused(command, *arguments).startswith(f"{path}: {message}")
    assert not (tmp_path / "slim").exists()


@pytest.mark.parametrize("command", ["evaluate", "prune"])
@pytest.mark.parametrize(
    ("field", "text", "options"),
    [
        ("model", "tempfile:mkdtemp", {}),
        ("model", "timm:data.dataset.os.system", {"command": "touch PWNED"}),
        ("model", "folder:os.system", {"command": "touch PWNED"}),
        ("model", "évil:run", {}),
        ("data", "tempfile:mkdtemp", {}),
        ("data", "évil:run", {}),
        ("data", "timm:wds/x?train_split=pipe:touch PWNED;1..2.tar", {}),
        ("data", "timm:HFDS/x?trust_remote_code=true", {}),
    ],
)
def test_a_document_runs_no_code(document, tmp_path, monkeypatch, command, field, text, options):
    (tmp_path / "évil.py").write_text("open('PWNED', 'w').close()")
    monkeypatch.chdir(tmp_path)
    content = json.loads(document.read_text())
    content[field]["name" if field == "model" else "source"] = text
    content["model"]["options"] = options
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(content))
    arguments = ["--composite", path] if command == "evaluate" else [path, "--rate", 0.4, "-o", tmp_path / "slim"]
    message = f"The document names {text!r}, which runs code and is not loaded from there; pass `--{field} "
    assert refused(command, *arguments).startswith(message)
    assert not (tmp_path / "PWNED").exists()


def test_odd_module_names_are_no_imports(document, tmp_path, monkeypatch):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "1x.py").write_text("open('PWNED', 'w').close()")
    monkeypatch.chdir(tmp_path)
    content = json.loads(document.read_text())
    content["model"]["name"] = "evil.1x:f"
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(content))
    assert "Unknown model 'evil.1x:f'" in refused("prune", path, "--rate", 0.4, "-o", tmp_path / "slim")
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("references", {"batch_size": "x"}, "$.references.batch_size is 'x', but must be of type integer."),
        ("references", {"sample": "last"}, "$.references.sample has the unknown value 'last'."),
        ("references", {"seed": -1}, "$.references.seed is -1, "),
        ("data", {"confirmation_share": "half"}, "$.data.confirmation_share is 'half', but must be of type number."),
        ("data", {"evaluation_images": 0.5}, "$.data.evaluation_images is 0.5, "),
        ("data", {"n_search_images": "40"}, "$.data.n_search_images is '40', "),
        ("data", {"classes": [3]}, "The saved 'classes' must name at least two classes, but got "),
        ("preprocessing", {"crop_mode": 1}, "$.preprocessing.crop_mode has the unknown value 1."),
        ("preprocessing", {"crop": 7.0}, "The saved 'crop' must be a share above 0 and at most 1, but got 7.0."),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "prune"])
def test_values_of_a_document_are_read_as_options_are(document, tmp_path, command, part, change, message):
    content = json.loads(document.read_text())
    content[part] |= change
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(content))
    arguments = ["--composite", path] if command == "evaluate" else [path, "--rate", 0.4, "-o", tmp_path / "slim"]
    assert message in refused(command, *arguments)


@pytest.mark.parametrize("command", ["evaluate", "prune"])
def test_a_document_of_another_network_is_refused(document, tmp_path, command):
    content = json.loads(document.read_text())
    layer = next(iter(content["model"]["component_widths"]))
    content["model"]["component_widths"][layer] += 1
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    arguments = ["--composite", path] if command == "evaluate" else [path, "--rate", 0.4, "-o", tmp_path / "slim"]
    assert layer in refused(command, *arguments)


@pytest.mark.parametrize("command", ["evaluate", "prune"])
def test_layers_that_a_network_lacks_are_said_of_the_network(document, tmp_path, command):
    content = json.loads(document.read_text())
    layer = next(iter(content["model"]["component_widths"]))
    for layers in (content["model"]["component_widths"], content["layer_groups"]):
        layers["elsewhere"] = layers.pop(layer)
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    arguments = ["--composite", path] if command == "evaluate" else [path, "--rate", 0.4, "-o", tmp_path / "slim"]
    assert "layer 'elsewhere' has" in refused(command, *arguments)


@pytest.mark.parametrize("command", ["evaluate", "prune"])
def test_a_network_of_other_outputs_is_refused(document, tmp_path, command):
    content = json.loads(document.read_text())
    content["model"]["num_classes"] = 12
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    arguments = ["--composite", path] if command == "evaluate" else [path, "--rate", 0.4, "-o", tmp_path / "slim"]
    assert "has 12 outputs; this one has 10" in refused(command, *arguments)


@pytest.mark.parametrize(
    ("command", "key"), [("prune", "rates"), ("prune", "abs-scope"), ("prune", "timeout"), ("evaluate", "n-trials")]
)
def test_keys_that_would_be_ignored_are_refused(document, tmp_path, command, key):
    path = tmp_path / "study.toml"
    value = {"rates": "[0, 0.5]", "abs-scope": '"sum"', "timeout": '"5m"', "n-trials": "3"}[key]
    path.write_text(f"batch-size = 50\n{key} = {value}\n")
    arguments = ["--composite", document] if command == "evaluate" else [document, "--rate", 0.4, "-o", tmp_path / "s"]
    assert refused(command, *arguments, "--config", path) == (
        f"Key '{key}' of '{path}' is no option of `hpo {command}`; leave it out."
    )


def test_prune_wants_one_amount(document, tmp_path):
    message = "Give one of --rate, --keep-accuracy, --params, --flops and --elastic."
    assert message in refused("prune", document, "-o", tmp_path / "slim", code=2)
    assert message in refused("prune", document, "--rate", 0.1, "--flops", 0.5, "-o", tmp_path / "slim", code=2)
    assert "1.5 is not in the range" in refused("prune", document, "--rate", 1.5, "-o", tmp_path / "slim", code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "quik"], "There is no study 'quik' in "),
        (["status", "--storage", "x.db"], "'x.db' is not a storage URL"),
        (["show", 99], "Study 'quick' has 12 trials, but none of number 99."),
        (["show", 0, "--study", "quik"], "There is no study 'quik' in "),
        (["export", "quik", "-o", "x.json"], "There is no study 'quik' in "),
        (["export", "--trial", 99, "-o", "x.json"], "Study 'quick' has no trial 99, but 0 to 11."),
        (["export", "-o", "no/such/folder/x.json"], "Document 'no/such/folder/x.json' cannot be written: No such file"),
    ],
)
def test_readers_refuse(study, arguments, message):
    line = refused(*arguments)
    assert line.startswith(message)
    if "quik" in line:
        assert "Did you mean 'quick'?" in line


@pytest.mark.usefixtures("nothing_written")
@pytest.mark.parametrize("arguments", [["status"], ["list"], ["show", 0], ["export", "-o", "x.json"], ["dashboard"]])
def test_readers_of_no_store_refuse(arguments):
    assert refused(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lanch"], "No such command 'lanch'. Did you mean 'launch'?"),
        (["launch", "--checkpoit", "x"], "No such option '--checkpoit'. Did you mean '--checkpoint'?"),
        (["export"], "Name the file to write with -o FILE, or pass --json."),
        (["export", "--trial", 1, "--top", 2, "-o", "x"], "Give --trial or --top, not both."),
        (["show", "x"], "'x' is not a valid integer range."),
        (["dashboard", "--port", 99999], "99999 is not in the range"),
    ],
)
def test_usage_errors(arguments, message):
    line = refused(*arguments, code=2)
    assert line.startswith(message) or f": {message}" in line
    command = arguments[0] if arguments[0] in COMMANDS else ""
    assert line.endswith(f" See `{f'hpo {command}'.strip()} --help`.")
