"""Shared backbone: a scalar head on the hidden states of a language model.

With its own adapter on the same frozen base, a critic or a reward model costs the memory of adapter and head alone.

Shapes: `L` rows of `W` tokens, `D` hidden size.
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
    """A linear head with one output on the last hidden state of another model; its output is `(raw - shift) / scale`.

    Args:
        weight: (1, D).
        bias: (1,), or None.
        shift: Centering constant, in units of the raw output (App. C.2).
        scale: Divisor of the shifted output.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, shift: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.score = nn.Linear(weight.shape[1], 1, bias=bias is not None)
        self.score.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
        self.shift, self.scale = shift, scale

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the head to (..., D), giving (...) float32."""
        return (apply_head(hidden, self.score) - self.shift) / self.scale


def zero_init_head(model: PreTrainedModel) -> ScalarHead:
    """Create a head for `model` that outputs 0 everywhere."""
    return ScalarHead(torch.zeros(1, model.config.get_text_config().hidden_size))


@contextmanager
def capture_last_hidden_state(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within the context, append the last layer's output of every forward pass of `model`, (L, W, D), to a list."""
    captured: list[Tensor] = []

    def capture(module: Any, inputs: Any, output: Any) -> None:
        captured.append(output[0])

    handle = model.get_decoder().register_forward_hook(capture)  # OPT does not call its base_model
    try:
        yield captured
    finally:
        handle.remove()


def hidden_states_with_adapter(model: PreTrainedModel, adapter: str | None, batch: PackedBatch) -> Tensor:
    """Compute the last layer's output, (L, W, D).

    Args:
        model: A causal language model.
        adapter: Name of the adapter to compute with; None for the active one.
        batch: Of `pack_batch`.
    """
    adapter_context = nullcontext() if adapter is None else active_adapter(model, adapter)
    with capture_last_hidden_state(model) as captured, adapter_context:
        # the full forward, at the cost of one logit per row: only it gathers sharded weights
        model(**batch.model_inputs, use_cache=False, logits_to_keep=1)
    return captured[0]
