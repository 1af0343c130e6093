import dataclasses
import threading
import time
from collections import Counter

import optuna
import pytest
from optuna.artifacts import get_all_artifact_meta
from optuna.trial import FrozenTrial, TrialState

from hpo.confirmation import Confirmation
from hpo.driver import CONFIRMATION
from hpo.errors import Interrupted, SamplerError, TrialsFailedError
from hpo.report import StudyReport
from hpo.trials import best, composite_of, curve_of, role
from objectives.errors import RelevanceError
from search_spaces.composites import CompositeSpec
from search_spaces.errors import RepairSpecError
from search_spaces.heuristics import BASELINES, HEURISTICS
from search_spaces.spaces import RepairedSpace
from storage.errors import StudyIdentityError, TrialAlreadyFinishedError
from storage.store import StudyStore
from storage.urls import sqlite_path


def search_trials(study):
    return [trial for trial in study.get_trials() if role(trial) == "search"]


def points(trials):
    return [composite_of(trial).key for trial in trials]


def content(trial: FrozenTrial) -> tuple:
    """What a trial says, without when and how long."""
    attributes = {name: value for name, value in trial.user_attrs.items() if name != "seconds"}
    return trial.number, trial.state, trial.values, trial.params, trial.intermediate_values, attributes


def test_heuristics_come_first_and_do_not_count(drive, load, make_problem):
    assert drive(make_problem(), n_trials=5, sampler=None)
    trials = load().get_trials()
    assert [trial.user_attrs["heuristic"] for trial in trials[:10]] == list(HEURISTICS)
    assert [role(trial) for trial in trials] == ["heuristic"] * 10 + ["search"] * 5
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}


def test_baselines_come_after_the_heuristics_and_are_never_best(drive, load, make_problem):
    assert drive(make_problem(), n_trials=2, baselines=True)
    study = load()
    beside = study.get_trials()[: len(HEURISTICS) + len(BASELINES)]
    assert [trial.user_attrs["heuristic"] for trial in beside] == [*HEURISTICS, *BASELINES]
    assert [composite_of(trial) for trial in beside] == [*HEURISTICS.values(), *BASELINES.values()]
    assert all(not trial.params for trial in beside[len(HEURISTICS) :])
    assert not {trial.number for trial in best(study.get_trials(), 100)} & {t.number for t in beside[len(HEURISTICS) :]}
    assert set(study.user_attrs[CONFIRMATION]["differences"]) == {*HEURISTICS, *BASELINES}
    report = StudyReport.of(study)
    assert {each.composite for each in report.heuristics} >= {spec.label for spec in BASELINES.values()}


def test_a_study_takes_baselines_at_any_time(drive, load, make_problem):
    drive(make_problem(), n_trials=2)
    assert drive(make_problem(), n_trials=2, baselines=True)
    roles = [role(trial) for trial in load().get_trials()]
    assert roles == ["heuristic"] * 10 + ["search"] * 2 + ["heuristic"] * len(BASELINES)
    assert not drive(make_problem(), n_trials=2)


def test_a_baseline_that_waits_is_evaluated_by_a_launch_without_them(drive, load, make_problem):
    stop = threading.Event()

    class Stopping(make_problem):
        def evaluate(self, composite, images):
            if composite == BASELINES["taylor"]:
                stop.set()
            return super().evaluate(composite, images)

    with pytest.raises(Interrupted):
        drive(Stopping(), n_trials=2, baselines=True, stop=stop)
    begun = [trial.user_attrs["heuristic"] for trial in load().get_trials()]
    assert begun[:14] == [*HEURISTICS, "weight", "weight-l1", "gradient", "taylor"]
    assert drive(make_problem(), n_trials=2)
    trials = load().get_trials()
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert [trial.user_attrs.get("heuristic") for trial in trials] == [*begun, None, None]


def test_a_trial_says_all_about_itself(drive, load, make_problem):
    drive(make_problem(), n_trials=1)
    trial = load().get_trials()[0]
    assert composite_of(trial) == HEURISTICS["epsilon"]
    assert trial.params["LLR"] == "Epsilon"
    assert trial.intermediate_values == dict(zip((0, 25, 50, 75), curve_of(trial).accuracies, strict=True))
    assert trial.value == trial.user_attrs["auc"] == pytest.approx(curve_of(trial).figures()["auc"])
    assert trial.user_attrs["seconds"] == {"attribution": 0.25, "evaluation": 0.75}


