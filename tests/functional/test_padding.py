import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.functional import last_token_index, mask_through_first_stop, pad_left, pad_right, position_ids

token_rows = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=5)


@given(token_rows, st.integers(0, 3))
def test_padding_can_be_undone_by_the_mask_alone(rows, pad_id):
    # pad_id is also an ordinary token here
    for pad in (pad_left, pad_right):
        ids, mask = pad(rows, pad_id)
        assert ids.dtype == mask.dtype == torch.int64
        assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
        assert [ids[b][mask[b] == 1].tolist() for b in range(len(rows))] == rows
        assert (ids[mask == 0] == pad_id).all()


def test_sides():
    assert [x.tolist() for x in pad_left([[1, 2, 3], [4]], 9)] == [[[1, 2, 3], [9, 9, 4]], [[1, 1, 1], [0, 0, 1]]]
    assert [x.tolist() for x in pad_right([[1, 2, 3], [4]], 9)] == [[[1, 2, 3], [4, 9, 9]], [[1, 1, 1], [1, 0, 0]]]


def test_padding_does_not_change_its_input_and_accepts_an_empty_row():
    rows = [[1, 2], []]
    ids, mask = pad_left(rows, 7)
    assert rows == [[1, 2], []] and ids.tolist() == [[1, 2], [7, 7]] and mask.tolist() == [[1, 1], [0, 0]]


@given(token_rows)
def test_positions_count_real_tokens_from_zero(rows):
    for pad in (pad_left, pad_right):
        _, mask = pad(rows, 0)
        positions = position_ids(mask)
        assert positions.dtype == torch.int64 and (positions >= 0).all()
        for b, row in enumerate(rows):
            assert positions[b][mask[b] == 1].tolist() == list(range(len(row)))
        assert torch.equal(position_ids(mask.bool()), positions)


@given(token_rows)
def test_last_token(rows):
    _, mask = pad_right(rows, 0)
    assert last_token_index(mask).tolist() == [len(row) - 1 for row in rows]
    assert last_token_index(mask.bool()).tolist() == [len(row) - 1 for row in rows]
    _, mask = pad_left(rows, 0)
    assert last_token_index(mask).tolist() == [mask.shape[1] - 1] * len(rows)


def test_last_token_with_padding_on_both_sides():
    assert last_token_index(torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]])).tolist() == [2, 3]


def test_last_token_of_an_empty_row_is_refused():
    with pytest.raises(AssertionError, match="no real token"):
        last_token_index(torch.tensor([[1, 0], [0, 0]]))


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=5), st.sets(st.integers(0, 4))
)
def test_through_the_first_stop_token(rows, stops):
    mask, has_stop = mask_through_first_stop(torch.tensor(rows), torch.tensor(sorted(stops), dtype=torch.long))
    assert mask.dtype == has_stop.dtype == torch.bool
    for b, row in enumerate(rows):
        first = next((t for t, token in enumerate(row) if token in stops), None)
        assert has_stop[b].item() == (first is not None)
        assert mask[b].tolist() == [first is None or t <= first for t in range(len(row))]
