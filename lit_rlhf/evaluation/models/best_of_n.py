"""Best-of-n sampling with a reward: the baseline of a PPO run at equal KL."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.data.collation import TokenizedPrompt, collate_prompts
from lit_rlhf.errors import UserError
from lit_rlhf.functional import best_of_n_kl, expected_best_of_k
from lit_rlhf.generation import CachedGenerator
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.generation.stopping import stop_string_matcher
from lit_rlhf.models.loading import max_positions
from lit_rlhf.rewards import Reward
from lit_rlhf.rollout.experience import make_episodes, repeat_prompts


class ScoredCandidates(NamedTuple):
    """The n responses to one prompt with their scores."""

    row: dict[str, Any]  # "prompt" (the rendered text) and every metadata column
    responses: list[str]
    scores: list[float]

    @property
    def best_index(self) -> int:
        """Index of the highest score; the first of equal ones."""
        return self.scores.index(max(self.scores))


class BestOfNCurve(NamedTuple):
    """Expected score of the best of k responses, for k = 1 to n."""

    k: list[int]
    score: list[float]  # mean over prompts
    standard_error: list[float]  # of that mean, over prompts
    kl_bound: list[float]  # upper bound of the KL, nats per response


def check_fits_max_positions(
    config: PretrainedConfig, prompts: Sequence[TokenizedPrompt], sampling: SamplingParams
) -> None:
    """Raise a UserError if the longest prompt and a response exceed the model's positions."""
    limit, longest = max_positions(config), max(len(prompt.input_ids) for prompt in prompts)
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise UserError(
            f"the longest prompt ({longest} tokens) and a response of {sampling.max_new_tokens} do not fit into the "
            f"model's {limit} positions; lower the length of responses or of prompts"
        )


def sample_candidates(
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[TokenizedPrompt],
    reward: Reward,
    sampling: SamplingParams,
    n: int,
    seed: int,
    batch_size: int = 64,
) -> Iterator[ScoredCandidates]:
    """Yield n scored responses to each prompt, in order.

    A response depends on the seed, the prompt's index and the response's number alone, not on `batch_size`.

    Args:
        policy: the model that generates.
        tokenizer: its tokenizer.
        prompts: tokenized prompts.
        reward: scores the responses; `prepare` has been called.
        sampling: distribution, length, and the score of a response without an end token.
        n: responses per prompt.
        seed: of the sampling.
        batch_size: responses decoded in one batch; the n responses to a prompt share a batch.

    Raises:
        UserError: a score is not a finite number.
    """
    prompts_per_batch = max(batch_size // n, 1)
    for start in range(0, len(prompts), prompts_per_batch):
        indices = range(start, min(start + prompts_per_batch, len(prompts)))
        batch = collate_prompts([prompts[index] for index in indices], list(indices), tokenizer.pad_token_id)
        uniforms = torch.cat([sampling_uniforms(n, sampling.max_new_tokens, seed, index, 5) for index in indices])
        matcher = stop_string_matcher(tokenizer, sampling)
        rollout = CachedGenerator(batch_size).generate(policy, batch.to(policy.device), sampling, uniforms, matcher)
        episodes = make_episodes(repeat_prompts(batch, n), rollout, tokenizer, training=False)
        scores = reward.score(episodes).float()
        check_finite(scores, episodes.prompts)
        scores = sampling.apply_missing_eos(scores, rollout.finished)
        for position, index in enumerate(indices):
            rows = slice(position * n, (position + 1) * n)
            yield ScoredCandidates(prompts[index].row, episodes.responses[rows], scores[rows].tolist())


def check_finite(scores: Tensor, prompts: Sequence[str]) -> None:
    """Raise a UserError that names the first prompt with a score, (B,), that is not a finite number."""
    lost = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if lost:
        raise UserError(
            f"reward: {len(lost):,} of {len(scores):,} scores are not finite, first for the prompt "
            f"{prompts[lost[0]]!r:.200}; no best response can be chosen by them"
        )


def compute_best_of_n_curve(scores: Tensor) -> BestOfNCurve:
    """Return the expected score of the best of k responses and the bound of its KL, for k = 1 to n.

    Args:
        scores: (B, n) scores of n responses to each of B prompts.
    """
    count, n = scores.shape
    estimates, k = expected_best_of_k(scores), torch.arange(1, n + 1)
    error = estimates.std(0) / count**0.5 if count > 1 else torch.zeros(n)
    return BestOfNCurve(k.tolist(), estimates.mean(0).tolist(), error.tolist(), best_of_n_kl(k).tolist())
