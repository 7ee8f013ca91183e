"""Sampling from a part of the vocabulary: top-k, top-p."""

import torch
from torch import Tensor

from lit_rlhf.functional.logprobs import logit_chunks, scaled_logits


def top_k_top_p_threshold(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """The smallest logit of a token that may be drawn.

    First the k likeliest tokens stay; of these, renormalised, the smallest number of likeliest ones that reach the
    probability p (nucleus sampling: Holtzman et al., 2020). Tokens that tie with the last one stay too.

    Args:
        logits: (B, T, V), any floating dtype.
        temperature: Above 0.
        top_k: At least 1; None for no such limit.
        top_p: Above 0; None or 1 for no such limit.

    Returns:
        (B, T), the dtype of `logits`.
    """
    threshold = torch.full_like(logits[..., 0], -torch.inf)
    for chunk in logit_chunks(logits):
        part = logits[chunk]
        count = part.shape[-1] if top_k is None else min(top_k, part.shape[-1])
        likeliest = part.topk(count).values  # (b, t, count), descending
        last = likeliest[..., -1]
        if top_p is not None and top_p < 1:
            probabilities = scaled_logits(likeliest, temperature).softmax(-1)
            before = probabilities.cumsum(-1, dtype=torch.float64) - probabilities  # of the likelier ones
            needed = (before < top_p).sum(-1, keepdim=True).clamp_min(1)
            last = likeliest.gather(-1, needed - 1).squeeze(-1)
        threshold[chunk] = last
    return threshold


def apply_top_k_top_p(
    logits: Tensor, tokens: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Logits with minus infinity for what may not be drawn; `tokens` may be drawn in any case.

    Args:
        logits: (B, T, V).
        tokens: (B, T) int64, what was drawn. Another model, or the same after an update, may rule it out; kept, its
            probability is small and not 0.
        temperature: Above 0.
        top_k: As in `top_k_top_p_threshold`.
        top_p: As in `top_k_top_p_threshold`.

    Returns:
        (B, T, V); gradients flow to the logits that stay.
    """
    with torch.no_grad():
        out = logits < top_k_top_p_threshold(logits, temperature, top_k, top_p).unsqueeze(-1)
        out.scatter_(-1, tokens.unsqueeze(-1), False)
    return logits.masked_fill(out, -torch.inf)
