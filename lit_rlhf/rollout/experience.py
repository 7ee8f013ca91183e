"""The data of a rollout. Shapes: `B` episodes, `P` prompt, `R` response, `T = P + R`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.records import Message, to_messages
from lit_rlhf.generation.base import GenerationOutput

REFERENCE_COLUMNS = ("reference", "completion")


class Episodes(NamedTuple):
    """Prompts with their responses, as a reward scores them: texts, dataset rows, and ids of the policy's tokenizer."""

    input_ids: Tensor  # (B, T) int64: left-padded prompt, then right-padded response
    attention_mask: Tensor  # (B, T) int64
    prompts: list[str]
    responses: list[str]  # without special tokens
    rows: list[dict[str, Any]]  # the prompts' dataset rows with their metadata columns
    prompt_width: int  # P: the first P columns are the prompt's
    training: bool = True  # False in validation: a reward that keeps statistics counts training episodes only
    messages: list[list[Message]] | None = None  # the prompts as conversations, whatever the policy's template

    def conversations(self) -> list[list[Message]]:
        """Return the prompts as conversations; without `messages`, each as a turn of the user."""
        return [to_messages(prompt) for prompt in self.messages or self.prompts]

    def select(self, rows: slice) -> "Episodes":
        """Return some of the episodes."""
        messages = None if self.messages is None else self.messages[rows]
        return self._replace(
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            prompts=self.prompts[rows],
            responses=self.responses[rows],
            rows=self.rows[rows],
            messages=messages,
        )

    def token_ids(self, row: int) -> tuple[list[int], list[int]]:
        """Return prompt and response of a row without padding; the response with its end token, if it has one."""
        kept, width = self.attention_mask[row].bool(), self.prompt_width
        prompt, response = (
            self.input_ids[row, part][kept[part]].tolist() for part in (slice(width), slice(width, None))
        )
        return prompt, response


class Trajectories(NamedTuple):
    """All episodes of an iteration, of all ranks, in an order that does not depend on the number of ranks."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64
    response_mask: Tensor  # (B, R) bool
    old_logprobs: Tensor  # (B, R) float32, policy at sampling: as sampled, or recomputed by the update's forward pass
    ref_logprobs: Tensor  # (B, R) float32, reference policy
    values: Tensor  # (B, R) float32, critic before each token; 0 without a critic
    scores: Tensor  # (B,) float32, of the reward
    finished: Tensor  # (B,) bool, whether the response ended before the length limit
    rollout_logprobs: Tensor  # (B, R) float32, policy's log-probs as sampled by the generator
    prompt_index: Tensor  # (B,) int64, index of the prompt in the iteration; its samples are consecutive rows


class Experience(NamedTuple):
    """One micro-batch of the PPO update."""

    input_ids: Tensor  # (B, T) int64: left-padded prompt, then right-padded response
    attention_mask: Tensor  # (B, T) int64
    response_mask: Tensor  # (B, R) bool
    old_logprobs: Tensor  # (B, R) float32, policy at sampling
    old_values: Tensor  # (B, R) float32, critic at sampling
    advantages: Tensor  # (B, R) float32, of the advantage estimator
    returns: Tensor | None  # (B, R) float32; None without a critic
    normalizer: Tensor  # () float32, response tokens of the full minibatch, accumulation and ranks included
    rollout_metrics: dict[str, Tensor]  # in the first micro-batch of an iteration; empty in the others


def repeat_prompts(prompts: PromptBatch, num_samples: int) -> PromptBatch:
    """Return every prompt `num_samples` times in consecutive rows, with the indices of its episodes."""
    if num_samples == 1:
        return prompts
    index = prompts.index[:, None] * num_samples + torch.arange(num_samples, device=prompts.index.device)
    return PromptBatch(
        input_ids=prompts.input_ids.repeat_interleave(num_samples, 0),
        attention_mask=prompts.attention_mask.repeat_interleave(num_samples, 0),
        rows=[row for row in prompts.rows for _ in range(num_samples)],
        index=index.flatten(),
        messages=[messages for messages in prompts.messages for _ in range(num_samples)],
    )


def make_episodes(prompts: PromptBatch, output: GenerationOutput, tokenizer: Tokenizer, training: bool) -> Episodes:
    """Concatenate prompts and responses, on the device of the responses.

    Args:
        prompts: one row per response.
        output: the responses.
        tokenizer: the policy's.
        training: False in validation.
    """
    mask = output.response_mask
    return Episodes(
        input_ids=torch.cat([prompts.input_ids.to(mask.device), output.response_ids], 1),
        attention_mask=torch.cat([prompts.attention_mask.to(mask.device), mask.to(prompts.attention_mask.dtype)], 1),
        prompts=[row["prompt"] for row in prompts.rows],
        responses=tokenizer.batch_decode(output.response_ids, skip_special_tokens=True),
        rows=prompts.rows,
        prompt_width=prompts.input_ids.shape[1],
        training=training,
        messages=list(prompts.messages) or None,
    )


def sample_rows(episodes: Episodes, scores: Tensor, kl: Tensor, count: int = 16) -> list[dict[str, Any]]:
    """Return the first episodes as rows of a samples table.

    Their columns are prompt, reference (the answer in the data, if there is one), response, score, and KL in nats.
    """
    rows = list(zip(episodes.prompts, episodes.rows, episodes.responses, scores, kl))[:count]
    return [
        {"prompt": p, **read_reference(row), "response": r, "score": float(s), "kl": float(k)}
        for p, row, r, s, k in rows
    ]


def read_reference(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the answer to a prompt that its dataset row has, under "reference"; nothing if it has none."""
    answers = (row.get(column) for column in REFERENCE_COLUMNS)
    return next(({"reference": answer} for answer in answers if isinstance(answer, str)), {})
