"""A scalar model that rides on a language model: its trunk computes, a head of one output reads.

With an adapter of its own on the same frozen base a critic or a reward model costs the adapter and the head alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_rlhf.models.lora import active_adapter
from lit_rlhf.models.scalar_model import apply_head
from lit_rlhf.packing.packed_batch import PackedBatch


class ScalarHead(nn.Module):
    """One output on the last layer of another model, (raw - shift) / scale.

    Args:
        weight: (1, D).
        bias: (1,), of a head that has one.
        shift: centring constant, in raw units (App. C.2).
        scale: what the shifted output is divided by.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, shift: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.score = nn.Linear(weight.shape[1], 1, bias=bias is not None)
        self.score.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
        self.shift, self.scale = shift, scale

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (...) float32 of (..., D)."""
        return (apply_head(hidden, self.score) - self.shift) / self.scale


def zero_init_head(model: PreTrainedModel) -> ScalarHead:
    """Return a head that gives 0 everywhere, as wide as `model`."""
    return ScalarHead(torch.zeros(1, model.config.get_text_config().hidden_size))


@contextmanager
def capture_last_hidden_state(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within the block, the last layer's output of every forward pass of `model`, (L, W, D) each, goes into a list."""
    kept: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        kept.append(output[0])

    handle = model.get_decoder().register_forward_hook(keep)  # not base_model, which OPT passes by
    try:
        yield kept
    finally:
        handle.remove()


def hidden_states_with_adapter(model: PreTrainedModel, adapter: str | None, batch: PackedBatch) -> Tensor:
    """Return the last layer's output, (L, W, D).

    Args:
        model: a causal language model.
        adapter: the one that computes; None for what is active.
        batch: the batch.
    """
    with capture_last_hidden_state(model) as kept, nullcontext() if adapter is None else active_adapter(model, adapter):
        # through the whole model, for the sake of one logit: sharded weights are gathered by its own forward alone
        model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=1,
        )
    return kept[0]
