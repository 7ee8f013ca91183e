"""Metrics and their changes against the baseline, with intervals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.evaluation.results import MetricValue, compute_change, compute_mean_metric, compute_paired_metric

Z = 1.959963984540054
numbers = st.floats(-100, 100, allow_nan=False)


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=30))
def test_the_interval_of_a_change_is_that_of_the_differences(pairs: list[tuple[float, float]]) -> None:
    mine, theirs = (np.array(column) for column in zip(*pairs, strict=True))
    change = compute_change(compute_paired_metric(mine.tolist(), "points"), compute_paired_metric(theirs.tolist()))
    assert change is not None and change.low is not None and change.high is not None
    margin = Z * np.std(mine - theirs, ddof=1) / np.sqrt(len(pairs))
    assert change.value == pytest.approx(np.mean(mine - theirs), abs=1e-9)
    assert (change.low, change.high) == pytest.approx(
        (np.mean(mine - theirs) - margin, np.mean(mine - theirs) + margin), abs=1e-9
    )


def test_a_row_that_one_of_them_lacks_is_left_out_of_the_change() -> None:
    mine, theirs = compute_paired_metric([1.0, None, 3.0, 5.0]), compute_paired_metric([0.0, 9.0, None, 2.0])
    change = compute_change(mine, theirs)
    assert change is not None and change.count == 2
    assert change.value == pytest.approx(2.0)  # of the differences 1 and 3
    assert change.low == pytest.approx(2.0 - Z * np.sqrt(2) / np.sqrt(2))
    assert compute_change(mine, compute_paired_metric([None, 9.0, None, None])) is None


def test_rows_that_may_be_others_give_no_interval() -> None:
    plain = compute_mean_metric([0.2, 0.4])
    for mine, theirs in ((plain, plain), (compute_paired_metric([0.2, 0.4]), compute_paired_metric([0.1, 0.2, 0.3]))):
        change = compute_change(mine, theirs)
        assert change is not None and change.low is None and change.high is None
    assert compute_change(MetricValue(None), plain) is None
