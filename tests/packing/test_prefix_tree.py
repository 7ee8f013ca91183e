"""Segments: written out by hand for a small row, and as properties of any layout."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.functional import packed_position_ids, prefix_tree_mask


def test_a_prompt_and_two_completions_by_hand():
    segment = torch.tensor([[1, 1, 2, 2, 3, 0]])
    parent = torch.tensor([[-1, -1, 1, 1, 1, -1]])
    mask = prefix_tree_mask(segment, parent)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert packed_position_ids(mask, segment).tolist() == [[0, 1, 2, 3, 2, 0]]


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(0, 3))
def test_a_token_sees_its_own_sequence_and_nothing_else(groups, padding):
    """Each group is a root and its children, laid out one after the other; every token knows its sequence."""
    segment, parent, start, place = [], [], {}, []
    number = 0
    for root, *children in groups:
        number += 1
        first = number
        for length, above in [(root, -1), *((child, first) for child in children)]:
            offset = 0 if above == -1 else root
            start[number] = len(segment)
            segment += [number] * length
            parent += [above] * length
            place += list(range(offset, offset + length))
            number += 1
        number -= 1
    segment += [0] * padding
    parent += [-1] * padding
    mask = prefix_tree_mask(torch.tensor([segment]), torch.tensor([parent]))
    for query, (own, above) in enumerate(zip(segment, parent)):
        seen = {key for key in range(len(segment)) if mask[0, 0, query, key]}
        assert seen == {key for key in range(query + 1) if segment[key] == own or segment[key] == above}
        assert query in seen
    assert packed_position_ids(mask, torch.tensor([segment]))[0].tolist() == place + [0] * padding
