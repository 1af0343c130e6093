"""Studies whose trials race: what is given up, what is kept, and that nothing depends on interruptions."""

import random
import threading
from collections import Counter

import pytest
from optuna.trial import TrialState
from stand_in import RandomOrderExecutor

from hpo.config import resolve
from hpo.errors import ConfigurationError, Interrupted
from hpo.racing import RIVAL, RaceSummary, default_pruner, given_up
from hpo.report import StudyReport, trial_json
from hpo.samplers import make_sampler
from hpo.trials import best, composite_of, role
from search_spaces.spaces import DiscreteSpace, load_space
from storage.errors import StudyIdentityError

ALL, TWO = ("Epsilon", "ZPlus", "AlphaBeta", "Gamma"), ("Epsilon", "ZPlus")
WIDE = DiscreteSpace("wide", {"LLR": ALL, "MLL": ALL, "HLL": TWO, "FCL": TWO}, abs=(False,))


def search_trials(study):
    return [trial for trial in study.get_trials() if role(trial) == "search"]


def told(study):
    """What each composite of the search was told; races depend on who led when."""
    return {composite_of(trial).key: trial.value for trial in search_trials(study) if trial.state.is_finished()}


def race(drive, problem, **options):
    return drive(problem, space=WIDE, sampler_name="grid", pruner="race", **options)


def exact_values(drive, make_problem):
    problem = make_problem()
    return {
        composite.key: problem.evaluate(composite, "search").figures["auc"] for composite in WIDE.grid()
    }  # as no race has any part in it


def test_what_is_given_up_could_not_have_won_and_what_is_kept_is_exact(drive, load, make_problem):
    problem = make_problem()
    race(drive, problem)
    trials = search_trials(load())
    values = exact_values(drive, make_problem)
    leading = max(values.values())
    states = Counter(trial.state for trial in trials)
    assert states[TrialState.PRUNED] > len(trials) / 2
    assert states[TrialState.PRUNED] + states[TrialState.COMPLETE] == len(trials) == WIDE.size()
    for trial in trials:
        key = composite_of(trial).key
        if trial.state == TrialState.PRUNED:
            verdict = given_up(trial)
            assert verdict.certain
            assert values[key] < leading
            assert (trial.values, trial.intermediate_values) == (None, {})
            assert trial_json(trial)["race"]["rival"] == verdict.rival
        else:
            assert trial.value == values[key]
    assert best(load().get_trials())[0].value == leading


def test_heuristics_and_confirmations_do_not_race(drive, load, make_problem):
    problem = make_problem()
    race(drive, problem)
    assert {trial.state for trial in load().get_trials() if role(trial) == "heuristic"} == {TrialState.COMPLETE}
    assert Counter(images for _, images in problem.calls)["confirmation"] > 0
    assert StudyReport.of(load()).confirmation is not None


def test_a_status_says_what_was_saved_and_what_the_risk_was(drive, load, make_problem):
    race(drive, make_problem(), race_risk="0.05")
    report = StudyReport.of(load())
    trials = search_trials(load())
    shares = [given_up(trial).share if trial.state == TrialState.PRUNED else 1.0 for trial in trials]
    own = [share for share, trial in zip(shares, trials, strict=True) if "reused_from" not in trial.user_attrs]
    assert report.race.share == pytest.approx(sum(own) / len(own))
    assert report.race.n_given_up == report.race.n_certain == report.n_trials["pruned"]
    assert report.to_json()["race"]["risk"] == 0.0  # of bounds that are all exact
    assert f"{report.race}" in report.remarks()
    assert str(RaceSummary(3, 1, 0.125, 0.05)) == (
        "Race: 3 trials were given up, 12.5 % of the evaluations were made; "
        "the best of all trials is among the others with a probability of at least 95 %."
    )


def test_an_exact_study_says_nothing_of_races(drive, load, make_problem):
    drive(make_problem(), n_trials=3)
    assert StudyReport.of(load()).race is None
    assert RIVAL not in load().user_attrs


