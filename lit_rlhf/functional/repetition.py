"""How much a response repeats itself."""

import torch
from torch import Tensor

NGRAM = 3  # three ids of up to 21 bits fit into one 64-bit number, so that equal numbers are equal sequences


def repeated_ngram_fraction(ids: Tensor, mask: Tensor) -> Tensor:
    """Share of a response's sequences of three tokens that occurred in it before.

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
    # what does not count gets a negative number of its own: it repeats nothing
    own = -1 - torch.arange(width, device=ids.device).expand_as(keys)
    ordered = torch.where(counted, keys, own).sort(1).values
    repeats = (ordered[:, 1:] == ordered[:, :-1]).sum(1)
    return repeats / counted.sum(1).clamp(min=1)
