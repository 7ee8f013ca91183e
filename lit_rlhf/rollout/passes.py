"""Forward passes over prompt + response: log-probs, values and scores at the positions that a loss reads."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.functional import position_ids
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
    """Return the log-probs of the response tokens, (B, R) float32, as `drawn_logprobs` defines them.

    Args:
        policy: a causal language model, or the strategy's wrapper of one.
        input_ids: (B, T) int64: left-padded prompt, then right-padded response.
        attention_mask: (B, T).
        response_width: R.
        sampling: how the responses were drawn.
        ends: the tokens that ended them; by default the `end_ids` of `policy`.
    """
    logits = policy(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
        logits_to_keep=response_width + 1,
    ).logits  # (B, R + 1, V): the logits at a position predict the token after it
    ends = end_ids(policy, sampling) if ends is None else ends
    return drawn_logprobs(logits[:, :-1], input_ids[:, -response_width:], sampling, ends)


def response_values(critic: ScalarModel, input_ids: Tensor, attention_mask: Tensor, response_width: int) -> Tensor:
    """Return the value before each response token, (B, R) float32: what is expected with the token not yet chosen."""
    return critic(input_ids, attention_mask, response_width + 1)[:, :-1]


def by_length(attention_mask: Tensor, response_width: int, rows: int) -> Iterator[tuple[Tensor, slice, int]]:
    """Cut a batch into chunks of rows of like length, with the columns that are padding in all of them left out.

    Yields:
        the rows (b,), the columns of (B, T) to keep, and the response width that remains.
    """
    prompt_width = attention_mask.shape[1] - response_width
    prompts = attention_mask[:, :prompt_width].sum(1)
    responses = attention_mask[:, prompt_width:].sum(1)
    for chunk in torch.split(torch.argsort(prompts + responses), rows):
        left = prompt_width - int(prompts[chunk].max())
        width = max(int(responses[chunk].max()), 1)
        yield chunk, slice(left, prompt_width + width), width


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
    for chunk, columns, width in by_length(attention_mask, response_width, rows):
        result[chunk, :width] = compute(input_ids[chunk][:, columns], attention_mask[chunk][:, columns], width).float()
    return result
