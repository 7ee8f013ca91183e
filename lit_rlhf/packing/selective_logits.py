"""Logits of selected positions: with any real vocabulary, the logits of a full batch are its largest tensor."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import embedding
from transformers import PreTrainedModel


def select_positions(states: Tensor, position: tuple[Tensor, Tensor]) -> Tensor:
    """Select positions of a batch, some of them several times, such as the last token of a prompt with many responses.

    The same as `states[position]`, whose backward pass adds with atomics on a CPU, in an order that depends on threads.
    That of `index_select` does so on a GPU; that of an embedding on neither.

    Args:
        states: (L, W, D).
        position: Row and column of each position, (n,) int64 each.

    Returns:
        (n, D).
    """
    row, column = position
    return embedding(row * states.shape[1] + column, states.flatten(0, 1))


def logits_at_positions(model: PreTrainedModel, row_index: Tensor, column_index: Tensor, **inputs: Any) -> Tensor:
    """Compute the logits of n positions of a batch, (n, V): the `lm_head` gets no other position.

    Args:
        model: A causal language model, sharded by FSDP2 or not.
        row_index: (n,) int64, the row of each position.
        column_index: (n,) int64, its column.
        inputs: Inputs of the model.
    """
    with _lm_head_at_positions(model, row_index, column_index):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[0]


@contextmanager
def _lm_head_at_positions(model: PreTrainedModel, row_index: Tensor, column_index: Tensor) -> Iterator[None]:
    """Within the context, pass the `lm_head` these positions as one row.

    A hook, so that the model's own forward runs with all wrappers around it (FSDP2, compilation).
    """
    head: Any = model.get_output_embeddings()
    assert head is not None, f"{type(model).__name__} has no output embeddings"
    hook = head.register_forward_pre_hook(
        lambda _, args: (select_positions(args[0], (row_index, column_index)).unsqueeze(0), *args[1:])
    )
    try:
        yield
    finally:
        hook.remove()
