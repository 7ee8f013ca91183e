"""The language-modelling loss: supervised fine-tuning and the pretraining mix."""

from torch import Tensor

from lit_rlhf.functional.logprobs import token_logprobs
from lit_rlhf.functional.masked import masked_sum


def language_model_loss(logits: Tensor, input_ids: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy `-sum log p(x_t | x_<t)` over the tokens chosen by the mask.

    The last term of InstructGPT's Eq. 2 with the sign of a loss, before any normalisation.

    Args:
        logits: (B, T, V); those at position t predict token t + 1.
        input_ids: (B, T) int64.
        loss_mask: (B, T) bool, True where the token itself is a target. Column 0 is never one: nothing predicts it.

    Returns:
        The sum over targets in nats (0-d float32) and the number of targets (0-d int64).
    """
    assert input_ids.shape == loss_mask.shape
    assert not loss_mask[:, 0].any(), "the first token of a row cannot be a target"
    # Rolling the targets, not slicing the logits, spares a copy of the logits. Column 0 wraps to the end, unmasked.
    targets, is_target = input_ids.roll(-1, dims=1), loss_mask.roll(-1, dims=1)
    return -masked_sum(token_logprobs(logits, targets), is_target), loss_mask.sum()
