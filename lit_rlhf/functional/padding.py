"""Padding, and where sequences begin and end: by masks, never by the padding id, which may equal the end token."""

import torch
from torch import Tensor


def position_ids(attention_mask: Tensor) -> Tensor:
    """Count positions from the first real token, whichever side is padded.

    Args:
        attention_mask: (B, T) int64 or bool, 1 = real token.

    Returns:
        (B, T) int64; 0 on left padding.
    """
    return (attention_mask.cumsum(-1) - 1).clamp_min(0)


def last_token_index(attention_mask: Tensor) -> Tensor:
    """Find the last real token of each row.

    Args:
        attention_mask: (B, T) int64 or bool, 1 = real token; at least one in each row.

    Returns:
        (B,) int64.
    """
    real = attention_mask.bool()
    assert real.any(-1).all(), "a row has no real token"
    return (real * torch.arange(real.shape[-1], device=real.device)).amax(-1)


def pad_left(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad rows of tokens on the left, as for prompts, so that responses start in the same column.

    Args:
        rows: B lists of tokens.
        pad_id: Id of the padding.

    Returns:
        Ids (B, T) int64 and attention mask (B, T) int64, where T is the longest row.
    """
    width = max(map(len, rows))
    ids = [[pad_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


def pad_right(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad rows of tokens on the right. Arguments and results as in `pad_left`."""
    width = max(map(len, rows))
    ids = [row + [pad_id] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


def mask_through_first_stop(ids: Tensor, stop_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mask each row up to and including its first stop token.

    Args:
        ids: (B, R) int64.
        stop_ids: (S,) int64, on the device of `ids`; may be empty.

    Returns:
        Mask (B, R) bool, all True in a row without a stop token, and (B,) bool, whether the row has one.
    """
    stops = torch.isin(ids, stop_ids)
    stops_before = stops.cumsum(-1) - stops.long()
    return stops_before == 0, stops.any(-1)
