"""Agreement of judges by hand: ties, Cohen's kappa, the mean over several judges."""

import math

import pytest

from lit_rlhf.evaluation.agreement import compute_agreement, compute_mean_agreement, match_decisions
from lit_rlhf.evaluation.suites.preference import build_agreement_table


def test_agreement_by_hand() -> None:
    one = {1: 1.0, 2: 1.0, 3: 0.0, 4: 0.5, 5: 1.0}
    other = {1: 1.0, 2: 0.0, 3: 0.0, 4: 1.0, 6: 1.0}
    found = between(one, other)
    assert (found.share, found.count, found.ties) == (pytest.approx(2 / 3), 3, 1)
    # shares of "better": 2/3 and 1/3; chance 2/9 + 2/9; kappa (6/9 - 4/9) / (5/9)
    assert found.kappa == pytest.approx(0.4)
    assert found.margin == pytest.approx(1.959963984540054 * math.sqrt(2 / 27))
    assert between({1: 0.5}, {1: 1.0})[:4] == (None, None, 0, 1)
    assert between({1: 1.0}, {1: 1.0}).kappa is None


def test_agreement_of_many_is_over_all_their_pairs() -> None:
    verdicts = {"a": {1: 1.0, 2: 1.0}, "b": {1: 1.0, 2: 0.0}, "c": {1: 0.0}}
    table = agreements(verdicts)
    assert table["a"]["b"] == table["b"]["a"]
    assert overall(verdicts) == pytest.approx((1 + 0 + 0 + 0) / 4)
    assert overall({"a": {1: 1.0}, "b": {2: 1.0}}) is None
