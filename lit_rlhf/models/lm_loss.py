"""The language-modeling loss, of supervised fine-tuning and the pretraining mix."""

from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.functional import position_ids, token_logprobs
from lit_rlhf.packing.selective_logits import logits_at_positions
from lit_rlhf.packing.varlen_attention import varlen_inputs


def causal_lm_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    loss_mask: Tensor,
    attention_mask: Tensor,
    sequence_lengths: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the next-token cross-entropy `-sum log p(x_t | x_<t)` over the targets.

    The last term of InstructGPT's Eq. 2 with the sign of a loss, not normalized.

    Args:
        model: A causal language model, sharded by FSDP2 or not.
        input_ids: (B, T) int64.
        loss_mask: (B, T) bool, True where the token itself is a target; never column 0, which nothing predicts.
        attention_mask: (B, T), 1 = real token.
        sequence_lengths: Tokens of each sequence packed into the one row (B = 1); None for padded rows.

    Returns:
        The sum over targets in nats (0-d float32) and the number of targets (0-d int64).
    """
    assert not loss_mask[:, 0].any(), "the first token of a row cannot be a target"
    if sequence_lengths is None:
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids(attention_mask)}
    else:
        inputs = varlen_inputs(model, sequence_lengths, input_ids.device)
    row, column = loss_mask.nonzero(as_tuple=True)
    logits = logits_at_positions(model, row, column - 1, input_ids=input_ids, **inputs)  # (n, V)
    return -token_logprobs(logits[None], input_ids[row, column][None]).sum(), loss_mask.sum()
