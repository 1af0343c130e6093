import random

import optuna
import pytest
from optuna.trial import TrialState

from hpo.errors import SamplerError
from hpo.samplers import SAMPLERS, GridSampler, make_sampler
from search_spaces.errors import SpaceNotFiniteError
from search_spaces.rules import GROUPS
from search_spaces.spaces import DiscreteSpace, load_space


@pytest.fixture
def space():
    return load_space("cnn")


def ask(study, space):
    trial = study.ask()
    return trial, space.suggest(trial).key


def draws(sampler, space, count, study=None):
    study = study or optuna.create_study(direction="maximize", sampler=sampler)
    keys = []
    for _ in range(count):
        trial, key = ask(study, space)
        study.tell(trial, len(key))
        keys.append(key)
    return keys


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_reseeded_samplers_repeat_a_seed_and_vary_between_seeds(name, space):
    first, again, other = (draws(make_sampler(name, space, seed), space, 15) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) > 5


EVERY_RULE = dict.fromkeys(GROUPS, ("Epsilon", "ZPlus", "AlphaBeta", "Gamma"))


@pytest.mark.parametrize(
    "space",
    [load_space("cnn"), load_space("cnn+repair"), DiscreteSpace("one epsilon", EVERY_RULE, epsilon=(1e-6,))],
    ids=lambda space: space.name,
)
def test_tpe_proposes_no_point_twice(space):
    """Where the best point is far better than all others, it would ask for that one again and again."""
    study = optuna.create_study(direction="maximize", sampler=make_sampler("tpe", space, 0))
    keys = []
    for _ in range(60):
        trial, key = ask(study, space)
        n_best = sum(trial.params[group] == "Epsilon" for group in GROUPS)
        study.tell(trial, 10.0 if n_best == 4 else float(n_best > 2))
        keys.append(key)
    assert len(set(keys[10:])) == 50  # the first ten are random
    assert len(set(keys)) >= 58


def test_tpe_repeats_points_where_no_other_is_left():
    space = DiscreteSpace("one", dict.fromkeys(GROUPS, ("ZPlus",)), abs=(False, True), epsilon=(0.01,))
    keys = draws(make_sampler("tpe", space, 0), space, 14)
    assert len(set(keys)) == 2


def test_a_draw_depends_on_the_history_and_not_on_the_process(space):
    whole = draws(make_sampler("tpe", space, 3), space, 16)
    study = optuna.create_study(direction="maximize", sampler=make_sampler("tpe", space, 3))
    parts = draws(None, space, 9, study)
    study.sampler = make_sampler("tpe", space, 3)
    assert parts + draws(None, space, 7, study) == whole


def test_parameters_have_draws_of_their_own():
    space = load_space("cnn-continuous")
    study = optuna.create_study(sampler=make_sampler("random", space, 0))
    trial, _ = ask(study, space)
    gammas = [value for name, value in trial.params.items() if name.endswith("_gamma")]
    assert len(set(gammas)) == len(gammas) == 4


def test_the_grid_serves_every_point_once_in_order(space):
    study = optuna.create_study(sampler=make_sampler("grid", space, 0))
    keys = draws(None, space, 40, study)
    assert keys == [composite.key for composite in space.grid()[:40]]
    assert study.sampler.n_left(study.get_trials()) == 1212 - 40


def release(study, trial):
    study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


def test_the_grid_leaves_no_hole_where_a_trial_waits(space):
    study = optuna.create_study(sampler=GridSampler(space))
    keys = draws(None, space, 2, study)
    lost, key = ask(study, space)
    release(study, lost)
    assert study.sampler.n_left(study.get_trials()) == 1210
    again, same = ask(study, space)
    assert (again.number, same) == (lost.number, key)
    assert key not in keys


def test_the_grid_serves_every_point_once_to_any_number_in_flight(space):
    """Whatever is asked, told, lost and asked again, by however many launches."""
    generator = random.Random(0)
    study = optuna.create_study(sampler=GridSampler(space))
    flying, told = {}, []
    while len(told) < 60:
        chance = generator.random()
        if not flying or chance < 0.5:
            trial, key = ask(study, space)
            flying[trial] = key
        elif chance < 0.9:
            trial = generator.choice(list(flying))
            study.tell(trial, 1.0)
            told.append(flying.pop(trial))
        elif chance < 0.97:
            trial = generator.choice(list(flying))
            release(study, trial)
            del flying[trial]
        else:
            for trial in flying:
                release(study, trial)
            flying.clear()
            study.sampler = GridSampler(space)
        assert study.sampler.n_left(study.get_trials()) == 1212 - len(told) - len(flying)
    assert len(set(told)) == 60
    assert set(told) | set(flying.values()) <= {composite.key for composite in space.grid()[: len(study.trials)]}


