import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from objectives.attribution.engine import ZennitAttribution
from objectives.canonization import canonize
from objectives.datasets import load_task
from objectives.errors import OptionError
from objectives.models import load_model
from objectives.objective import Objective, ObjectiveOptions
from objectives.procedures import PROCEDURES
from objectives.procedures.path import PruningPath
from objectives.pruning.curve import harmonic_mean
from objectives.pruning.masking import masked
from objectives.pruning.ranking import of_kept, rank
from objectives.pruning.rates import n_pruned
from objectives.pruning.records import StepRecord
from search_spaces import procedures
from search_spaces.heuristics import heuristic
from search_spaces.procedures import Dynamic, Iterative, OneShot

RATES = (0.0, 0.05, 0.12, 0.3, 0.31, 0.5, 0.75, 0.95)
EPSILON = heuristic("epsilon-abs")


@dataclass
class Pruning:
    """Ranks by scores that depend on what is kept."""

    scores: Callable
    kinds: dict | None = None
    n_ranked: int = 0
    accuracies: Callable = lambda kept: (1.0, 1.0)
    n_measured: int = 0

    def rank(self, masks=None, weights=None):
        assert weights is None
        self.n_ranked += 1
        scores = self.scores(masks)
        return rank(scores if masks is None else of_kept(scores, masks), self.kinds, masks)

    def fine_tuned(self, masks, weights, options):
        return None  # of networks that can't be trained

    def class_accuracies(self, masks, ahead=()):
        self.n_measured += 1
        return self.accuracies(torch.cat(list(masks.values())))


def fixed(masks):
    return {"a": torch.tensor([0.5, 0.1, 0.3]), "b": torch.tensor([0.2, 0.4])}


def made(pruning, options):
    return PruningPath(PROCEDURES[options.name](pruning, options))


def listed(masks):
    return {name: mask.tolist() for name, mask in masks.items()}


def test_every_procedure_is_carried_out():
    assert PROCEDURES.keys() == procedures.PROCEDURES.keys()


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        # Task-relevant pruning refuses a network that has lost a whole layer, see test_task_relevant.py.
        *((name, None) for name in sorted(PROCEDURES.keys() - {"task_relevant"})),
        *((name, {"a": "a", "b": "b"}) for name in ("iterative", "one_shot")),
    ],
)
def test_a_procedure_yields_nested_masks_for_every_number_of_components(name, kinds):
    path = made(Pruning(fixed, kinds), procedures.PROCEDURES[name]())
    kept = [torch.cat(list(path.masks(n).values())) for n in range(len(path) + 1)]
    assert [int(mask.sum()) for mask in kept] == [5, 4, 3, 2, 1, 0]
    assert all(bool((more | ~fewer).all()) for more, fewer in itertools.pairwise(kept))
    assert path.n_pruned(0.5) == (2 if kinds is None else 1 + 1)


def test_one_shot_ranks_once_and_prunes_by_it():
    pruning = Pruning(fixed)
    path = made(pruning, OneShot())
    assert [listed(path.masks(path.n_pruned(rate))) for rate in (0.0, 0.2, 0.5, 0.8)] == [
        {"a": [True, True, True], "b": [True, True]},
        {"a": [True, False, True], "b": [True, True]},
        {"a": [True, False, True], "b": [False, True]},
        {"a": [True, False, False], "b": [False, False]},
    ]
    assert pruning.n_ranked == 1


def test_iterative_ranks_what_each_step_leaves_and_no_step_that_is_not_asked_for():
    def reversing(masks):
        """Once anything is pruned, what was most relevant is least."""
        scores = fixed(masks)
        return scores if masks is None else {name: -values for name, values in scores.items()}

    pruning = Pruning(reversing)
    path = made(pruning, Iterative(step_share=0.4))
    assert path.n_pruned(0.4) == 2
    assert listed(path.masks(1)) == {"a": [True, False, True], "b": [True, True]}
    assert listed(path.masks(2)) == {"a": [True, False, True], "b": [False, True]}
    assert pruning.n_ranked == 1
    assert listed(path.masks(3)) == {"a": [False, False, True], "b": [False, True]}
    assert pruning.n_ranked == 2
    assert listed(path.masks(5)) == {"a": [False] * 3, "b": [False] * 2}
    assert [step.n_pruned for step in path.steps] == [2, 4, 5]
    assert pruning.n_ranked == 3