def test_the_metric_is_the_value(drive, load, make_problem):
    drive(make_problem(), n_trials=1, metric="mean_accuracy")
    assert all(trial.value == trial.user_attrs["mean_accuracy"] for trial in load().get_trials())


def test_the_grid_has_each_point_once(drive, load, make_problem, narrow):
    problem = make_problem()
    drive(problem, space=narrow, sampler_name="grid")
    trials = search_trials(load())
    assert points(trials) == [composite.key for composite in narrow.grid()]
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}


def test_equal_composites_are_evaluated_once(drive, load, make_problem, narrow):
    problem = make_problem()
    drive(problem, space=narrow, sampler_name="grid")
    assert max(Counter(problem.calls).values()) == 1
    trials = load().get_trials()
    reused = [trial for trial in trials if "reused_from" in trial.user_attrs]
    assert points(reused) == [HEURISTICS["epsilon"].key, HEURISTICS["epsilon-plus"].key]
    for trial in reused:
        source = trials[trial.user_attrs["reused_from"]]
        assert role(source) == "heuristic"
        assert "seconds" not in trial.user_attrs
        assert (trial.value, trial.intermediate_values) == (source.value, source.intermediate_values)
        assert curve_of(trial) == curve_of(source)


def test_heuristics_outside_a_space_are_evaluated_and_not_best(drive, load, make_problem, narrow):
    drive(make_problem(), space=narrow, sampler_name="grid")
    study = load()
    outside = [trial for trial in study.get_trials() if role(trial) == "heuristic" and not trial.params]
    assert len(outside) == 8
    assert {trial.state for trial in outside} == {TrialState.COMPLETE}
    assert not {trial.number for trial in best(study.get_trials(), 100)} & {trial.number for trial in outside}
    assert set(study.user_attrs[CONFIRMATION]["differences"]) == set(HEURISTICS)


def test_a_failed_grid_point_is_asked_again_by_the_next_launch_only(drive, load, make_problem, narrow):
    problem = make_problem()
    point = narrow.grid()[2]
    problem.failing[point.key] = "relevance is not finite"
    drive(problem, space=narrow, sampler_name="grid")
    (failed,) = [trial for trial in search_trials(load()) if trial.state == TrialState.FAIL]
    assert failed.user_attrs["failure"] == "RuntimeError: relevance is not finite"
    problem.failing.clear()
    assert drive(problem, space=narrow, sampler_name="grid")
    complete = [trial for trial in search_trials(load()) if trial.state == TrialState.COMPLETE]
    assert sorted(points(complete)) == sorted(composite.key for composite in narrow.grid())
    assert not drive(problem, space=narrow, sampler_name="grid")


def test_three_failures_in_a_row_end_the_launch(drive, load, make_problem):
    problem = make_problem()
    for composite in HEURISTICS.values():
        problem.failing[composite.key] = "no memory"
    with pytest.raises(
        TrialsFailedError, match=r"3 trials in a row failed, the last one \(trial 2, .*\) because: RuntimeError: no mem"
    ):
        drive(problem, n_trials=5)
    assert [trial.state for trial in load().get_trials()] == [TrialState.FAIL] * 3
    problem.failing.clear()
    drive(problem, n_trials=5)
    complete = Counter(
        trial.user_attrs.get("heuristic") for trial in load().get_trials() if trial.state == TrialState.COMPLETE
    )
    assert complete == {None: 5, **dict.fromkeys(HEURISTICS, 1)}


def test_composites_that_fail_of_themselves_do_not_end_the_launch(drive, load, make_problem, narrow):
    problem = make_problem()
    for composite in (*narrow.grid(), *list(HEURISTICS.values())[:9]):
        problem.failing[composite.key] = RelevanceError("no relevance reaches conv")
    drive(problem, space=narrow, sampler_name="grid")
    states = [trial.state for trial in load().get_trials()]
    assert states == [TrialState.FAIL] * 9 + [TrialState.COMPLETE] + [TrialState.FAIL] * 8