def test_a_trial_of_which_half_was_asked_gets_the_other_half_of_its_point(narrow):
    study = optuna.create_study(sampler=GridSampler(narrow))
    failed, first = ask(study, narrow)
    draws(None, narrow, 3, study)
    half = study.ask()
    half.suggest_categorical("HLL", ("Epsilon", "ZPlus"))
    study.tell(failed, state=TrialState.FAIL)
    release(study, half)
    study.sampler = GridSampler(narrow)
    assert ask(study, narrow)[1] == narrow.grid()[4].key
    assert ask(study, narrow)[1] == first
    assert ask(study, narrow)[1] == narrow.grid()[5].key


def test_an_ask_that_is_cut_off_and_made_again_has_the_same_point(space):
    study = optuna.create_study(sampler=GridSampler(space))
    cut_off = study.ask()
    asked = [cut_off.suggest_categorical(name, d.choices) for name, d in list(space.distributions().items())[:3]]
    release(study, cut_off)
    again, key = ask(study, space)
    assert (again.number, list(again.params.values())[:3]) == (cut_off.number, asked)
    assert [key, ask(study, space)[1]] == [composite.key for composite in space.grid()[:2]]


def test_the_grid_reads_the_study_once(space, monkeypatch):
    study = optuna.create_study(sampler=GridSampler(space))
    draws(None, space, 3, study)
    monkeypatch.setattr(study, "get_trials", lambda *arguments, **options: pytest.fail("read again"))
    draws(None, space, 3, study)


def test_an_exhausted_grid_says_so():
    rules = dict.fromkeys(("LLR", "MLL", "HLL"), ("Epsilon",)) | {"FCL": ("Epsilon", "ZPlus")}
    space = DiscreteSpace("two", rules, abs=(True,))
    study = optuna.create_study(sampler=GridSampler(space))
    draws(None, space, 2, study)
    with pytest.raises(SamplerError, match="The grid of space 'two' has no value for parameter 'FCL'"):
        ask(study, space)


def test_a_continuous_space_has_no_grid():
    with pytest.raises(SpaceNotFiniteError, match="tpe"):
        make_sampler("grid", load_space("cnn-continuous"), 0)


def test_other_samplers_are_imported_and_seeded(space):
    first, again = (make_sampler("optuna.samplers:NSGAIISampler", space, 4) for _ in range(2))
    assert type(first) is optuna.samplers.NSGAIISampler
    assert draws(first, space, 3) == draws(again, space, 3)


class WantsMore(optuna.samplers.RandomSampler):
    def __init__(self, budget):
        super().__init__()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tpo", "Unknown sampler 'tpo'. Did you mean 'tpe'? Known: grid, random, tpe. Other samplers: "),
        ("no.such:Sampler", "Sampler 'no.such:Sampler' cannot be loaded: module 'no.such' cannot be imported"),
        ("optuna.samplers:GridSampel", "Sampler 'optuna.samplers:GridSampel' cannot be loaded: module"),
        ("optuna.trial:Trial", "Sampler 'optuna.trial:Trial' must be a subclass of optuna.samplers.BaseSampler"),
        ("optuna.samplers:GridSampler", "Sampler 'optuna.samplers:GridSampler' cannot be built: TypeError: "),
    ],
)
def test_bad_samplers_are_named_with_the_remedy(spec, message, space):
    with pytest.raises(SamplerError) as caught:
        make_sampler(spec, space, 0)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_registered_sampler_draws_points_of_the_space(name, space):
    points = {composite.key for composite in space.grid()}
    assert set(draws(make_sampler(name, space, 0), space, 12)) <= points


def test_baselines_leave_points_whole(space):
    """Baselines, and heuristics outside the space, have no parameters; what trials have in common would be nothing."""
    study = optuna.create_study(direction="maximize", sampler=make_sampler("tpe", space, 0))
    draws(None, space, 2, study)
    study.add_trial(optuna.trial.create_trial(value=0.3))
    sampler, trial = study.sampler, study.get_trials()[-1]
    assert set(sampler.infer_relative_search_space(study, trial)) == {*GROUPS, "abs", "epsilon"}
    assert make_sampler("random", space, 0).infer_relative_search_space(study, trial) == {}


def test_tpe_proposes_no_point_twice_beside_baselines(space):
    study = optuna.create_study(direction="maximize", sampler=make_sampler("tpe", space, 0))
    for value in (0.3, 0.2):
        study.add_trial(optuna.trial.create_trial(value=value))
    keys = []
    for _ in range(40):
        trial, key = ask(study, space)
        is_best = all(trial.params[group] == "ZPlus" for group in GROUPS)
        if is_best:
            study.tell(trial, 10.0)
        else:
            study.tell(trial, state=TrialState.PRUNED)
        keys.append(key)
    assert len(set(keys[10:])) == 30  # the first ten are random