def test_a_step_of_less_than_a_component_ranks_nothing():
    pruning = Pruning(fixed)
    path = made(pruning, Iterative(step_share=0.07))  # of 5 components: 0.35, 0.7, 1.05, ...
    path.masks(5)
    assert [step.n_pruned for step in path.steps] == [1, 2, 3, 4, 5]
    assert pruning.n_ranked == 5


# Dynamic


def in_order(n):
    """The first component is the least relevant, on every network."""
    return lambda masks: {"a": torch.arange(n, dtype=torch.float64)}


def needing(*needed):
    """Two classes; the second one has 10 images, and loses one with each of these components."""
    return lambda kept: (1.0, 1.0 - 0.1 * sum(not kept[index] for index in needed))


def pruned_at_steps(pruning, options):
    path = made(pruning, options)
    path.masks(len(path))
    order = [step.ranking.order[: step.n_pruned].tolist() for step in path.steps]
    return [set(now) - set(before) for before, now in zip([[], *order], order, strict=False)]


def test_dynamic_defers_what_a_class_needs():
    """Two of the first five components are needed: they stay where others of low relevance can go instead."""
    options = Dynamic(step_share=0.25, search_width=8)
    iterative, changed = (
        pruned_at_steps(Pruning(in_order(20), accuracies=needing(1, 3)), each) for each in (Iterative(0.25), options)
    )
    assert iterative[0] == {0, 1, 2, 3, 4}
    assert changed[0] == {0, 2, 4, 5, 6}
    assert not {1, 3} & set().union(*changed[:3])  # until nothing else is left
    assert changed[3] >= {1, 3}


def test_what_hurts_least_goes_first_where_all_hurt():
    accuracies = {0: 0.5, 1: 0.3, 2: 0.4, 3: 0.1}

    def of(kept):
        return 1.0, 1.0 - sum(harm for index, harm in accuracies.items() if not kept[index]) / 2

    (first, second, *_) = pruned_at_steps(Pruning(in_order(4), accuracies=of), Dynamic(step_share=0.25, search_width=3))
    assert (first, second) == ({3}, {1})


def test_a_smaller_step_lets_relevance_be_recomputed():
    """With a change of rate alone the order is the ranking's: what is needed is spared by ranking anew."""

    def scores(masks):
        values = torch.arange(20, dtype=torch.float64)
        if masks is not None and not masks["a"][:4].any():  # the network shows what it needs once it has lost these
            values[4] = 30
        return {"a": values}

    def first(**options):
        steps = pruned_at_steps(
            Pruning(scores, accuracies=needing(4)), Dynamic(step_share=0.3, fixed_order=True, **options)
        )
        return steps[0]

    assert first(fixed_rate=True) == {0, 1, 2, 3, 4, 5}
    assert first() == {0, 1, 2, 3, 5, 6}
    assert first(rankings_per_step=1) == {0, 1, 2, 3, 4, 5}


def test_a_change_of_order_alone_searches_whole_shares():
    steps = pruned_at_steps(
        Pruning(in_order(20), accuracies=needing(1, 3)), Dynamic(step_share=0.25, search_width=2, fixed_rate=True)
    )
    assert steps[0] == {0, 2, 4, 5, 6}


def test_of_a_share_of_many_components_those_around_its_end_are_tried():
    """40 components and 2 beyond, 12 of which may be measured: those of places 30 to 41."""
    options = Dynamic(step_share=0.2, search_width=2, fixed_rate=True, evaluations_per_step=15)
    steps = pruned_at_steps(Pruning(in_order(200), accuracies=needing(5, 35)), options)
    assert steps[0] == {*range(41)} - {35}


@pytest.mark.parametrize("evaluations", [1, 2, 7, 30])
@pytest.mark.parametrize("rankings", [1, 3])
@pytest.mark.parametrize("fixed", [{}, {"fixed_rate": True}, {"fixed_order": True}])
def test_work_is_bounded(evaluations, rankings, fixed):
    pruning = Pruning(in_order(100), accuracies=lambda kept: (0.2 + 0.8 * float(kept.double().mean()), 0.9))
    options = Dynamic(0.1, rankings_per_step=rankings, evaluations_per_step=evaluations, **fixed)
    steps = pruned_at_steps(pruning, options)
    assert [len(step) for step in steps] == [10] * 10
    assert pruning.n_measured <= 1 + 10 * evaluations
    assert pruning.n_ranked <= 10 * rankings


