"""Forward passes over prompt + response: log-probs, values and scores at the positions that a loss reads."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.functional import token_entropy
from lit_rlhf.models.layout import Layout, by_length, lay_out, logits_at
from lit_rlhf.models.scalar import ScalarModel
from lit_rlhf.rollout.endings import end_ids
from lit_rlhf.rollout.sampling import Sampling, drawn_logprobs


def response_logprobs(
    policy: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_width: int,
    sampling: Sampling,
    ends: Tensor | None = None,
) -> Tensor:
    """Return the log-probs of the response tokens, (B, R) float32, as `drawn_logprobs` defines them; 0 on padding.

    Args:
        policy: a causal language model, or the strategy's wrapper of one.
        input_ids: (B, T) int64: left-padded prompt, then right-padded response.
        attention_mask: (B, T).
        response_width: R.
        sampling: how the responses were drawn.
        ends: the tokens that ended them; by default the `end_ids` of `policy`.
    """
    return logprobs_of(policy, lay_out(input_ids, attention_mask, response_width, policy), sampling, ends)


def logprobs_of(policy: PreTrainedModel, layout: Layout, sampling: Sampling, ends: Tensor | None = None) -> Tensor:
    """Return what `response_logprobs` does, of a batch that is laid out."""
    ends = end_ids(policy, sampling) if ends is None else ends
    logits = logits_at(policy, layout)  # (n, V)
    step = layout.response_mask.nonzero(as_tuple=True)[1]
    return layout.spread(drawn_logprobs(logits, layout.tokens, sampling, step, ends))


def logprobs_and_entropy(policy: PreTrainedModel, layout: Layout, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return log-probs as `logprobs_of` does, and the entropy of each token's distribution in nats, (B, R) each.

    The entropy is of the full distribution at the sampling temperature, whatever was ruled out at sampling.
    """
    logits = logits_at(policy, layout)  # (n, V)
    step = layout.response_mask.nonzero(as_tuple=True)[1]
    logprobs = drawn_logprobs(logits, layout.tokens, sampling, step, end_ids(policy, sampling))
    entropy = token_entropy(logits[:, None], sampling.temperature or 1.0).squeeze(1)
    return layout.spread(logprobs), layout.spread(entropy)


def response_values(critic: ScalarModel, layout: Layout) -> Tensor:
    """Return the value before each response token, (B, R) float32: what is expected with the token not yet chosen.

    0 on padding.
    """
    return layout.spread(critic(layout.input_ids, layout.attention_mask, layout.position_ids, layout.predictors))


@torch.no_grad()
def in_chunks(
    compute: Callable[[Tensor, Tensor, int], Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    response_width: int,
    rows: int,
) -> Tensor:
    """Apply `compute(input_ids, attention_mask, response_width)` to chunks of like length and put the rows back.

    Args:
        compute: gives (b, r) for the r response columns of a chunk.
        input_ids: (B, T).
        attention_mask: (B, T).
        response_width: R.
        rows: rows a chunk.

    Returns:
        (B, R) float32, 0 in columns that a chunk left out.
    """
    result = torch.zeros(len(input_ids), response_width, device=input_ids.device)
    for chunk, columns, width in by_length(input_ids, attention_mask, response_width, rows):
        result[chunk, :width] = compute(input_ids[chunk][:, columns], attention_mask[chunk][:, columns], width).float()
    return result
