"""Scores of token rows, in chunks of like length."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_rlhf.functional import pad_right
from lit_rlhf.models.scalar_model import ScalarModel


@torch.no_grad()
def score_rows(model: ScalarModel, rows: Sequence[list[int]], pad_id: int, batch_size: int = 64) -> Tensor:
    """Return the score of each row at its last token, in order.

    Args:
        model: the reward model; dropout is off within the call.
        rows: n token rows, each at least one token.
        pad_id: what fills a batch.
        batch_size: rows a forward pass.

    Returns:
        (n,) float32 on the CPU.
    """
    training, device = model.training, model.shift.device
    model.eval()
    scores = torch.empty(len(rows), dtype=torch.float32)  # whatever the default is under a precision such as bf16-true
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        ids, mask = pad_right([rows[place] for place in chunk], pad_id)
        scores[chunk] = model.score(ids.to(device), mask.to(device)).cpu()
    model.train(training)
    return scores
