"""Log-probabilities and entropies from logits of any dtype, in float32."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits converted to float32 at a time: the logits of a batch are its largest tensor. 4 MiB stay in a CPU's cache; an
# accelerator takes 16 times as many, because every kernel launch costs.
_CHUNK_ELEMENTS = 2**20


def logit_chunks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of rows and columns that cover (B, T), each of a bounded number of logits, at least one position."""
    B, T, V = logits.shape
    limit = _CHUNK_ELEMENTS if logits.device.type == "cpu" else 16 * _CHUNK_ELEMENTS
    columns = max(1, min(T, limit // V))
    rows = max(1, limit // (columns * V))
    for row in range(0, B, rows):
        for column in range(0, T, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def scaled_logits(logits: Tensor, temperature: float) -> Tensor:
    """Divide float32 logits by `temperature`, without a copy where nothing changes."""
    logits = logits.float()
    return logits if temperature == 1.0 else logits / temperature


class _TokenLogprobs(torch.autograd.Function):
    """Save only the logits for the backward pass, where autograd would save all log-probabilities in float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits, tokens)
        ctx.temperature = temperature
        logprobs = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)  # (B, T)
        for chunk in logit_chunks(logits):
            vocabulary = scaled_logits(logits[chunk], temperature).log_softmax(-1)
            logprobs[chunk] = vocabulary.gather(-1, tokens[chunk].unsqueeze(-1)).squeeze(-1)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of log p(a) with respect to the logits is `(onehot(a) - softmax) / temperature`."""
        logits, tokens = ctx.saved_tensors
        logits_gradient = torch.empty_like(logits)
        for chunk in logit_chunks(logits):
            outer = (gradient[chunk] / ctx.temperature).unsqueeze(-1)
            inner = scaled_logits(logits[chunk], ctx.temperature).softmax(-1).mul_(-outer)
            inner.scatter_add_(-1, tokens[chunk].unsqueeze(-1), outer)
            # a masked position has gradient 0, and 0 * nan would be nan
            logits_gradient[chunk] = inner.masked_fill_(outer == 0, 0)
        return logits_gradient, None, None


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the log-probability of each token under `softmax(logits / temperature)`.

    Nothing is shifted: `logits[:, t]` is the distribution of `tokens[:, t]`. Where the incoming gradient is 0, that of
    the logits is exactly 0, even if they are `nan`. Differentiable once.

    Args:
        logits: (B, T, V), any floating dtype; half precision is converted to float32 in chunks.
        tokens: (B, T) int64.
        temperature: Above 0.

    Returns:
        (B, T) float32, in nats.
    """
    assert logits.shape[:-1] == tokens.shape, f"shapes differ: {tuple(logits.shape)} and {tuple(tokens.shape)}"
    assert temperature > 0, f"temperature {temperature} is not above 0"
    return _TokenLogprobs.apply(logits, tokens, temperature)  # type: ignore[no-untyped-call]


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the entropy `-sum_v p_v log p_v` of `softmax(logits / temperature)` at each position.

    A logit of minus infinity counts as probability 0. Differentiable; then autograd saves the probabilities of the full
    batch.

    Args:
        logits: (B, T, V), any floating dtype.
        temperature: Above 0.

    Returns:
        (B, T) float32, in nats.
    """
    assert temperature > 0, f"temperature {temperature} is not above 0"
    entropy = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)  # (B, T)
    for chunk in logit_chunks(logits):
        entropy[chunk] = torch.special.entr(scaled_logits(logits[chunk], temperature).softmax(-1)).sum(-1)
    return entropy
