import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives.pruning.ranking import rank
from objectives.pruning.rates import n_pruned

# Few distinct values, so that ties abound.
SCORES = st.lists(
    st.lists(st.sampled_from([-1.5, -0.0, 0.0, 1e-300, 2.0]), min_size=1, max_size=6), min_size=1, max_size=4
).map(lambda layers: {f"layer{i}": torch.tensor(values, dtype=torch.float64) for i, values in enumerate(layers)})


def _components(scores):
    return [(name, index) for name, values in scores.items() for index in range(len(values))]


def _pruned(masks):
    return {(name, index) for name, mask in masks.items() for index in (~mask).nonzero().flatten().tolist()}


@given(SCORES)
def test_the_least_relevant_go_first_and_ties_follow_layer_order_then_index(scores):
    ranking = rank(scores)
    components = _components(scores)
    values = torch.cat(list(scores.values())).tolist()
    expected = sorted(range(len(values)), key=lambda i: (values[i], i))
    assert ranking.order.tolist() == expected
    assert len(ranking) == len(components)
    for n in range(len(components) + 1):
        assert _pruned(ranking.masks(n)) == {components[i] for i in expected[:n]}


@given(SCORES)
def test_masks_are_nested_and_count_what_they_should(scores):
    ranking = rank(scores)
    before = set()
    for percent in range(0, 100, 5):
        masks = ranking.masks(n_pruned(percent / 100, len(ranking)))
        assert list(masks) == list(scores)
        assert all(mask.dtype == torch.bool and len(mask) == len(scores[name]) for name, mask in masks.items())
        pruned = _pruned(masks)
        assert len(pruned) == n_pruned(percent / 100, len(ranking))
        assert before <= pruned
        before = pruned


def test_ranking_is_global():
    masks = rank({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 4.0, 0.5])}).masks(3)
    assert {name: mask.tolist() for name, mask in masks.items()} == {"a": [True, False], "b": [False, True, False]}


def test_a_long_row_of_ties_stays_in_order():
    ranking = rank({"a": torch.zeros(5000), "b": torch.zeros(5000)})
    assert torch.equal(ranking.order, torch.arange(10_000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_left_alone(dtype):
    scores = {"a": torch.tensor([1.0, 0.0], dtype=dtype, requires_grad=True)}
    rank(scores)
    assert scores["a"].tolist() == [1.0, 0.0]


def test_no_layer_no_ranking():
    assert len(rank({"a": torch.zeros(0)})) == 0


@given(SCORES, st.data())
def test_kinds_ranked_apart_lose_their_share_each(scores, data):
    kinds = {name: data.draw(st.sampled_from(["heads", "mlp"])) for name in scores}
    ranking = rank(scores, kinds)
    parts = {kind: {name: scores[name] for name in scores if kinds[name] == kind} for kind in set(kinds.values())}
    for percent in range(0, 100, 5):
        masks = ranking.masks(ranking.n_pruned(percent / 100))
        for part in parts.values():
            own = rank(part)
            expected = own.masks(n_pruned(percent / 100, len(own)))
            assert {name: masks[name].tolist() for name in part} == {n: m.tolist() for n, m in expected.items()}


def test_one_kind_is_ranked_as_all_are():
    scores = {"a": torch.tensor([0.5, 0.1, 0.3]), "b": torch.tensor([0.2, 0.4])}
    assert torch.equal(rank(scores, dict.fromkeys(scores, "mlp")).order, rank(scores).order)
    assert rank(scores).n_pruned(0.5) == 2
