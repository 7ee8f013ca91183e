"""Where sequences begin and end: by their masks, never by the padding token, which may well be the end token too."""

import torch
from torch import Tensor


def position_ids(attention_mask: Tensor) -> Tensor:
    """Position of each token counted from the first real one, whichever side is padded.

    Args:
        attention_mask: (B, T) int64 or bool, 1 = real token.

    Returns:
        (B, T) int64; 0 on padding to the left.
    """
    return (attention_mask.cumsum(-1) - 1).clamp_min(0)


def last_token_index(attention_mask: Tensor) -> Tensor:
    """Index of the last real token of each row.

    Args:
        attention_mask: (B, T) int64 or bool, 1 = real token; at least one in each row.

    Returns:
        (B,) int64.
    """
    real = attention_mask.bool()
    assert real.any(-1).all(), "a row has no real token"
    return (real * torch.arange(real.shape[-1], device=real.device)).amax(-1)


def pad_left(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one tensor, padded in front: prompts, so that responses start in the same column.

    Args:
        rows: B lists of tokens.
        pad_id: What stands on padding.

    Returns:
        ids (B, T) int64 and attention mask (B, T) int64, T being the longest row.
    """
    width = max(map(len, rows))
    ids = [[pad_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


def pad_right(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one tensor, padded behind. Arguments and results as in `pad_left`."""
    width = max(map(len, rows))
    ids = [row + [pad_id] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


def mask_through_first_stop(ids: Tensor, stop_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The part of each row up to and including its first stop token.

    Args:
        ids: (B, R) int64.
        stop_ids: (any number,) int64, on the device of `ids`.

    Returns:
        mask (B, R) bool, all True in a row without a stop token, and ended (B,) bool, whether there is one.
    """
    stops = torch.isin(ids, stop_ids)
    stops_before = stops.cumsum(-1) - stops.long()
    return stops_before == 0, stops.any(-1)