def test_a_study_whose_first_ten_trials_fail_is_ended(drive, load, make_problem):
    problem = make_problem()
    for composite in HEURISTICS.values():
        problem.failing[composite.key] = RelevanceError("no relevance reaches conv")
    with pytest.raises(TrialsFailedError, match=r"10 trials in a row failed, .* because: no relevance reaches conv"):
        drive(problem, n_trials=5)
    assert [trial.state for trial in load().get_trials()] == [TrialState.FAIL] * 10


@pytest.mark.parametrize(("sampler", "n_before"), [("tpe", 4), ("tpe", 14), ("random", 14), ("grid", 13)])
def test_a_resumed_study_equals_an_uninterrupted_one(drive, url, make_problem, sampler, n_before):
    drive(make_problem(), sampler_name=sampler, n_trials=8, study="whole")
    stop, problem = threading.Event(), make_problem()
    evaluate = problem.evaluate

    def evaluate_then_stop(composite, images):
        if len(problem.calls) == n_before:
            stop.set()
            time.sleep(0.5)
        return evaluate(composite, images)

    problem.evaluate = evaluate_then_stop
    with pytest.raises(Interrupted):
        drive(problem, sampler_name=sampler, n_trials=8, study="parts", stop=stop)
    with StudyStore.open(url) as store:
        states = [trial.state for trial in store.load("parts").get_trials()]
        # Who need not learn is asked ahead.
        n_ahead = 1 if sampler == "tpe" else 8 + 1
        assert 1 <= states.count(TrialState.WAITING) <= n_ahead
        assert TrialState.RUNNING not in states
    drive(make_problem(), sampler_name=sampler, n_trials=8, study="parts")
    with StudyStore.open(url) as store:
        whole, parts = store.load("whole"), store.load("parts")
        assert [content(trial) for trial in parts.get_trials()] == [content(trial) for trial in whole.get_trials()]
        assert parts.user_attrs[CONFIRMATION] == whole.user_attrs[CONFIRMATION]


def test_a_trial_of_a_killed_driver_is_asked_again(drive, load, make_problem, url):
    drive(make_problem(), n_trials=3)
    with StudyStore.open(url) as store:
        lost = store.load("s", optuna.samplers.RandomSampler(seed=0)).ask()
    drive(make_problem(), n_trials=4)
    trials = load().get_trials()
    assert len(trials) == 14
    assert trials[lost.number].state == TrialState.COMPLETE


def test_a_finished_study_has_nothing_to_do(drive, load, make_problem):
    drive(make_problem(), n_trials=3)
    before = load()
    problem = make_problem()
    assert not drive(problem, n_trials=3)
    assert problem.calls == []
    assert [content(trial) for trial in load().get_trials()] == [content(trial) for trial in before.get_trials()]


@pytest.mark.parametrize("n_trials", [3, 1])
def test_a_finished_study_is_left_to_the_byte(drive, load, make_problem, url, n_trials):
    drive(make_problem(), n_trials=3, pictures=True)
    before = sqlite_path(url).read_bytes()
    assert not drive(make_problem(), n_trials=n_trials, pictures=True)
    assert sqlite_path(url).read_bytes() == before
    assert StudyReport.of(load()).headline().startswith("Study s: 3 of 3 trials,")


def test_more_trials_go_on(drive, load, make_problem):
    drive(make_problem(), n_trials=3)
    assert drive(make_problem(), n_trials=5)
    assert len(search_trials(load())) == 5


def test_a_timeout_leaves_the_rest_for_later(drive, load, make_problem):
    drive(make_problem(seconds=0.1), n_trials=500, timeout_s="5")
    n_searched = len(search_trials(load()))
    assert 1 <= n_searched < 100
    assert CONFIRMATION in load().user_attrs
    assert {trial.state for trial in load().get_trials()} == {TrialState.COMPLETE}


def test_another_identity_is_refused_and_nothing_is_written(drive, load, make_problem):
    drive(make_problem(), n_trials=2)
    before = load()
    with pytest.raises(StudyIdentityError, match=r"objective\.data: .*d0.* -> .*d1") as caught:
        drive(make_problem(data="d1"), n_trials=2, seed=3)
    assert "seed: 0 -> 3" in str(caught.value)
    assert [content(trial) for trial in load().get_trials()] == [content(trial) for trial in before.get_trials()]
    assert load().user_attrs == before.user_attrs


