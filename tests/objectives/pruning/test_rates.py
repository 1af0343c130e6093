import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from objectives.errors import ObjectiveError, PruningRatesError
from objectives.pruning.rates import DEFAULT_RATES, check_rates, n_pruned, parse_rates


def test_the_default_is_the_papers_twenty_rates():
    assert parse_rates(DEFAULT_RATES) == tuple(percent / 100 for percent in range(0, 100, 5))


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("0:0.2:0.05", (0.0, 0.05, 0.1, 0.15, 0.2)),
        ("0:0.9:0.4", (0.0, 0.4, 0.8)),
        (" 0 : 0.3 : 0.1 ", (0.0, 0.1, 0.2, 0.3)),
        ("0,0.29,0.5", (0.0, 0.29, 0.5)),
        ("0, 1e-2", (0.0, 0.01)),
        ("0:0.999:0.001", tuple(permille / 1000 for permille in range(1000))),
    ],
)
def test_both_forms(text, rates):
    assert parse_rates(text) == rates


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        ":",
        "0:0.9",
        "0:0.9:0.1:0.1",
        "0,,0.5",
        "a,b",
        "0:x:0.1",
        "0:0.9:0",
        "0:0.9:-0.1",
        "0:1:0.1",
        "0:inf:0.1",
        "inf:0.9:0.1",
        "-inf:0.9:0.1",
        "0:0.9:inf",
        "0:0.9:nan",
        "nan:0.9:0.1",
        "0:0.9:snan",
        "0,nan",
        "0,inf",
        "0:0.9:1e-9",
        "0:0.9:1e-30",
        "0.5:0.1:0.1",
        "0.1:0.9:0.1",
        "-0.1:0.9:0.1",
        "0.1,0.5",
        "0,0.5,0.5",
        "0,0.5,0.4",
        "0,1",
        "0,-0.5",
        "0,0.1,0.1000000000000000000001",
        "0,1e400",
    ],
)
def test_other_rates_are_refused_in_one_line(text):
    with pytest.raises(PruningRatesError) as caught:
        parse_rates(text)
    assert isinstance(caught.value, ObjectiveError)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_the_message_names_the_rates_and_the_remedy():
    with pytest.raises(PruningRatesError, match=r"increase strictly from 0 and stay below 1, but got 0.0, 0.5, 0.25"):
        parse_rates("0,0.5,0.25")
    with pytest.raises(PruningRatesError, match=r"`--rates 0-0.9` isn't START:STOP:STEP .*; try 0:0.95:0.05"):
        parse_rates("0-0.9")


@given(st.text(alphabet="0123456789.,:e-+ nainf", max_size=12))
def test_any_text_is_rates_or_one_error(text):
    try:
        rates = parse_rates(text)
    except PruningRatesError:
        return
    assert check_rates(rates) == rates
    assert 2 <= len(rates) <= 1000


@pytest.mark.parametrize("rates", [(), (0.0,), (0.0, float("nan")), (0.0, 0.5, 1.0)])
def test_given_rates_are_checked_too(rates):
    with pytest.raises(PruningRatesError):
        check_rates(rates)


def test_rates_are_decimals():
    assert (0.29 * 100, n_pruned(0.29, 100)) == (28.999999999999996, 29)
    assert (n_pruned(0.3, 10), n_pruned(0.0, 10), n_pruned(0.95, 688), n_pruned(0.999, 10)) == (3, 0, 653, 9)


@given(st.integers(0, 999), st.integers(1, 1_000_000))
def test_n_pruned_is_the_floor_of_the_exact_product(permille, n_components):
    expected = Fraction(permille, 1000) * n_components
    assert n_pruned(permille / 1000, n_components) == expected.numerator // expected.denominator


def test_rates_are_read_without_torch():
    program = "import sys, objectives.pruning.rates, objectives.pruning.curve; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )
