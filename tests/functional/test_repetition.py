"""The fraction of repeated trigrams, by hand and against a Python set."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.functional import repeated_ngram_fraction


def test_by_hand():
    ids = torch.tensor(
        [[5, 5, 5, 5, 5, 9], [1, 2, 3, 1, 2, 3], [1, 2, 3, 4, 5, 6], [7, 7, 7, 7, 0, 0], [7, 7, 0, 0, 0, 0]]
    )
    mask = torch.tensor([[1] * 6, [1] * 6, [1] * 6, [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()
    # 555 555 555 559: two of four; 123 231 312 123: one of four; 777 777: one of two; nothing to count
    assert repeated_ngram_fraction(ids, mask).tolist() == [0.5, 0.25, 0.0, 0.5, 0.0]


def test_tokens_outside_the_mask_do_not_count():
    mask = torch.tensor([[True] * 4 + [False] * 3])
    left, right = torch.tensor([[1, 2, 3, 4, 1, 2, 3]]), torch.tensor([[1, 2, 3, 4, 0, 0, 0]])
    assert repeated_ngram_fraction(left, mask).item() == repeated_ngram_fraction(right, mask).item() == 0.0


@given(st.lists(st.integers(0, 2**21 - 1), min_size=3, max_size=30), st.integers(1, 4), st.integers(0, 3))
def test_equals_a_python_set(ids, period, padding):
    row = ids[:period] * len(ids)
    grams = [tuple(row[start : start + 3]) for start in range(len(row) - 2)]
    given_ids = torch.tensor([row + [0] * padding])
    mask = torch.arange(given_ids.shape[1])[None] < len(row)
    assert abs(repeated_ngram_fraction(given_ids, mask).item() - (1 - len(set(grams)) / len(grams))) < 1e-6


def test_responses_shorter_than_a_trigram():
    assert repeated_ngram_fraction(torch.ones(2, 2, dtype=torch.long), torch.ones(2, 2).bool()).tolist() == [0.0, 0.0]