def test_a_space_under_another_name_is_the_same_search(drive, load, make_problem, narrow):
    drive(make_problem(), space=narrow, n_trials=2)
    assert load().user_attrs["identity"]["repair"] == "none"
    assert not drive(make_problem(), space=dataclasses.replace(narrow, name="renamed"), n_trials=2)
    with pytest.raises(StudyIdentityError, match=r"space\.parameters\.abs"):
        drive(make_problem(), space=dataclasses.replace(narrow, abs=(True,)), n_trials=2)


def test_a_study_of_before_there_was_repair_goes_on(drive, load, make_problem, url, narrow):
    drive(make_problem(), space=narrow, n_trials=2)
    with StudyStore.open(url) as store:
        study = store.load("s")
        stored = study.user_attrs["identity"]
        del stored["repair"]
        study.set_user_attr(
            "identity", {**stored, "procedure": "one_shot", "space": {**stored["space"], "name": "former"}}
        )
    assert not drive(make_problem(), space=narrow, n_trials=2)
    assert drive(make_problem(), space=narrow, n_trials=3)


def test_another_repair_is_another_search(drive, load, make_problem, narrow):
    drive(make_problem(), space=narrow, n_trials=2, repair="refit", repair_strength=0.1)
    assert load().user_attrs["identity"]["repair"] == "refit(0.1)"
    assert not drive(make_problem(), space=narrow, n_trials=2, repair="refit", repair_strength=0.1)
    with pytest.raises(StudyIdentityError, match=r"repair: .*refit\(0\.1\).* -> .*refit"):
        drive(make_problem(), space=narrow, n_trials=2, repair="refit")


@pytest.mark.parametrize(("repair", "n_inside"), [("none", 2), ("refit", 2), ("bn", 0)])
def test_heuristics_with_a_repair_that_is_searched_are_candidates(drive, load, make_problem, narrow, repair, n_inside):
    space = RepairedSpace(narrow, ("none", "refit"))
    drive(make_problem(), space=space, n_trials=1, repair=repair)
    asked = [trial for trial in load().get_trials() if role(trial) == "heuristic"]
    inside = {trial.user_attrs["heuristic"]: trial.params["repair"] for trial in asked if trial.params}
    assert inside == dict.fromkeys(("epsilon", "epsilon-plus")[:n_inside], repair)
    assert {composite_of(trial) for trial in asked if trial.params} <= set(space.grid())


@pytest.mark.parametrize("is_searched", [False, True])
def test_a_study_whose_repair_was_computed_otherwise_is_not_gone_on_with(
    drive, load, make_problem, url, narrow, is_searched
):
    space, settings = (RepairedSpace(narrow), {}) if is_searched else (narrow, {"repair": "refit"})
    drive(make_problem(), space=space, n_trials=2, **settings)
    with StudyStore.open(url) as store:
        study = store.load("s")
        identity = study.user_attrs["identity"]
        study.set_user_attr("identity", identity | {"repair_form": identity["repair_form"] - 1})
    with pytest.raises(StudyIdentityError, match=r"repair_form: \d+ -> \d+"):
        drive(make_problem(), space=space, n_trials=2, **settings)


def test_a_strength_without_a_repair_is_refused(drive, make_problem, narrow):
    message = r"^Repair none takes no strength, but got 0\.1; choose bn or refit, or omit it\.$"
    with pytest.raises(RepairSpecError, match=message):
        drive(make_problem(), space=narrow, n_trials=2, repair_strength=0.1)


def test_the_best_is_confirmed_on_other_images(drive, load, make_problem):
    problem = make_problem()
    drive(problem, n_trials=5)
    study = load()
    confirmation = Confirmation.from_json(study.user_attrs[CONFIRMATION])
    (winner,) = best(study.get_trials())
    assert confirmation.trial == winner.number
    assert confirmation.n_images == 40
    assert confirmation.auc == pytest.approx(winner.value)  # the stand-in measures the same on all images
    for name, difference in confirmation.differences.items():
        assert difference.difference == pytest.approx(confirmation.auc - confirmation.heuristics[name], abs=1e-8)
        assert difference.low <= difference.difference <= difference.high
    assert Counter(images for _, images in problem.calls)["confirmation"] in (10, 11)


