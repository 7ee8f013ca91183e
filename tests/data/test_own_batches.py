"""Batches of a user's own loader: rows of text and of token ids, and what is left alone."""

from typing import Any, NamedTuple

import pytest
import torch

from lit_rlhf.data.batches import PretrainingBatch
from lit_rlhf.data.collation import TokenizedExample
from lit_rlhf.data.own_batches import OwnRows, collate_targets, read_batch, tokenize_targets
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.errors import UserError

PAD = 0
IDS = [([5, 6], [True, True]), ([7], [True])]


@pytest.mark.parametrize(
    "batch",
    [
        torch.tensor([[5, 6], [7, PAD]]),
        [torch.tensor([5, 6]), torch.tensor([7])],
        [[5, 6], [7]],
        ([5, 6], [7]),
        {"input_ids": torch.tensor([[5, 6], [PAD, 7]])},
        {"input_ids": torch.tensor([[5, 6], [9, 7]]), "attention_mask": torch.tensor([[1, 1], [0, 1]])},
        [{"input_ids": [5, 6]}, {"input_ids": [7, 9], "attention_mask": [1, 0]}],
    ],
)
def test_token_ids_in_every_form(batch: Any) -> None:
    rows = read_batch(batch, PAD)
    assert rows is not None and [tuple(row) for row in rows.tokens] == IDS


def test_labels_say_which_tokens_are_targets() -> None:
    rows = read_batch({"input_ids": [[5, 6, PAD]], "labels": [[-100, 6, -100]]}, PAD)
    assert rows is not None and rows.tokens[0].loss_mask == [False, True]


@pytest.mark.parametrize(
    "batch",
    [
        {"prompt": ["a", "b"], "place": torch.tensor([3, 4])},
        [{"prompt": "a", "place": 3}, {"prompt": "b", "place": 4}],
    ],
)
def test_columns_are_rows(batch: Any) -> None:
    rows = read_batch(batch, PAD)
    assert rows is not None
    assert [row.fields for row in rows.text] == [{"prompt": "a", "place": 3}, {"prompt": "b", "place": 4}]
    assert not rows.is_plain_text and not rows.are_demonstrations


def test_strings_are_plain_text() -> None:
    for batch in ("a", ["a", "b"], ("a", "b")):
        rows = read_batch(batch, PAD)
        assert rows is not None and rows.is_plain_text
    assert not OwnRows().is_plain_text


@pytest.mark.parametrize(
    "batch",
    [
        None,
        [],
        3,
        torch.rand(2, 3),
        torch.tensor([1, 2]),
        [torch.rand(2)],
        [[1.5]],
        PretrainingBatch(*[torch.ones(2)] * 4),
    ],
)
def test_other_batches_are_left_alone(batch: Any) -> None:
    assert read_batch(batch, PAD) is None


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"prompt": ["a", "b"], "messages": [["c", "d"], ["e", "f"]]},
            "the column 'messages' holds lists; .*collate_fn",
        ),
        ({"prompt": "a"}, "the column 'prompt' is a str, no list of values"),
        ({"prompt": ["a"], "field": {"x": ["b"]}}, "the column 'field' is a dict"),
    ],
)
def test_columns_that_cannot_be_taken_apart(batch: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_batch(batch, PAD)


class OwnBatch(NamedTuple):
    """A batch of someone's own type, of which every column could be a row of token ids."""

    ids: torch.Tensor
    mask: torch.Tensor


def test_a_named_tuple_is_a_batch_already() -> None:
    assert read_batch(OwnBatch(torch.tensor([5, 6]), torch.tensor([1, 1])), PAD) is None


def test_labels_that_are_shifted_already_are_refused() -> None:
    with pytest.raises(UserError, match=r"rows\[0\]: labels must be input_ids.*the shift by one is made here"):
        read_batch({"input_ids": [[5, 6]], "labels": [[6, -100]]}, PAD)


def test_a_ranking_with_a_completion_of_its_own_is_no_demonstration() -> None:
    row = {"prompt": "w1", "completion": "w2", "completions": ["w2", "w3"], "ranks": [0, 1]}
    rows = read_batch([row], PAD)
    assert rows is not None and not rows.are_demonstrations
    del row["completions"], row["ranks"]
    rows = read_batch([row], PAD)
    assert rows is not None and rows.are_demonstrations


def test_a_row_that_would_be_left_out_is_refused(tokenizer: Any) -> None:
    rows = read_batch([{"prompt": "w1", "completion": "w2"}, {"prompt": "w1", "completion": ""}], PAD)
    with pytest.raises(UserError, match=r"batch: .*leave such rows out before, or use a data module"):
        tokenize_targets(rows, PromptTemplate(tokenizer))


def test_the_first_token_is_no_target_of_the_mean() -> None:
    examples = [TokenizedExample([5, 6, 7], [True] * 3), TokenizedExample([8, 9], [True] * 2)]
    assert collate_targets(examples, 2, PAD).normalizer == 2 * 3
