"""Groups and correlations, against loops and Python's statistics."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lit_rlhf.functional import correlation, grouped_mean, quantile_bins

values = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0, 7.5]), min_size=1, max_size=25)
points = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.integers(0, 3)), min_size=2, max_size=25)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-20, 20)), max_size=20))
def test_means_equal_a_loop(rows):
    group, numbers = torch.tensor([g for g, _ in rows]), torch.tensor([float(v) for _, v in rows])
    mean, count = grouped_mean(numbers, group.long(), 5)
    for index in range(5):
        members = [v for g, v in rows if g == index]
        assert count[index] == len(members)
        assert_close(float(mean[index]), statistics.fmean(members) if members else math.nan, equal_nan=True)


@given(values, st.integers(1, 6))
def test_bins_are_ordered_and_split_no_equal_values(numbers, groups):
    group, edges = quantile_bins(torch.tensor(numbers), groups)
    assert set(group.tolist()) == set(range(len(edges))) and len(edges) <= groups
    of_value = dict(zip(numbers, group.tolist()))
    assert [of_value[value] for value in numbers] == group.tolist()
    ordered = [of_value[value] for value in sorted(of_value)]
    assert ordered == sorted(ordered)
    assert edges.tolist() == [min(v for v, g in of_value.items() if g == index) for index in range(len(edges))]


def test_distinct_values_give_bins_of_equal_size():
    group, edges = quantile_bins(torch.randperm(100).float(), 5)
    assert group.bincount().tolist() == [20] * 5 and edges.tolist() == [0, 20, 40, 60, 80]


@given(points)
def test_correlation_is_pearsons(rows):
    x, y = ([float(row[i]) for row in rows] for i in (0, 1))
    found = correlation(torch.tensor(x), torch.tensor(y))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found.isnan()
    else:
        assert_close(float(found), statistics.correlation(x, y), rtol=1e-9, atol=1e-9)


@given(points)
def test_correlation_within_groups_is_that_of_the_differences(rows):
    x, y = ([float(row[i]) for row in rows] for i in (0, 1))
    owner = [row[2] for row in rows]
    centered = []
    for column in (x, y):
        mean = {g: statistics.fmean(v for v, o in zip(column, owner) if o == g) for g in owner}
        centered.append([v - mean[o] for v, o in zip(column, owner)])
    found = correlation(torch.tensor(x), torch.tensor(y), torch.tensor(owner))
    if max(map(abs, centered[0])) < 1e-9 or max(map(abs, centered[1])) < 1e-9:
        assert found.isnan() or abs(found) <= 1.0 + 1e-9
    else:
        assert_close(float(found), statistics.correlation(*centered), rtol=1e-6, atol=1e-6)


def test_correlation_within_groups_ignores_differences_between_prompts():
    """Within each prompt the longer response scores lower, though long prompts score high."""
    score = torch.tensor([1.0, 0.0, 11.0, 10.0])
    length = torch.tensor([1, 2, 11, 12])
    assert correlation(score, length) > 0.9
    assert correlation(score, length, torch.tensor([0, 0, 1, 1])) == pytest.approx(-1)
