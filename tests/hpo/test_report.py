import dataclasses

import pytest
from optuna.trial import TrialState, create_trial
from stand_in import RandomOrderExecutor

from hpo.confirmation import Difference
from hpo.errors import NothingFoundError
from hpo.report import StudyReport, configuration_of, next_commands, prune_command, trial_json, trial_tables
from objectives.errors import RelevanceError
from search_spaces.heuristics import HEURISTICS
from search_spaces.repairs import RepairSpec
from storage.lease import LeaseHolder
from storage.store import StudyStore


@pytest.fixture
def report(drive, load, make_problem, narrow):
    drive(make_problem(), space=narrow, sampler_name="grid", n_trials=4)
    return StudyReport.of(load())


def test_a_report_counts_and_ranks(report):
    assert report.headline() == "Study s: 4 of 4 trials, 10 heuristics, metric auc."
    assert report.n_trials == {"running": 0, "complete": 4, "pruned": 0, "fail": 0, "waiting": 0}
    values = [heuristic.value for heuristic in report.heuristics]
    assert values == sorted(values, reverse=True)
    assert report.best.confirmation_auc == report.confirmation.auc


def test_a_trial_shows_all_that_its_composite_is():
    composite = dataclasses.replace(HEURISTICS["epsilon"], aggregate="rms", repair=RepairSpec("bn", 0.3))
    trial = create_trial(state=TrialState.FAIL, user_attrs={"composite": composite.to_json()})
    (facts,) = trial_tables(trial)
    shown = dict(zip(*(column.cells for column in facts.columns), strict=True))
    assert [shown[name] for name in ("LLR", "abs", "aggregate", "repair")] == [
        "Epsilon(1e-06)",
        "true",
        "rms",
        "bn(0.3)",
    ]


def test_a_report_says_that_repair_has_a_part_in_the_lead(report):
    assert (report.best.repair, report.caution()) == (None, "")

    def caution(own):
        return dataclasses.replace(report, best=dataclasses.replace(report.best, repair=own)).caution()

    assert caution("none") == ""
    assert caution("bn(0.3)") == (
        "The best trial's networks are repaired by bn(0.3), the heuristics' by none, which has a part in the "
        "difference; with `--repair METHOD` and a space without repair a study compares all repaired alike."
    )


def test_the_headline_names_what_is_not_complete(report):
    states = {**report.n_trials, "complete": 2, "fail": 1, "waiting": 1}
    assert (
        dataclasses.replace(report, n_trials=states)
        .headline()
        .startswith("Study s: 3 of 4 trials (1 failed, 1 waiting),")
    )


def test_the_headline_names_no_fewer_trials_than_there_are(report):
    few = dataclasses.replace(report.configuration, n_trials=3)
    assert dataclasses.replace(report, configuration=few).headline().startswith("Study s: 4 trials, 10 heuristics")


def test_a_report_says_what_was_lost_and_why_trials_failed(drive, load, make_problem, narrow):
    problem, first, *others = make_problem(), *HEURISTICS.values()
    for composite in others[:2]:
        problem.failing[composite.key] = RelevanceError("no relevance")
    lost = iter([first.key] * 2)
    executor = RandomOrderExecutor(problem, 1, lose=lambda job: job.composite.key == first.key and bool(next(lost, "")))
    drive(problem, space=narrow, sampler_name="grid", executor=executor)
    report = StudyReport.of(load())
    assert (report.n_losses, report.failures) == (2, {"no relevance": 2})
    assert report.remarks() == [
        "A trial was lost with its worker 2 times and asked again.",
        "Failed 2 times: no relevance",
    ]
    assert (report.to_json()["n_losses"], report.to_json()["failures"]) == (2, {"no relevance": 2})
    assert trial_json(load().get_trials()[0])["losses"] == 2


def test_reasons_beyond_the_fifth_are_counted(report):
    many = {f"reason {number}": 8 - number for number in range(7)}
    assert dataclasses.replace(report, failures=many).remarks()[-2:] == [
        "Failed 4 times: reason 4",
        "5 more failed for other reasons; see `hpo status --json`.",
    ]


def test_a_report_names_the_driver(report):
    holder = LeaseHolder("ada", 7, "2026-01-01T00:00:00+00:00")
    configuration = dataclasses.replace(report.configuration, workers=4)
    driven = dataclasses.replace(report, driver=holder, configuration=configuration)
    assert driven.remarks() == ["Driven by pid 7 on host ada since 2026-01-01T00:00:00+00:00 with 4 workers."]
    assert driven.to_json()["driver"]["pid"] == 7
    assert report.remarks() == []


def test_a_heuristic_that_is_the_best_is_not_compared_with_itself(report):
    (best,) = [each for each in report.heuristics if each.heuristic == report.heuristics[0].heuristic]
    table = dataclasses.replace(report, best=best).table()
    assert next(iter(table.columns[-1].cells)) == ""


def test_the_verdict_is_about_the_best_heuristic(report):
    rival = report.heuristics[0].heuristic
    differences = {**report.confirmation.differences, rival: Difference(0.0123, -0.001, 0.02)}
    confirmation = dataclasses.replace(report.confirmation, differences=differences)
    best = dataclasses.replace(report.best, composite="another")
    assert dataclasses.replace(report, best=best, confirmation=confirmation).verdict() == (
        f"On 40 images that the search never saw, the best composite's AUC differs from {rival}'s by +0.0123 "
        "(95 % interval -0.0010 to +0.0200)."
    )


def test_the_verdict_says_when_searching_did_not_pay(report):
    best = dataclasses.replace(report.heuristics[0])
    name = best.heuristic
    assert dataclasses.replace(report, best=best).verdict() == (
        f"The search found nothing better than the heuristic {name}."
    )
    assert dataclasses.replace(report, confirmation=None).verdict() == ""


def test_a_confirmation_of_a_former_best_is_not_shown(report, drive, load, make_problem, url):
    with StudyStore.open(url) as store:
        study = store.load("s")
        study.set_user_attr("confirmation", {**study.user_attrs["confirmation"], "trial": 9999})
    stale = StudyReport.of(load())
    assert stale.confirmation is None
    assert stale.best.confirmation_auc is None


def test_studies_of_other_programs_are_refused(url):
    import optuna

    with StudyStore.open(url) as store:
        study = optuna.create_study(storage=store.storage, study_name="other")
        with pytest.raises(NothingFoundError, match="Study 'other' was not made by `hpo launch`"):
            configuration_of(study)


def test_next_commands_can_be_typed(report, url, monkeypatch):
    monkeypatch.setenv("HPO_STORAGE", url)
    assert next_commands(report, url) == [
        "hpo export s -o best.json",
        "hpo prune best.json --keep-accuracy 0.95 -o slim",
        "hpo dashboard",
    ]
    monkeypatch.setenv("HPO_STORAGE", "sqlite:///other.db")
    assert next_commands(report, url)[0] == f"hpo export s -o best.json --storage {url}"
    server = "postgresql+psycopg://ada:s3cret@host/studies"
    assert next_commands(report, server)[2] == "hpo dashboard --storage postgresql+psycopg://ada@host/studies"


def test_what_a_document_does_not_hold_is_added(report):
    configuration = dataclasses.replace(
        report.configuration, model="my.nets:Tiny", checkpoint="/w/a b.pt", data="folder:/f", class_map="/m.json"
    )
    assert prune_command("x.json", configuration) == (
        "hpo prune x.json --keep-accuracy 0.95 -o slim --model my.nets:Tiny --checkpoint '/w/a b.pt' "
        "--class-map /m.json"
    )
