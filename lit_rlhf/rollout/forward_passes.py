"""Forward passes over prompts and responses: log-probs, entropy and values of response tokens.

Shapes: `B` episodes, `R` response, `T` prompt and response, `n` response tokens of the batch, `V` vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.functional import token_entropy
from lit_rlhf.generation.sampling import SamplingParams, sampled_token_logprobs
from lit_rlhf.generation.stopping import stop_token_ids
from lit_rlhf.models.scalar_model import ScalarModel
from lit_rlhf.packing.packed_batch import PackedBatch, length_bucketed_chunks, pack_batch, response_logits
from lit_rlhf.progress import report_progress


def response_logprobs(
    policy: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_width: int,
    sampling: SamplingParams,
    stop_ids: Tensor | None = None,
) -> Tensor:
    """Return the log-probs of response tokens, (B, R) float32, as `sampled_token_logprobs` defines them; 0 on padding.

    Args:
        policy: a causal language model, sharded by FSDP2 or not.
        input_ids: (B, T) int64: left-padded prompt, then right-padded response.
        attention_mask: (B, T).
        response_width: R.
        sampling: how the responses were sampled.
        stop_ids: the tokens that ended them; by default the `stop_token_ids` of `policy`.
    """
    return packed_logprobs(policy, pack_batch(input_ids, attention_mask, response_width, policy), sampling, stop_ids)


def packed_logprobs(
    policy: PreTrainedModel, batch: PackedBatch, sampling: SamplingParams, stop_ids: Tensor | None = None
) -> Tensor:
    """Return the log-probs of response tokens of a packed batch, see `response_logprobs`."""
    stop_ids = stop_token_ids(policy, sampling) if stop_ids is None else stop_ids
    logits = response_logits(policy, batch)  # (n, V)
    step = batch.response_index[1]
    return batch.scatter_to_responses(sampled_token_logprobs(logits, batch.response_tokens, sampling, step, stop_ids))


def logprobs_and_entropy(
    policy: PreTrainedModel, batch: PackedBatch, sampling: SamplingParams
) -> tuple[Tensor, Tensor]:
    """Return log-probs as `packed_logprobs` does, and the entropy of each token's distribution in nats, (B, R) each.

    The entropy is of the full distribution at the sampling temperature, whatever was filtered at sampling.
    """
    logits = response_logits(policy, batch)  # (n, V)
    step = batch.response_index[1]
    logprobs = sampled_token_logprobs(logits, batch.response_tokens, sampling, step, stop_token_ids(policy, sampling))
    entropy = token_entropy(logits[:, None], sampling.temperature or 1.0).squeeze(1)
    return batch.scatter_to_responses(logprobs), batch.scatter_to_responses(entropy)


def response_values(critic: ScalarModel, batch: PackedBatch) -> Tensor:
    """Return the value of the state before each response token, (B, R) float32; 0 on padding."""
    values = critic(batch.input_ids, batch.attention_mask, batch.position_ids, batch.predictor_index, batch.sequences)
    return batch.scatter_to_responses(values)


@torch.no_grad()
def map_in_chunks(
    compute: Callable[[Tensor, Tensor, int], Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    response_width: int,
    batch_size: int,
) -> Tensor:
    """Apply `compute(input_ids, attention_mask, response_width)` to chunks of similar length; restore the row order.

    Args:
        compute: returns (b, r) for the r response columns of a chunk.
        input_ids: (B, T).
        attention_mask: (B, T).
        response_width: R.
        batch_size: rows per chunk.

    Returns:
        (B, R) float32, 0 in columns that a chunk left out.
    """
    result, done = torch.zeros(len(input_ids), response_width, device=input_ids.device), 0
    for chunk, columns, width in length_bucketed_chunks(input_ids, attention_mask, response_width, batch_size):
        result[chunk, :width] = compute(input_ids[chunk][:, columns], attention_mask[chunk][:, columns], width).float()
        done += len(chunk)
        report_progress("forward", done, len(input_ids))
    return result
