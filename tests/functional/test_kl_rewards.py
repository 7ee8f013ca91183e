import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lit_rlhf.functional import kl_penalized_rewards


def test_by_hand(poison):
    kl = torch.tensor([[0.5, -1.0, poison], [2.0, poison, poison], [0.0, 1.0, 4.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    rewards = kl_penalized_rewards(torch.tensor([1.0, -3.0, 0.25]), kl, mask, 0.5)
    assert rewards.tolist() == [[-0.25, 1.5, 0.0], [-4.0, 0.0, 0.0], [0.0, -0.5, -1.75]]


def test_a_poisoned_score_affects_its_own_cell_only(poison):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rewards = kl_penalized_rewards(torch.tensor([poison, 1.0]), torch.ones(2, 3), mask, 0.0)
    assert rewards[0, 0] == 0 and rewards[0, 2] == 0 and rewards[1].tolist() == [1, 0, 0]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(0, 3))
def test_a_row_sums_to_the_score_minus_the_penalty(lengths, kl_coefficient):
    mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    kl, scores = torch.randn(len(lengths), 6).double(), torch.randn(len(lengths)).double()
    rewards = kl_penalized_rewards(scores, kl, mask, kl_coefficient)
    for b, length in enumerate(lengths):
        expected = scores[b].item() - kl_coefficient * sum(kl[b, :length].tolist())
        assert_close(rewards[b].sum().item(), expected, rtol=1e-12, atol=1e-12)
        assert (rewards[b, length:] == 0).all()


def test_a_row_without_an_action_is_refused():
    with pytest.raises(AssertionError):
        kl_penalized_rewards(torch.ones(2), torch.zeros(2, 2), torch.tensor([[True, True], [False, False]]), 0.1)


def test_a_column_of_scores_is_refused():
    with pytest.raises(AssertionError):
        kl_penalized_rewards(torch.ones(2, 1), torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool), 0.1)