def test_a_study_races_on_after_an_interruption(drive, load, make_problem):
    problem, stop = make_problem(), threading.Event()
    evaluate = problem.race

    def stopping(composite, rival):
        if len(problem.calls) > 25:
            stop.set()
        return evaluate(composite, rival)

    problem.race = stopping
    with pytest.raises(Interrupted):
        race(drive, problem, stop=stop)
    before = told(load())
    rival = load().user_attrs[RIVAL]
    assert rival["trial"] == best(load().get_trials())[0].number
    again = make_problem()
    race(drive, again)
    after = told(load())
    assert before.items() <= after.items()
    assert {key for key, images in again.calls if images != "confirmation"}.isdisjoint(before)
    values = exact_values(drive, make_problem)
    assert best(load().get_trials())[0].value == max(values.values())
    assert {key: value for key, value in after.items() if value is not None}.items() <= values.items()


@pytest.mark.parametrize("seed", range(2))
def test_workers_that_answer_in_any_order_and_die_find_the_same_best(drive, load, make_problem, seed):
    problem = make_problem()
    chance = random.Random(seed)
    lose = lambda job: job.images == "search" and chance.random() < 0.1  # noqa: E731
    race(drive, problem, executor=RandomOrderExecutor(problem, 4, seed=seed, lose=lose), max_losses=50)
    values = exact_values(drive, make_problem)
    assert best(load().get_trials())[0].value == max(values.values())
    assert {trial.state for trial in search_trials(load())} == {TrialState.COMPLETE, TrialState.PRUNED}


def test_a_composite_that_was_given_up_is_not_measured_again(drive, load, make_problem, narrow):
    problem = make_problem()
    drive(problem, space=narrow, sampler_name="random", n_trials=30, pruner="race")
    assert max(Counter(problem.calls).values()) == 1
    trials = load().get_trials()
    repeated = [trial for trial in trials if "reused_from" in trial.user_attrs and trial.state == TrialState.PRUNED]
    assert repeated
    for trial in repeated:
        source = trials[trial.user_attrs["reused_from"]]
        assert (source.state, composite_of(source)) == (TrialState.PRUNED, composite_of(trial))
        assert given_up(trial) == given_up(source)
    assert len(search_trials(load())) == 30
    # Nor by the next launch.
    again = make_problem()
    drive(again, space=narrow, sampler_name="random", n_trials=40, pruner="race")
    assert not {key for key, _ in again.calls} & {composite_of(trial).key for trial in repeated}


def test_tpe_goes_on_where_most_trials_have_no_value(drive, load, make_problem):
    drive(make_problem(), n_trials=40, pruner="race")
    trials = search_trials(load())
    assert len(trials) == 40
    assert Counter(trial.state for trial in trials)[TrialState.PRUNED] > 10


def test_racing_is_part_of_a_search(drive, make_problem):
    race(drive, make_problem())
    with pytest.raises(StudyIdentityError) as refused:
        drive(make_problem(), space=WIDE, sampler_name="grid")
    assert "pruner" in str(refused.value)
    with pytest.raises(StudyIdentityError) as refused:
        race(drive, make_problem(), race_risk="0.02")
    assert "race_risk" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sampler": "grid"}, "race"),  # the space cnn has 512 points
        ({"sampler": "grid", "space": "small"}, "none"),
        ({"sampler": "tpe"}, "race"),
        ({"sampler": "random"}, "race"),
        ({"sampler": "optuna.samplers:GPSampler"}, "none"),
        ({"sampler": "tpe", "metric": "auc_flops"}, "none"),
        ({"sampler": "tpe", "metric": "mean_accuracy"}, "race"),
    ],
)
def test_what_races_by_default(options, expected, narrow):
    configuration = resolve({**options, "space": None})
    space = narrow if options.get("space") == "small" else load_space("cnn")
    sampler = make_sampler(configuration.sampler, space, 0) if configuration.sampler == "grid" else None
    assert default_pruner(configuration, space, sampler) == expected


@pytest.mark.parametrize("metric", ["top_rate", "auc_lowest_class", "auc_harmonic", "auc_parameters", "auc_flops"])
def test_a_metric_that_cannot_race_is_refused(metric):
    with pytest.raises(ConfigurationError, match=rf"^`--metric {metric}` is no weighted sum .* pass `--exact`"):
        resolve({"metric": metric, "pruner": "race"})
