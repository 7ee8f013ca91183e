"""Best-of-n with a reward source: the baseline that a PPO run should be held against, at its KL."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.data.collation import TokenizedPrompt, collate_prompts
from lit_rlhf.errors import UserError
from lit_rlhf.functional import best_of_n_kl, expected_best_of_k
from lit_rlhf.generation.generators import CachedGenerator
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.generation.stopping import stop_string_matcher
from lit_rlhf.models.loading import max_positions
from lit_rlhf.rewards import Reward
from lit_rlhf.rollout.experience import make_episodes, repeat_prompts


class ScoredCandidates(NamedTuple):
    """The n responses to one prompt."""

    row: dict[str, Any]  # "prompt" (the text as the model sees it) and every metadata column
    responses: list[str]
    scores: list[float]

    @property
    def best(self) -> int:
        """The place of the best; of several the first."""
        return self.scores.index(max(self.scores))


class Curve(NamedTuple):
    """What the best of k scores, for k = 1 to n."""

    k: list[int]
    score: list[float]  # mean over prompts
    error: list[float]  # standard error of that mean, by the spread between prompts
    kl_bound: list[float]  # nats a response, at most


def check_max_positions(config: PretrainedConfig, prompts: Sequence[TokenizedPrompt], sampling: SamplingParams) -> None:
    """Refuse prompts that leave no room for a response in the model's positions."""
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
    source: Reward,
    sampling: SamplingParams,
    n: int,
    seed: int,
    batch_size: int = 64,
) -> Iterator[ScoredCandidates]:
    """Yield n scored responses to each prompt, in order.

    A response depends on the seed, the prompt's place and its own number alone, not on `batch_size`.

    Args:
        policy: what is sampled.
        tokenizer: its tokenizer.
        prompts: tokenised prompts.
        source: scores a response; it has been prepared.
        sampling: how they are drawn, and the score of a response that did not end.
        n: responses a prompt.
        seed: of the sampling.
        batch_size: responses decoded at once; a prompt's n stay together.
    """
    at_once = max(batch_size // n, 1)
    for start in range(0, len(prompts), at_once):
        places = range(start, min(start + at_once, len(prompts)))
        batch = collate_prompts([prompts[place] for place in places], list(places), tokenizer.pad_token_id)
        ids, mask = batch.input_ids.to(policy.device), batch.attention_mask.to(policy.device)
        noise = torch.cat([sampling_uniforms(n, sampling.max_new_tokens, seed, place, 5) for place in places])
        stops = stop_string_matcher(tokenizer, sampling)
        rollout = CachedGenerator(batch_size).generate(policy, ids, mask, noise, sampling, stops)
        episodes = make_episodes(repeat_prompts(batch, n), rollout, tokenizer, training=False)
        scores = sampling.apply_missing_eos(source.score(episodes).float(), rollout.finished)
        for number, place in enumerate(places):
            own = slice(number * n, (number + 1) * n)
            yield ScoredCandidates(prompts[place].row, episodes.responses[own], scores[own].tolist())


def best_of_n_curve(scores: Tensor) -> Curve:
    """Return what the best of k responses scores, for every k to n, beside the KL that it costs at most.

    Args:
        scores: (B, n), of n responses to each of B prompts.
    """
    count, n = scores.shape
    estimates, k = expected_best_of_k(scores), torch.arange(1, n + 1)
    error = estimates.std(0) / count**0.5 if count > 1 else torch.zeros(n)
    return Curve(k.tolist(), estimates.mean(0).tolist(), error.tolist(), best_of_n_kl(k).tolist())