def test_nothing_is_measured_to_protect_a_class_that_is_lost():
    pruning = Pruning(in_order(100), accuracies=lambda kept: (0.0, 1.0))
    pruned_at_steps(pruning, Dynamic())
    assert pruning.n_measured == 1


# On a real network


@pytest.fixture(scope="module")
def model(_own_cache):
    return load_model("digits_cnn")


@pytest.fixture(scope="module")
def task(model):
    return load_task("digits", model, evaluation_images=100, references_per_class=3)


def objective_of(model, task, **options):
    return Objective(model, task, replace(ObjectiveOptions(RATES, device="cpu"), **options))


def rederived(objective, composite, step_share, by_layer):
    """Masks at the rates by their definition: the user's network is masked, captured and attributed at each step."""
    network, references = objective.model.network, objective.task.references
    masks = {name: torch.ones(n, dtype=torch.bool) for name, n in objective.component_widths.items()}
    n_all, n_steps, at_rates = objective.n_components, round(1 / step_share), {0.0: masks}
    for step in range(n_steps):
        with masked(network, objective.network.prunable, masks):
            own = canonize(network, objective.network.input_shape)
        engine = ZennitAttribution(own, objective.layer_groups, references, 100)
        relevance = engine.attribute(composite).magnitude
        left = [
            (float(relevance[name][index]), place, index, name)
            for place, name in enumerate(masks)
            for index in range(len(masks[name]))
            if masks[name][index]
        ]
        begin, end = round(step * step_share, 9), round((step + 1) * step_share, 9)
        for rate in [rate for rate in (*RATES, end) if begin < rate <= end]:
            pruned = {name: mask.clone() for name, mask in masks.items()}
            if by_layer:
                for name, mask in masks.items():
                    own_left = sorted(each for each in left if each[3] == name)
                    n = n_pruned(rate, len(mask)) - int((~mask).sum())
                    for _, _, index, _ in own_left[:n]:
                        pruned[name][index] = False
            else:
                for _, _, index, name in sorted(left)[: n_pruned(rate, n_all) - (n_all - len(left))]:
                    pruned[name][index] = False
            at_rates[rate] = pruned
        masks = at_rates[end]
    return [at_rates[rate] for rate in RATES]


@pytest.mark.parametrize("ranking", ["kind", "layer"])
def test_iterative_is_what_its_definition_says(model, task, ranking):
    options = {"procedure": Iterative(0.25), "ranking": ranking, "attribution": "zennit"}
    objective = objective_of(model, task, **options)
    path = objective.path(EPSILON)
    expected = rederived(objective, EPSILON, 0.25, ranking == "layer")
    for rate, masks in zip(RATES, expected, strict=True):
        assert listed(path.masks(path.n_pruned(rate))) == listed(masks)
    assert len(path.steps) == 4
    # The curve is that of these masks.
    curve = objective.evaluate(EPSILON).curve
    measured = [objective.evaluator("search").measure(masks) for masks in expected]
    assert curve.accuracies == tuple(float(each.correct.double().mean()) for each in measured)
    assert curve.parameters == tuple(each.cost.parameters for each in measured)


def test_iterative_with_one_ranking_is_one_shot(model, task):
    one_shot, iterative = (objective_of(model, task, procedure=each) for each in (OneShot(), Iterative(1.0)))
    assert one_shot.evaluate(EPSILON).curve == iterative.evaluate(EPSILON).curve
    assert (
        one_shot.evaluate(EPSILON).curve != objective_of(model, task, procedure=Iterative(0.3)).evaluate(EPSILON).curve
    )


def test_dynamic_without_its_changes_is_iterative(model, task):
    dynamic = objective_of(model, task, procedure=Dynamic(0.25, fixed_rate=True, fixed_order=True))
    assert (
        dynamic.evaluate(EPSILON).curve == objective_of(model, task, procedure=Iterative(0.25)).evaluate(EPSILON).curve
    )


