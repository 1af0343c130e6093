import pytest
import torch

from objectives.attribution.relevance import Relevance
from objectives.errors import RelevanceError


def relevance(signed: list[list[float]], magnitude: list[list[float]] | None = None) -> Relevance:
    values = torch.tensor(signed)
    return Relevance({"conv": values}, {"conv": values.abs() if magnitude is None else torch.tensor(magnitude)})


def test_scores_are_means_over_samples_in_float64():
    scores = relevance([[1.0, -2.0], [-1.0, -4.0]])
    signed, absolute = scores.scores(absolute=False)["conv"], scores.scores(absolute=True)["conv"]
    assert signed.dtype == absolute.dtype == torch.float64
    assert signed.tolist() == [0.0, -3.0]
    assert absolute.tolist() == [1.0, 3.0]


def test_absolute_scores_come_from_the_magnitude():
    assert relevance([[1.0, -1.0]], [[5.0, 7.0]]).scores(absolute=True)["conv"].tolist() == [5.0, 7.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("absolute", [False, True])
def test_relevance_that_is_not_finite_is_an_error(value, absolute):
    message = r"^The relevance of layer 'conv' isn't finite; use a larger epsilon or another rule there\.$"
    with pytest.raises(RelevanceError, match=message):
        relevance([[1.0, value]]).scores(absolute=absolute)


@pytest.mark.parametrize("absolute", [False, True])
def test_layer_without_any_relevance_is_an_error(absolute):
    message = r"^No relevance reaches layer 'conv' under this composite; use another rule\.$"
    with pytest.raises(RelevanceError, match=message):
        relevance([[0.0, 0.0]]).scores(absolute=absolute)


def test_relevance_that_cancels_over_samples_is_no_error():
    assert relevance([[1.0, 1.0], [-1.0, -1.0]]).scores(absolute=False)["conv"].tolist() == [0.0, 0.0]
