"""Filters of the sampling distribution: top-k and top-p."""

import torch
from torch import Tensor

from lit_rlhf.functional.logprobs import logit_chunks, scaled_logits


def top_k_top_p_threshold(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Compute the smallest logit of a token that may be sampled.

    Top-k first; top-p (nucleus sampling: Holtzman et al., 2020) then keeps the fewest of the k likeliest tokens that
    reach probability p, renormalized over the k. Tokens that tie with the last one are kept too.

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
            before = probabilities.cumsum(-1, dtype=torch.float64) - probabilities  # of likelier tokens
            needed = (before < top_p).sum(-1, keepdim=True).clamp_min(1)
            last = likeliest.gather(-1, needed - 1).squeeze(-1)
        threshold[chunk] = last
    return threshold


def apply_top_k_top_p(
    logits: Tensor, tokens: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Set the logits of tokens that may not be sampled to minus infinity, except those of `tokens`.

    Args:
        logits: (B, T, V).
        tokens: (B, T) int64, the sampled tokens. Another model, or the same one after an update, might filter them out;
            kept, their probability is small instead of 0.
        temperature: Above 0.
        top_k: As in `top_k_top_p_threshold`.
        top_p: As in `top_k_top_p_threshold`.

    Returns:
        (B, T, V); gradients flow to the logits that are kept.
    """
    with torch.no_grad():
        filtered = logits < top_k_top_p_threshold(logits, temperature, top_k, top_p).unsqueeze(-1)
        filtered.scatter_(-1, tokens.unsqueeze(-1), False)
    return logits.masked_fill(filtered, -torch.inf)
