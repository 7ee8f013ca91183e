"""Aggregations of an ensemble's scores, against Python's statistics."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lit_rlhf.functional import AGGREGATIONS, aggregate_scores, ensemble_mean, ensemble_mean_minus_std, ensemble_min

members = st.integers(1, 4).flatmap(
    lambda count: st.lists(
        st.lists(st.floats(-50, 50, width=32), min_size=count, max_size=count), min_size=1, max_size=5
    )
)


@given(members, st.floats(0, 3))
def test_aggregations_equal_python_statistics(columns, num_std):
    scores = torch.tensor(columns, dtype=torch.float64).T  # (M, n)
    means = [statistics.fmean(column) for column in columns]
    lower = [mean - num_std * statistics.pstdev(column) for mean, column in zip(means, columns)]
    assert_close(ensemble_mean(scores).tolist(), means, rtol=1e-12, atol=1e-12)
    assert_close(ensemble_min(scores).tolist(), [min(column) for column in columns])
    assert_close(ensemble_mean_minus_std(scores, num_std).tolist(), lower, rtol=1e-9, atol=1e-6)


def test_by_hand():
    scores = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert aggregate_scores(scores, "mean").tolist() == [2, 0]
    assert aggregate_scores(scores, "min").tolist() == [1, 0]
    assert aggregate_scores(scores, "mean_minus_std", 2.0).tolist() == [0, 0]
    assert aggregate_scores(scores, "mean_minus_std").tolist() == [1, 0]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_ensemble_of_one_is_its_member(aggregation):
    score = torch.randn(1, 3, 2)
    assert_close(aggregate_scores(score, aggregation), score[0])


def test_other_names_are_refused():
    with pytest.raises(AssertionError, match="median"):
        aggregate_scores(torch.zeros(2, 1), "median")