def test_confirmations_are_kept(drive, make_problem):
    drive(make_problem(), n_trials=5)
    problem = make_problem()
    drive(problem, n_trials=12)
    assert [images for _, images in problem.calls].count("confirmation") <= 1


def test_every_trial_has_its_curve_as_picture_and_table(drive, url, make_problem):
    drive(make_problem(), n_trials=2, pictures=True)
    with StudyStore.open(url, read_only=True) as store:
        study = store.load("s")
        for trial in study.get_trials():
            artifacts = get_all_artifact_meta(trial, storage=store.storage)
            assert sorted(artifact.filename for artifact in artifacts) == ["curve.csv", "curve.png"]
        (picture,) = get_all_artifact_meta(study, storage=store.storage)
        assert picture.filename == "study.png"
        with store.artifacts.open_reader(picture.artifact_id) as content:
            assert content.read().startswith(b"\x89PNG")


def test_missing_pictures_are_drawn_by_the_next_launch(drive, url, make_problem):
    drive(make_problem(), n_trials=1)
    drive(make_problem(), n_trials=1, pictures=True)
    with StudyStore.open(url, read_only=True) as store:
        artifacts = get_all_artifact_meta(store.load("s").get_trials()[3], storage=store.storage)
        assert sorted(artifact.filename for artifact in artifacts) == ["curve.csv", "curve.png"]


class RaisingSampler(optuna.samplers.RandomSampler):
    def infer_relative_search_space(self, study, trial):
        raise ZeroDivisionError("no\nidea")


def test_a_sampler_that_fails_is_named(drive, load, make_problem):
    with pytest.raises(SamplerError, match="failed: ZeroDivisionError: no idea"):
        drive(make_problem(), n_trials=2, sampler=RaisingSampler())
    assert TrialState.RUNNING not in [trial.state for trial in load().get_trials()]


class UngratefulSampler(optuna.samplers.RandomSampler):
    def after_trial(self, study, trial, state, values):
        raise ZeroDivisionError("no\nidea")


def test_a_sampler_that_fails_after_a_trial_is_named_and_the_trial_kept(drive, load, make_problem, url):
    with pytest.raises(SamplerError, match="Sampler 'tpe' failed: ZeroDivisionError: no idea"):
        drive(make_problem(), n_trials=2, sampler=UngratefulSampler())
    *_, trial = load().get_trials()
    assert (role(trial), trial.state) == ("search", TrialState.COMPLETE)
    with StudyStore.open(url, read_only=True) as store:
        (table,) = get_all_artifact_meta(trial, storage=store.storage)
        assert (store.artifacts.directory / table.artifact_id).exists()


def test_a_table_whose_trial_is_not_stored_is_removed(drive, make_problem, url):
    problem = make_problem()
    evaluate = problem.evaluate

    def evaluate_what_another_ends(composite, images):
        if len(problem.calls) == 4:
            with StudyStore.open(url) as store:
                other = store.load("s").get_trials()[4]
                store.storage.set_trial_state_values(other._trial_id, TrialState.FAIL)
        return evaluate(composite, images)

    problem.evaluate = evaluate_what_another_ends
    with pytest.raises(TrialAlreadyFinishedError):
        drive(problem, n_trials=2)
    with StudyStore.open(url, read_only=True) as store:
        trials = store.load("s").get_trials()
        known = {a.artifact_id for trial in trials for a in get_all_artifact_meta(trial, storage=store.storage)}
        assert {path.name for path in store.artifacts.directory.iterdir()} == known
        assert len(known) == 4


def test_a_study_without_confirmation_images_ends_unconfirmed(drive, load, make_problem):
    problem = make_problem()
    problem.n_confirmation_images = 0
    drive(problem, n_trials=2)
    assert CONFIRMATION not in load().user_attrs


def test_trial_numbers_and_composites_are_canonical(drive, load, make_problem):
    drive(make_problem(), n_trials=30, sampler_name="random")
    for trial in load().get_trials():
        assert isinstance(composite_of(trial), CompositeSpec)
