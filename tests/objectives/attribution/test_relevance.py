import pytest
import torch
from torch import Tensor

from objectives.attribution.relevance import Relevance, moments
from objectives.errors import RelevanceError


def relevance(signed: list[list[float]], magnitude: list[list[float]] | None = None) -> Relevance:
    """Of one layer, from (samples, components); the magnitude is that of `signed` where it isn't given."""
    values = torch.tensor(signed)
    sums = moments(values, "sum")
    if magnitude is not None:
        of_magnitude = torch.tensor(magnitude).double()
        sums = torch.stack([sums[0], of_magnitude.sum(dim=0), of_magnitude.square().sum(dim=0)])
    return Relevance(len(values), {"conv": sums})


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (5, 3, 2, 4), (2, 5, 3, 2, 4)])
@pytest.mark.parametrize("abs_scope", ["sum", "element"])
def test_moments_are_sums_over_samples(shape, abs_scope):
    values = random(*shape)
    rows = values.reshape(-1, 5, 3, 8 if len(shape) > 3 else 1).double()
    for row, sums in zip(rows, moments(values, abs_scope).reshape(-1, 3, 3), strict=True):
        for component in range(3):
            signed = [sum(values) for values in row[:, component].tolist()]
            magnitudes = [sum(map(abs, values)) for values in row[:, component].tolist()]
            if abs_scope == "sum":
                magnitudes = [abs(value) for value in signed]
            expected = [sum(signed), sum(magnitudes), sum(value**2 for value in magnitudes)]
            assert sums[:, component].tolist() == pytest.approx(expected, rel=1e-5)


def test_moments_of_batches_add_up():
    values = random(6, 3, 2, 2)
    parts = moments(values[:2], "element") + moments(values[2:], "element")
    torch.testing.assert_close(parts, moments(values, "element"))


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


SIGNED = [[3.0, -4.0, 0.0], [1.0, 2.0, -1.0]]


@pytest.mark.parametrize(
    ("absolute", "aggregate", "expected"),
    [
        (False, "mean", [2.0, -1.0, -0.5]),
        (True, "mean", [2.0, 3.0, 0.5]),
        (True, "rms", [5**0.5, 10**0.5, 0.5**0.5]),
        (False, "rms", [5**0.5, 10**0.5, 0.5**0.5]),
    ],
)
def test_scores_are_aggregated_and_normalised_per_layer(absolute, aggregate, expected):
    source = relevance(SIGNED)
    source = Relevance(2, {"a": source.sums["conv"], "b": 10 * source.sums["conv"][:, :2]})

    def scores(normalize: str) -> dict[str, list[float]]:
        found = source.scores(absolute=absolute, aggregate=aggregate, normalize=normalize)
        return {name: values.tolist() for name, values in found.items()}

    assert scores("none")["a"] == pytest.approx(expected)
    l2 = sum(value**2 for value in expected) ** 0.5
    mean = sum(map(abs, expected)) / 3
    assert scores("l2")["a"] == pytest.approx([value / l2 for value in expected])
    assert scores("mean")["a"] == pytest.approx([value / mean for value in expected])
    for normalize in ("l2", "mean"):
        unscaled = Relevance(2, {"b": source.sums["b"] / 10}).scores(
            absolute=absolute, aggregate="mean", normalize=normalize
        )
        if aggregate == "mean":
            assert scores(normalize)["b"] == pytest.approx(unscaled["b"].tolist())


def test_root_mean_square_of_elements_is_of_their_magnitudes():
    scores = relevance([[1.0], [-1.0]], [[3.0], [4.0]]).scores(absolute=True, aggregate="rms")
    assert scores["conv"].tolist() == pytest.approx([12.5**0.5])


@pytest.mark.parametrize("normalize", ["l2", "mean"])
def test_a_layer_whose_relevance_cancels_keeps_its_zeros(normalize):
    cancelling = relevance([[1.0, 1.0], [-1.0, -1.0]])
    assert cancelling.scores(absolute=False, normalize=normalize)["conv"].tolist() == [0.0, 0.0]


def test_an_unknown_normalisation_is_an_error():
    with pytest.raises(ValueError, match="`normalize` must be none, l2 or mean"):
        relevance([[1.0]]).scores(absolute=False, normalize="max")
