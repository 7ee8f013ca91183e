import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.evaluation.win_rate import Z_95
from lit_rlhf.synthetic.paper.estimates import Estimate, PaperClaim, estimate_mean, pool_seeds, subtract

values = st.floats(-5, 5)
halves = st.floats(0, 2)


def around(value: float, half: float) -> Estimate:
    return Estimate(value, value - half, value + half)


def test_a_mean_of_zeros_and_ones_has_the_interval_of_a_rate() -> None:
    half = Z_95 * math.sqrt(0.25 * 0.75 / 7)
    assert estimate_mean([1, 0, 0, 0, 1, 0, 0, 0]) == pytest.approx((0.25, max(0, 0.25 - half), 0.25 + half))
    assert estimate_mean([0.5]) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="no values"):
        estimate_mean([])


@given(values, halves, st.integers(1, 5))
def test_pooling_equal_seeds_keeps_the_mean_and_shrinks_the_interval(value: float, half: float, count: int) -> None:
    pooled = pool_seeds([around(value, half)] * count)
    assert pooled == pytest.approx(around(value, half / math.sqrt(count)), abs=1e-9)


@given(values, halves, values, halves)
def test_a_difference_adds_variances(first: float, one: float, second: float, other: float) -> None:
    difference = subtract(around(first, one), around(second, other))
    assert difference == pytest.approx(around(first - second, math.hypot(one, other)), abs=1e-9)


VALUES = {"high": around(0.7, 0.02), "low": around(0.4, 0.02), "near": around(0.41, 0.02)}


@pytest.mark.parametrize(
    ("claim", "outcome"),
    [
        (PaperClaim("", [("high", "low")]), "agrees"),
        (PaperClaim("", [("low", "high")]), "disagrees"),
        (PaperClaim("", [("near", "low")]), "undecided"),
        (PaperClaim("", [("high", "low"), ("near", "low")]), "undecided"),
        (PaperClaim("", [("near", "low"), ("low", "high")]), "disagrees"),
        (PaperClaim("", [("low", "near")], "within", 0.05), "agrees"),
        (PaperClaim("", [("low", "near")], "within", 0.02), "undecided"),
        (PaperClaim("", [("low", "high")], "within", 0.05), "disagrees"),
        (PaperClaim("", [("low", "near")], "not below", 0.05), "agrees"),
        (PaperClaim("", [("low", "high")], "not below", 0.05), "disagrees"),
        (PaperClaim("", [("high", "low"), ("near", "low"), ("low", "high")], "mostly"), "agrees"),
        (PaperClaim("", [("high", "low"), ("low", "high")], "mostly"), "disagrees"),
        (PaperClaim("", [("high", "low"), ("low", "low"), ("low", "low")], "mostly"), "agrees"),
        (PaperClaim("", [("low", "low")], "mostly"), "undecided"),
    ],
)
def test_what_values_say_about_a_claim(claim: PaperClaim, outcome: str) -> None:
    assert claim.check(VALUES).outcome == outcome


def test_a_finding_names_the_comparisons_that_decide_it() -> None:
    finding = PaperClaim("", [("high", "low"), ("low", "high")]).check(VALUES)
    assert finding.detail == "1 of 2: low less high is −0.300 [−0.328, −0.272]"
    many = PaperClaim("", [("low", "high"), *((f"low{n}", "high") for n in range(4))])
    found = many.check(VALUES | {f"low{n}": VALUES["low"] for n in range(4)})
    assert found.detail.startswith("5 of 5: ") and found.detail.endswith("; and 2 more")
