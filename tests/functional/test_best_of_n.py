"""Best-of-n: against all subsets by brute force, a distribution with a known maximum, and its KL by counting."""

import math
from itertools import combinations
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.functional import best_of_n_kl, expected_best_of_k


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=7))
def test_estimate_is_the_mean_over_all_subsets(scores):
    expected = [fmean(max(each) for each in combinations(scores, k)) for k in range(1, len(scores) + 1)]
    assert expected_best_of_k(torch.tensor([scores])).squeeze(0).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-100, 100, width=32)), min_size=1, max_size=7))
def test_of_another_value_it_is_that_of_the_response_with_the_highest_score(responses):
    expected = [
        fmean(max(enumerate(each), key=lambda item: (item[1][0], item[0]))[1][1] for each in combinations(responses, k))
        for k in range(1, len(responses) + 1)
    ]
    scores, values = (torch.tensor([column]) for column in zip(*responses))
    assert expected_best_of_k(scores, values).squeeze(0).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_rows_are_prompts():
    scores = torch.tensor([[1.0, 3.0], [10.0, 0.0]])
    torch.testing.assert_close(expected_best_of_k(scores), torch.tensor([[2.0, 3.0], [5.0, 10.0]], dtype=torch.float64))


def test_estimate_is_unbiased():
    """The largest of k uniforms is k / (k + 1) on average."""
    scores = torch.rand(20_000, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.arange(1, 9) / torch.arange(2, 10)
    torch.testing.assert_close(expected_best_of_k(scores).mean(0), expected.double(), atol=0.005, rtol=0)


def test_large_n_loses_no_digits():
    scores = torch.arange(1.0, 1025.0)[None]  # 1 to n: the largest of k is k (n + 1) / (k + 1) on average
    k = torch.arange(1, 1025, dtype=torch.float64)
    torch.testing.assert_close(expected_best_of_k(scores)[0], k * 1025 / (k + 1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_kl_is_that_of_the_best_of_n_over_many_responses(n):
    """The best of n out of m equally likely responses, scored 1 to m: P(best <= j) = (j / m)^n."""
    m = 20_000
    probability = [(j / m) ** n - ((j - 1) / m) ** n for j in range(1, m + 1)]
    kl = math.fsum(p * math.log(p * m) for p in probability if p)
    bound = float(best_of_n_kl(torch.tensor(n)))
    assert kl <= bound + 1e-12
    assert kl == pytest.approx(bound, abs=1e-3)


def test_the_kl_of_best_of_1_is_0():
    assert best_of_n_kl(torch.tensor([1, 4])).tolist() == pytest.approx([0.0, math.log(4) - 0.75])
