"""Repetition within a response."""

import torch
from torch import Tensor

NGRAM = 3  # three ids of up to 21 bits fit into one int64, so that equal keys are equal n-grams


def repeated_ngram_fraction(ids: Tensor, mask: Tensor) -> Tensor:
    """Compute the fraction of a response's trigrams that occurred in it before.

    Args:
        ids: (B, R) int64, below 2**21.
        mask: (B, R) bool, True from column 0 on and then False.

    Returns:
        (B,) float32; 0 for a response of fewer than three tokens.
    """
    if ids.shape[1] < NGRAM:
        return torch.zeros(len(ids), device=ids.device)
    width = ids.shape[1] - NGRAM + 1
    keys = sum(
        (ids[:, start : start + width] << (21 * (NGRAM - 1 - start)) for start in range(NGRAM)), ids.new_zeros(())
    )
    counted = mask[:, NGRAM - 1 :]
    # a masked n-gram gets a unique negative key, so that it repeats nothing
    own = -1 - torch.arange(width, device=ids.device).expand_as(keys)
    ordered = torch.where(counted, keys, own).sort(1).values
    repeats = (ordered[:, 1:] == ordered[:, :-1]).sum(1)
    return repeats / counted.sum(1).clamp(min=1)
