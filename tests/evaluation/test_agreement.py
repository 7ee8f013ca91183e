"""Agreement of judges by hand: ties, Cohen's kappa, the mean over several judges."""

import math

import pytest

from lit_rlhf.evaluation.agreement import compute_agreement, compute_mean_agreement, match_decisions


def test_agreement_by_hand() -> None:
    one = {1: 1.0, 2: 1.0, 3: 0.0, 4: 0.5, 5: 1.0}
    other = {1: 1.0, 2: 0.0, 3: 0.0, 4: 1.0, 6: 1.0}
    decided, ties = match_decisions(one, other)
    assert ([(each.item, each.agrees) for each in decided], ties) == ([(1, True), (2, False), (3, True)], 1)
    agreement = compute_agreement(one, other)
    assert (agreement.share, agreement.count, agreement.ties) == (pytest.approx(2 / 3), 3, 1)
    # shares of "better": 2/3 and 1/3; chance 2/9 + 2/9; kappa (6/9 - 4/9) / (5/9)
    assert agreement.kappa == pytest.approx(0.4)
    assert agreement.margin == pytest.approx(1.959963984540054 * math.sqrt(2 / 27))
    assert compute_agreement({1: 0.5}, {1: 1.0})[:4] == (None, None, 0, 1)
    assert compute_agreement({1: 1.0}, {1: 1.0}).kappa is None


def test_mean_agreement_is_over_all_pairs_of_judges() -> None:
    preferences = {"a": {1: 1.0, 2: 1.0}, "b": {1: 1.0, 2: 0.0}, "c": {1: 0.0}}
    assert compute_agreement(preferences["a"], preferences["b"]) == compute_agreement(
        preferences["b"], preferences["a"]
    )
    assert compute_mean_agreement(preferences) == pytest.approx((1 + 0 + 0 + 0) / 4)
    assert compute_mean_agreement({"a": {1: 1.0}, "b": {2: 1.0}}) is None
