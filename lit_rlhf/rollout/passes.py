"""Forward passes over prompt + response: log-probs, values and scores at the positions that a loss reads."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.models.layout import Layout, lay_out, logits_at
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
    return logprobs_of(policy, lay_out(policy, input_ids, attention_mask, response_width), sampling, ends)


def response_values(critic: ScalarModel, input_ids: Tensor, attention_mask: Tensor, response_width: int) -> Tensor:
    """Return the value before each response token, (B, R) float32: what is expected with the token not yet chosen.

    0 on padding.
    """
    return values_of(critic, lay_out(critic.model, input_ids, attention_mask, response_width))


def logprobs_of(policy: PreTrainedModel, layout: Layout, sampling: Sampling, ends: Tensor | None = None) -> Tensor:
    """Return what `response_logprobs` does, of a batch that is laid out."""
    ends = end_ids(policy, sampling) if ends is None else ends
    logits = logits_at(policy, layout)  # (n, V)
    step = layout.response_mask.nonzero(as_tuple=True)[1]
    return layout.spread(drawn_logprobs(logits, layout.tokens, sampling, step, ends))


def values_of(critic: ScalarModel, layout: Layout) -> Tensor:
    """Return what `response_values` does, of a batch that is laid out."""
    at = layout.line, layout.column
    return layout.spread(critic(layout.input_ids, layout.attention_mask, layout.position_ids, at))


def by_length(
    attention_mask: Tensor, response_width: int, rows: int, together: int = 1
) -> Iterator[tuple[Tensor, slice, int]]:
    """Cut a batch into chunks of rows of like length, with the columns that are padding in all of them left out.

    Args:
        attention_mask: (B, T).
        response_width: R.
        rows: rows a chunk.
        together: rows that stay behind each other: so many samples of each prompt.

    Yields:
        the rows (b,), the columns of (B, T) to keep, and the response width that remains.
    """
    prompt_width = attention_mask.shape[1] - response_width
    prompts = attention_mask[:, :prompt_width].sum(1)
    responses = attention_mask[:, prompt_width:].sum(1)
    places = torch.arange(len(attention_mask), device=attention_mask.device).view(-1, together)
    order = places[torch.argsort((prompts + responses).view(-1, together).sum(1))].flatten()
    for chunk in torch.split(order, rows):
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
    together: int = 1,
) -> Tensor:
    """Apply `compute(input_ids, attention_mask, response_width)` to chunks of like length and put the rows back.

    Args:
        compute: gives (b, r) for the r response columns of a chunk.
        input_ids: (B, T).
        attention_mask: (B, T).
        response_width: R.
        rows: rows a chunk.
        together: rows that stay behind each other: so many samples of each prompt.

    Returns:
        (B, R) float32, 0 in columns that a chunk left out.
    """
    result = torch.zeros(len(input_ids), response_width, device=input_ids.device)
    for chunk, columns, width in by_length(attention_mask, response_width, rows, together):
        result[chunk, :width] = compute(input_ids[chunk][:, columns], attention_mask[chunk][:, columns], width).float()
    return result