def test_dynamic_keeps_the_references_right_for_longer(model):
    """What it protects: A, of which iterative pruning leaves less here."""
    zplus = heuristic("zplus")

    def level(classes, options):
        task = load_task("digits", model, classes=classes, references_per_class=5)
        objective, labels = objective_of(model, task, procedure=options), task.references.labels
        path, evaluator = objective.path(zplus), objective.evaluator("references")
        correct = [
            evaluator.measure(path.masks(path.n_pruned(rate))).correct for rate in (0.4, 0.45, 0.5, 0.55, 0.6, 0.65)
        ]
        return sum(harmonic_mean([float(each[labels == k].double().mean()) for k in range(3)]) for each in correct)

    subsets = [[1, 3, 8], [0, 4, 7]]
    dynamic, iterative = (
        sum(level(classes, options) for classes in subsets) for options in (Dynamic(0.1), Iterative(0.1))
    )
    assert dynamic > iterative + 0.5, (dynamic, iterative)


def test_dynamic_prunes_the_same_again(model):
    task = load_task("digits", model, classes=[1, 3, 8], references_per_class=5)
    paths = [objective_of(model, task, procedure=Dynamic(0.1)).path(heuristic("zplus")) for _ in range(2)]
    assert listed(paths[0].masks(150)) == listed(paths[1].masks(150))


def test_dynamic_ranks_over_the_whole_network(model, task):
    with pytest.raises(OptionError, match=r"^Procedure dynamic ranks over the whole network, .* `--ranking global`\.$"):
        objective_of(model, task, procedure=Dynamic(), ranking="layer")


def test_engines_prune_the_same_in_every_step(model, task):
    shared, zennit = (
        objective_of(model, task, procedure=Iterative(0.2), attribution=name) for name in ("shared", "zennit")
    )
    for name in ("zplus", "epsilon-gamma-abs"):
        paths = [each.path(heuristic(name)) for each in (shared, zennit)]
        masks = [[listed(path.masks(path.n_pruned(rate))) for rate in RATES] for path in paths]
        assert masks[0] == masks[1]


@pytest.mark.parametrize("engine", ["shared", "zennit"])
def test_what_memory_allows_is_learnt_once_for_all_steps(model, task, engine):
    attribution = objective_of(model, task, attribution=engine).attribution
    assert attribution.on(attribution.network).batches is attribution.batches


@pytest.mark.parametrize("name", ["weight", "gradient", "taylor", "random-1"])
def test_criteria_rank_the_pruned_network_too(model, task, name):
    one_shot, iterative = (objective_of(model, task, procedure=each) for each in (OneShot(), Iterative(0.25)))
    paths = [each.path(heuristic(name)) for each in (one_shot, iterative)]
    first, second = ([listed(path.masks(path.n_pruned(rate))) for rate in RATES] for path in paths)
    assert (first == second) == (name == "random-1")
    assert first[:3] == second[:3]  # up to the first step's end


def test_a_path_ends_with_nothing_left(model, task):
    """Layers that relevance no longer reaches, and networks that no image gets through, are no failure on the way."""
    path = objective_of(model, task, procedure=Iterative(0.1)).path(heuristic("epsilon-gamma"))
    assert not any(bool(mask.any()) for mask in path.masks(len(path)).values())


def test_a_trial_keeps_what_its_steps_came_to(model, task):
    objective = objective_of(model, task, procedure=Iterative(0.25), rates=(0.0, 0.25, 0.6))
    stages = []
    ranking = objective.ranking
    objective.ranking = lambda *arguments: stages.append(objective.stage) or ranking(*arguments)
    evaluation = objective.evaluate(EPSILON)
    assert (stages, objective.stage) == ([None, "25 % pruned", "50 % pruned"], None)
    assert [step.n_pruned for step in evaluation.steps] == [0, 84, 168]  # the third ends beyond the last rate
    assert [step.accuracy for step in evaluation.steps[:2]] == list(evaluation.curve.accuracies[:2])
    assert [step.flops for step in evaluation.steps[:2]] == list(evaluation.curve.flops[:2])
    path = objective.path(EPSILON)
    references = objective.task.references
    for step in evaluation.steps:
        masks = path.masks(step.n_pruned)
        assert step.left == {name: int(mask.sum()) for name, mask in masks.items()}
        with masked(model.network, objective.network.prunable, masks) as network, torch.inference_mode():
            loss = torch.nn.functional.cross_entropy(network(references.images), references.labels)
        assert step.loss == pytest.approx(float(loss), rel=1e-4)
        assert StepRecord.from_json(step.to_json()) == step
    assert objective_of(model, task).evaluate(EPSILON).steps == ()
