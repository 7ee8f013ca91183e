"""Scores of token rows, in batches of similar length."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_rlhf.functional import pad_right
from lit_rlhf.models.scalar_model import ScalarModel
from lit_rlhf.progress import report_progress


@torch.no_grad()
def score_rows(model: ScalarModel, rows: Sequence[list[int]], pad_id: int, batch_size: int = 64) -> Tensor:
    """Compute the score of each row at its last token, in the order of the rows.

    Args:
        model: The reward model, which is in evaluation mode within the call.
        rows: n token rows, each of at least one token.
        pad_id: Padding id.
        batch_size: Rows per forward pass.

    Returns:
        (n,) float32 on the CPU.
    """
    training, device = model.training, model.shift.device
    model.eval()
    scores = torch.empty(len(rows), dtype=torch.float32)  # bf16-true changes the default dtype
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        ids, mask = pad_right([rows[index] for index in chunk], pad_id)
        scores[chunk] = model.score(ids.to(device), mask.to(device)).cpu()
        report_progress("score", start + len(chunk), len(order))
    model.train(training)
    return scores
