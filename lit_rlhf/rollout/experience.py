"""What passes through a rollout. Shape letters: B sequences, P prompt, R response, T = P + R."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.data.batches import PromptBatch


class GenerationOutput(NamedTuple):
    """What a generator returns."""

    response_ids: Tensor  # (B, R) int64, right-padded
    response_mask: Tensor  # (B, R) bool, True through the end token, which is an action
    logprobs: Tensor  # (B, R) float32, of the tokens under the distribution they were drawn from; 0 outside the mask
    finished: Tensor  # (B,) bool, whether an end token was drawn


class Episodes(NamedTuple):
    """What a reward source sees: texts, the dataset rows, and ids of the policy's tokenizer."""

    input_ids: Tensor  # (B, T) int64: left-padded prompt, then right-padded response
    attention_mask: Tensor  # (B, T) int64
    prompts: list[str]
    responses: list[str]  # without special tokens
    rows: list[dict[str, Any]]  # the prompt rows with their metadata columns
    prompt_width: int  # P: the first P columns are the prompt's
    training: bool = True  # False in validation: a source that keeps statistics counts training alone

    def token_ids(self, row: int) -> tuple[list[int], list[int]]:
        """Return prompt and response of a row without padding; the response with its end token, where it has one."""
        kept = self.attention_mask[row].bool()
        width = self.prompt_width
        prompt, response = (
            self.input_ids[row, part][kept[part]].tolist() for part in (slice(width), slice(width, None))
        )
        return prompt, response


class Trajectories(NamedTuple):
    """All episodes of an iteration, of all ranks, in one order that does not depend on the world size."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64
    response_mask: Tensor  # (B, R) bool
    old_logprobs: (
        Tensor  # (B, R) float32, policy at sampling: as drawn, or recomputed by the pass that the update makes
    )
    ref_logprobs: Tensor  # (B, R) float32, reference policy
    values: Tensor  # (B, R) float32, critic before each token; 0 without a critic
    scores: Tensor  # (B,) float32, of the reward source
    finished: Tensor  # (B,) bool
    rollout_logprobs: Tensor  # (B, R) float32, policy's log-probs as they were drawn
    prompt_index: Tensor  # (B,) int64, place of the prompt in the iteration; its samples are consecutive rows


class Experience(NamedTuple):
    """One micro-batch of the PPO update."""

    input_ids: Tensor  # (B, T) int64: left-padded prompt, then right-padded response
    attention_mask: Tensor  # (B, T) int64
    response_mask: Tensor  # (B, R) bool
    old_logprobs: Tensor  # (B, R) float32, policy at sampling
    old_values: Tensor  # (B, R) float32, critic at sampling
    advantages: Tensor  # (B, R) float32, as the estimator gave them
    returns: Tensor | None  # (B, R) float32; None without a critic
    normalizer: Tensor  # () float32, response tokens of the whole minibatch: accumulation and ranks included
    rollout_metrics: dict[str, Tensor]  # of the rollout, in the first micro-batch of an iteration; empty in the others


def repeat_prompts(prompts: PromptBatch, num_samples: int) -> PromptBatch:
    """Return every prompt `num_samples` times in a row, with the places of its episodes."""
    if num_samples == 1:
        return prompts
    places = prompts.index[:, None] * num_samples + torch.arange(num_samples, device=prompts.index.device)
    return PromptBatch(
        input_ids=prompts.input_ids.repeat_interleave(num_samples, 0),
        attention_mask=prompts.attention_mask.repeat_interleave(num_samples, 0),
        rows=[row for row in prompts.rows for _ in range(num_samples)],
        index=places.flatten(),
    )


def make_episodes(prompts: PromptBatch, rollout: GenerationOutput, tokenizer: Tokenizer, training: bool) -> Episodes:
    """Return prompts with their responses behind them, as a reward source sees them, on the rollout's device.

    Args:
        prompts: what was answered.
        rollout: the answers.
        tokenizer: the policy's.
        training: False in validation.
    """
    mask = rollout.response_mask
    return Episodes(
        input_ids=torch.cat([prompts.input_ids.to(mask.device), rollout.response_ids], 1),
        attention_mask=torch.cat([prompts.attention_mask.to(mask.device), mask.to(prompts.attention_mask.dtype)], 1),
        prompts=[row["prompt"] for row in prompts.rows],
        responses=tokenizer.batch_decode(rollout.response_ids, skip_special_tokens=True),
        rows=prompts.rows,
        prompt_width=prompts.input_ids.shape[1],
        training=training,
    )


def sample_rows(episodes: Episodes, scores: Tensor, kl: Tensor, count: int = 16) -> list[dict[str, Any]]:
    """Return the first episodes as rows for a table of samples: prompt, response, score, KL in nats."""
    rows = list(zip(episodes.prompts, episodes.responses, scores, kl))[:count]
    return [{"prompt": p, "response": r, "score": float(s), "kl": float(k)} for p, r, s, k in rows]
