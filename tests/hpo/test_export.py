import json

import pytest

from hpo.config import resolve
from hpo.errors import ImportRefusedError, NothingFoundError
from hpo.export import choose_trials, document_options, export_paths, export_trials
from hpo.problem import refuse_imports
from hpo.progress import LogProgress
from search_spaces.documents import load_document, write_document
from search_spaces.heuristics import HEURISTICS
from search_spaces.spaces import RepairedSpace, load_space
from storage.errors import StudyIdentityError
from storage.store import StudyStore


@pytest.fixture
def study(drive, load, make_problem):
    drive(make_problem(), n_trials=5)
    return load()


def test_the_best_trial_is_chosen(study):
    (best,) = choose_trials(study)
    assert best.value == max(trial.value for trial in study.get_trials())


def test_the_top_has_distinct_composites(study):
    top = choose_trials(study, top=100)
    composites = [json.dumps(trial.user_attrs["composite"]) for trial in top]
    assert len(set(composites)) == len(composites)
    assert [trial.value for trial in top] == sorted((trial.value for trial in top), reverse=True)


def test_trials_that_are_not_there_are_refused(study, url):
    with pytest.raises(NothingFoundError, match="Study 's' has no trial 99, but 0 to 14"):
        choose_trials(study, trial=99)
    with StudyStore.open(url) as store:
        study = store.load("s")
        study.ask()
        with pytest.raises(NothingFoundError, match="Trial 15 is RUNNING, not COMPLETE"):
            choose_trials(study, trial=15)


def test_a_confirmed_trial_is_exported_without_network_and_images(study, tmp_path):
    (document,) = export_trials(study, choose_trials(study), {}, LogProgress("auc"))
    write_document(tmp_path / "best.json", document)
    loaded = load_document(tmp_path / "best.json")
    assert loaded == document
    assert loaded.study["name"] == "s"
    assert loaded.study["n_trials"] == 5
    assert loaded.figures["auc"] == loaded.study["value"]
    assert set(loaded.confirmation["differences"]) == set(HEURISTICS)
    assert len(loaded.confirmation["accuracies"]) == len(loaded.rates) == 4


def test_confirming_on_another_problem_is_refused(study):
    """The stand-in's study is not that of the digits, which its configuration names."""
    unconfirmed = next(
        trial for trial in study.get_trials()[10:] if f"confirmed:{trial.number}" not in study.user_attrs
    )
    with pytest.raises(StudyIdentityError, match="Study 's' searched on something else; pass the options"):
        export_trials(study, [unconfirmed], {}, LogProgress("auc"))


def test_a_store_imports_nothing(drive, load, make_problem):
    drive(make_problem(), n_trials=3, model="tempfile:mkdtemp", data="digits")
    trial = next(trial for trial in load().get_trials()[10:] if f"confirmed:{trial.number}" not in load().user_attrs)
    with pytest.raises(ImportRefusedError, match="Study 's' names 'tempfile:mkdtemp', which runs code"):
        export_trials(load(), [trial], {}, LogProgress("auc"))


@pytest.mark.parametrize("field", ["model", "data", "space"])
def test_only_what_this_command_line_names_may_run_code(field):
    configuration = resolve({"model": "resnet18", "data": "digits"} | {field: "tempfile:mkdtemp"})
    refuse_imports(configuration, {field}, "Study 's'")
    with pytest.raises(ImportRefusedError, match=f"pass `--{field} tempfile:mkdtemp` if you trust it"):
        refuse_imports(configuration, {"model", "data", "space"} - {field}, "Study 's'")


@pytest.mark.parametrize(("count", "names"), [(1, ["best.json"]), (3, ["best-1.json", "best-2.json", "best-3.json"])])
def test_output_names(tmp_path, count, names):
    assert [path.name for path in export_paths(tmp_path / "best.json", count)] == names


def test_a_document_says_how_its_trial_is_repaired(drive, load, make_problem):
    """In one place, also where a composite brings its own repair."""
    drive(make_problem(), space=RepairedSpace(load_space("cnn"), ("bn",), (0.3,)), sampler_name="random", n_trials=9)
    exported = {}
    for trial in load().get_trials():
        if f"confirmed:{trial.number}" in load().user_attrs:
            (document,) = export_trials(load(), [trial], {}, LogProgress("auc"))
            assert document.composite.repair is None
            exported[trial.user_attrs["role"]] = document
    assert exported["heuristic"].repair == {"method": "none", "strength": None}
    assert exported["search"].repair == {"method": "bn", "strength": 0.3}
    assert document_options(exported["search"])["repair_strength"] == 0.3
    options = document_options(load_document(exported["heuristic"].to_json() | {"repair": {"method": "refit"}}))
    assert options["repair"] == "refit"
    assert options.get("repair_strength") is None
    assert "repair" not in document_options(exported["heuristic"])


def test_a_document_gives_its_options(study):
    (document,) = export_trials(study, choose_trials(study), {}, LogProgress("auc"))
    options = document_options(document)
    assert options["size"] == (8, 8)
    assert options["rates"] == document.rates
    assert "classes" not in options
    restricted = document_options(load_document(document.to_json() | {"data": {**document.data, "classes": [1, 0]}}))
    assert restricted["classes"] == (1, 0)
