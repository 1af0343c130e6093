"""Comparisons of criteria: on the real digits, and their statistics on rows made by hand."""

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.image import imread

from hpo.cli import cli
from hpo.comparison import Comparison, Row, Run, Runs, draw_subsets
from hpo.errors import ConfigurationError
from hpo.problem import LoadedProblem
from objectives.datasets import known_classes, load_task
from objectives.models import load_model
from objectives.objective import Objective, ObjectiveOptions
from search_spaces.heuristics import heuristic
from storage.locks import file_lock

QUICK = ["--rates", "0,0.5", "--evaluation-images", "40", "--references-per-class", "2"]
TWO = ["--n-subsets", "2", "--classes-per-subset", "2", "--classes", "1,3,8", *QUICK]
CRITERIA = ["--criteria", "epsilon-abs,weight,taylor"]


pytestmark = pytest.mark.usefixtures("own_logging")


@pytest.fixture(autouse=True)
def _own_storage(monkeypatch, tmp_path):
    monkeypatch.setenv("HPO_STORAGE", f"sqlite:///{tmp_path / 'studies.db'}")


def compare(*arguments, code=0):
    result = CliRunner().invoke(cli, ["compare", *map(str, arguments)], prog_name="hpo")
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def refused(*arguments):
    line = compare(*arguments, code=1).stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    return line.removeprefix("Error: ")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A comparison of two subsets and a seed, and what it printed."""
    folder = tmp_path_factory.mktemp("comparison") / "folder"
    return folder, compare(*CRITERIA, *TWO, "-o", folder)


def rows_of(folder):
    head, *rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return head, rows


# Runs


def test_subsets_are_distinct_and_more_of_them_begin_alike():
    five = draw_subsets((2, 3, 5, 7, 11), 2, 5, seed=4)
    assert len(set(five)) == 5
    assert all(a < b and {a, b} <= {2, 3, 5, 7, 11} for a, b in five)
    assert draw_subsets((2, 3, 5, 7, 11), 2, 10, seed=4)[:5] == five
    assert draw_subsets((2, 3, 5, 7, 11), 2, 5, seed=5) != five
    with pytest.raises(ConfigurationError, match="Of 3 classes there are 3 subsets of 2, fewer than `--n-subsets 4`"):
        draw_subsets((1, 2, 3), 2, 4, seed=0)


def test_every_subset_runs_with_every_seed():
    runs = Runs(2, 2, (0, 7)).of((1, 2, 3))
    assert [run.seed for run in runs] == [0, 7, 0, 7]
    assert runs[0].classes == runs[1].classes != runs[2].classes
    assert [len(run.classes) for run in Runs().of(range(10))] == [3] * 5  # as --help says


@pytest.mark.usefixtures("_own_cache")
def test_classes_are_those_that_have_images():
    model = load_model("digits_cnn")
    assert known_classes("digits", model) == tuple(range(10))
    assert known_classes("digits", model, classes=["8", 3]) == (3, 8)


# Statistics


def row(seed, criterion, value, failure=None):
    figures, accuracies = ({"auc": value}, (1.0, value)) if failure is None else ({}, ())
    return Row((0, 1), seed, criterion, criterion, "x", 9, figures, (0.0, 0.5), accuracies, 1.0, failure)


def test_differences_are_paired_run_by_run():
    generator = np.random.default_rng(0)
    levels = generator.random(30)
    gains = {"a": 0.0, "b": 0.01}
    rows = [row(seed, name, float(levels[seed]) + gains[name]) for seed in range(30) for name in gains]
    found = Comparison.of(rows, ["a", "b"], metric="auc", seed=0)
    a, b = found.standings
    assert a.difference is None
    # Runs differ far more than criteria do, but always alike.
    assert b.difference.low == pytest.approx(0.01)
    assert b.difference.high == pytest.approx(0.01)
    assert b.figure.high - b.figure.low > 0.1
    assert (b.n_better, a.n_better) == (30, 0)
    assert a.figure.mean == pytest.approx(levels.mean())
    assert found.curves["a"][1] == pytest.approx((1.0, levels.mean()))
    resampled = [generator.choice(levels, 30).mean() for _ in range(4000)]
    assert a.figure.low == pytest.approx(np.percentile(resampled, 2.5), abs=0.01)
    assert a.figure.high == pytest.approx(np.percentile(resampled, 97.5), abs=0.01)


def test_runs_in_which_a_criterion_failed_are_left_out_of_all():
    rows = [row(0, "a", 0.1), row(0, "b", 0.2), row(1, "a", 0.9), row(1, "b", 0.0, "it broke")]
    found = Comparison.of(rows, ["a", "b"], metric="auc", seed=0)
    assert (found.n_runs, found.n_compared) == (2, 1)
    assert [each.n_failed for each in found.standings] == [0, 1]
    assert found.standings[0].figure.mean == pytest.approx(0.1)
    with pytest.raises(ConfigurationError, match=r"A criterion failed in every run, .*: it broke"):
        Comparison.of(rows[2:], ["a", "b"], metric="auc", seed=0)


# On the digits


def test_rows_are_what_each_criterion_comes_to_alone(done):
    folder, result = done
    _, rows = rows_of(folder)
    assert [each["criterion"] for each in rows] == ["epsilon-abs", "weight", "taylor"] * 2
    model = load_model("digits_cnn")
    for each in rows[2:4]:
        task = load_task(
            "digits", model, classes=each["classes"], references_per_class=2, evaluation_images=40, seed=each["seed"]
        )
        objective = Objective(model, task, ObjectiveOptions((0.0, 0.5)))
        evaluation = objective.evaluate(heuristic(each["criterion"]))
        assert tuple(each["accuracies"]) == evaluation.curve.accuracies
        assert each["figures"] == evaluation.figures
        assert each["data"] == task.fingerprint
    summary = json.loads((folder / "summary.json").read_text())
    for place, standing in enumerate(summary["standings"]):
        values = [each["figures"]["auc"] for each in rows[place::3]]
        assert standing["figure"]["mean"] == pytest.approx(np.mean(values))
    with (folder / "rows.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["auc"]) for line in table] == [each["figures"]["auc"] for each in rows]
    assert table[0]["accuracy 0.5"] == str(rows[0]["accuracies"][1])
    assert imread(folder / "comparison.png").shape[0] == 360
    assert "2 runs compared." in result.stdout
    assert " this - epsilon-abs [95 %] " in result.stdout


def test_what_is_there_is_not_computed_again_and_more_is_added(done):
    folder, _ = done
    _, before = rows_of(folder)
    (folder / "comparison.png").unlink()
    result = compare(*CRITERIA, *TWO, "-o", folder, "--json")
    assert json.loads(result.stdout) == json.loads((folder / "summary.json").read_text())
    assert rows_of(folder)[1] == before
    assert (folder / "comparison.png").exists()
    result = compare("--criteria", "weight,gradient", *TWO, "-o", folder, "--seeds", "0,1")
    assert "4 runs compared." in result.stdout
    _, after = rows_of(folder)
    assert after[: len(before)] == before
    assert len(after) == len(before) + 2 + 2 * 2


def test_a_comparison_that_is_interrupted_loses_no_row_and_goes_on(done, tmp_path, monkeypatch):
    folder, expected = tmp_path / "new", rows_of(done[0])[1][:6]
    evaluate, n_left = LoadedProblem.evaluate, 4

    def interrupted(*arguments):
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LoadedProblem, "evaluate", interrupted)
        result = compare(*CRITERIA, *TWO, "-o", folder, code=130)
    assert "  hpo compare --criteria epsilon-abs,weight,taylor --n-subsets 2 " in result.stderr
    strip = [{**each, "seconds": 0} for each in expected]
    assert [{**each, "seconds": 0} for each in rows_of(folder)[1]] == strip[:4]
    compare(*CRITERIA, *TWO, "-o", folder)
    assert [{**each, "seconds": 0} for each in rows_of(folder)[1]] == strip


def test_a_criterion_that_fails_is_told_and_left_out(tmp_path):
    """Where fine-tuning diverges for all but a rate of 0, there is nothing to compare."""
    tuning = ["--procedure", "iterative", "--step-share", "0.5", "--finetune-epochs", "20"]
    options = [*tuning, "--finetune-learning-rate", "1e30", "--n-subsets", "1", "--classes", "1,8", *QUICK]
    line = refused("--criteria", "weight,taylor", "--classes-per-subset", "2", *options, "-o", tmp_path / "a")
    assert line.startswith("A criterion failed in every run, so that there is nothing to compare: Fine-tuning, ")
    assert [each["accuracies"] for each in rows_of(tmp_path / "a")[1]] == [[], []]


def test_a_study_and_its_document_are_compared(tmp_path):
    invoke = CliRunner().invoke
    launch = ["launch", "--study", "s", "--exact", "--n-trials", "1", *QUICK]
    assert invoke(cli, launch).exit_code == 0
    path = tmp_path / "best.json"
    assert invoke(cli, ["export", "s", "-o", str(path)]).exit_code == 0
    result = compare("--criteria", f"{path},best,weight", *TWO, "-o", tmp_path / "a", "--json")
    first, second, _ = json.loads(result.stdout)["standings"]
    assert first["criterion"] == str(path)
    assert second["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    document = json.loads(path.read_text())
    name = next(iter(document["layer_groups"]))
    document["layer_groups"][name] = "HLL"
    path.write_text(json.dumps(document))
    assert refused("--criteria", f"{path},weight", *TWO, "-o", tmp_path / "b").startswith(
        f"{str(path)!r} was found with other layer groups than this network's; pass its network"
    )


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--criteria", "weight"], "`--criteria` must name at least two, each once, but got 'weight'."),
        (["--criteria", "weight,weight"], "`--criteria` must name at least two, each once"),
        (["--criteria", "weight,tailor"], "Unknown heuristic 'tailor'. Did you mean 'taylor'?"),
        (["--criteria", "weight,nowhere.json"], "nowhere.json: document cannot be read"),
        (["--criteria", "weight,best"], "There are no studies at sqlite:"),
        (["--criteria", "weight,taylor", "--study", "s"], "`--study` says whose best is compared"),
        ([*CRITERIA, "--seeds", "0,x"], "`--seeds` must be whole numbers separated by commas, but got '0,x'."),
        ([*CRITERIA, "--seeds", "1,1"], "`--seeds` must name numbers from 0 on, each once, but got [1, 1]."),
        ([*CRITERIA, "--n-subsets", "0"], "`--n-subsets` must be at least 1, but got 0."),
        ([*CRITERIA, "--classes-per-subset", "1"], "`--classes-per-subset` must be at least 2, but got 1."),
        ([*CRITERIA, "--classes-per-subset", "10"], "Of 10 classes there are 1 subsets of 10, fewer than"),
        ([*CRITERIA, "--finetune-epochs", "3"], "`--finetune-epochs` is for `--procedure iterative or "),
    ],
)
def test_refuses(arguments, message, tmp_path):
    assert refused(*arguments, "-o", tmp_path / "folder").startswith(message)
    assert not (tmp_path / "folder").exists()


def test_other_settings_and_other_folders_are_refused(done, tmp_path):
    folder, _ = done
    assert refused(*CRITERIA, *TWO, "--sample", "first", "-o", folder) == (
        f'{str(folder)!r} holds a comparison of other settings: sample: "random" -> "first"; choose another folder.'
    )
    line = refused(*CRITERIA, *TWO, "--procedure", "iterative", "-o", folder)
    assert 'procedure.name: "one_shot" -> "iterative" (2 settings differ); choose another folder.' in line
    line = refused(*CRITERIA, *TWO, "--procedure", "dynamic", "-o", folder)
    assert 'other settings: procedure.name: "one_shot" -> "dynamic" (' in line
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    assert refused(*CRITERIA, *TWO, "-o", tmp_path / "mine") == (
        f"{str(tmp_path / 'mine')!r} is there and holds no comparison; choose another folder."
    )
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for content in ((folder / "rows.jsonl").read_text()[:-30], "", "{}\n", "[1]\n"):
        (damaged / "rows.jsonl").write_text(content)
        assert refused(*CRITERIA, *TWO, "-o", damaged).endswith("remove it or choose another folder.")
    (tmp_path / "file").write_text("")
    assert "holds no comparison" in refused(*CRITERIA, *TWO, "-o", tmp_path / "file")
    assert "cannot be written: Not a directory" in refused(*CRITERIA, *TWO, "-o", tmp_path / "file" / "below")


def test_two_comparisons_do_not_write_to_one_folder(done, tmp_path):
    folder, _ = done
    with file_lock(folder / ".lock", timeout_s=0) as is_held:
        assert is_held
        assert refused(*CRITERIA, *TWO, "-o", folder) == (
            f"Another `hpo compare` is writing to {str(folder)!r}; wait for its end or choose another folder."
        )
    new = tmp_path / "new"
    new.mkdir()
    (new / ".lock").write_text("")  # of a comparison that was killed before its first row
    once = ["--n-subsets", "1", "--classes-per-subset", "2", "--classes", "1,3", *QUICK]
    compare("--criteria", "random-0,weight", *once, "-o", new)


def test_a_row_returns_from_json():
    known = row(3, "a", 0.25)
    assert Row.from_json(json.loads(json.dumps(known.to_json()))) == known
    assert known.run == Run((0, 1), 3)
