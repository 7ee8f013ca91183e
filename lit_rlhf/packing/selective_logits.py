"""Logits of some places of a batch alone: with a vocabulary of any size they are its largest tensor."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def logits_at_positions(model: PreTrainedModel, row_index: Tensor, column_index: Tensor, **inputs: Any) -> Tensor:
    """Return the logits of n places of a batch, (n, V): the unembedding sees nothing else.

    Args:
        model: a causal language model, or the strategy's wrapper of one.
        row_index: (n,) int64, the row of each place.
        column_index: (n,) int64, and where in it.
        inputs: what the model takes.
    """
    with _lm_head_at_positions(model, row_index, column_index):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[0]


@contextmanager
def _lm_head_at_positions(model: PreTrainedModel, row_index: Tensor, column_index: Tensor) -> Iterator[None]:
    """Within the block the model unembeds these places as one row. Its whole forward runs, with all that wraps it."""
    head: Any = model.get_output_embeddings()
    assert head is not None, f"{type(model).__name__} has no output embeddings"
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][row_index, column_index].unsqueeze(0), *args[1:]))
    try:
        yield
    finally:
        hook.remove()
