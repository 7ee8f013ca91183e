"""Sampling: its settings, the noise, and a token by inverse transform sampling.

Shapes: `B` rows, `V` vocabulary, `n` tokens, `R` response.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.functional import apply_top_k_top_p, token_logprobs, top_k_top_p_threshold
from lit_rlhf.functional.logprobs import scaled_logits

_BLOCK = 64  # tokens per block of the two-level cumulative sum


@dataclass
class MissingEOS:
    """What the score of a response becomes that did not finish within `max_new_tokens`. Set one of the two.

    Args:
        score: replaces the score (Ziegler et al., 2019: -1), on the scale of the reward.
        penalty: is subtracted from the score.
    """

    score: float | None = None
    penalty: float | None = None

    def __post_init__(self) -> None:
        """Refuse both, and neither."""
        if (self.score is None) == (self.penalty is None):
            raise UserError(
                "sampling.missing_eos takes one of score and penalty; to leave scores as they are set it to null"
            )

    def apply(self, scores: Tensor) -> Tensor:
        """Return the scores of responses that did not finish, (B,)."""
        return torch.full_like(scores, self.score) if self.score is not None else scores - (self.penalty or 0.0)


@dataclass
class SamplingParams:
    """How responses are sampled: by default from the full distribution.

    With `top_k`, `top_p` or `min_new_tokens`, log-probs are those of the remaining, renormalized distribution: at
    sampling, of the reference, and in the update. Each model filters by its own logits, and never filters a token that
    was sampled. So the ratio starts at 1 and the KL at 0, and both stay finite. The price: where a model would filter
    the sampled token, its true probability is 0, and the token's share among the remaining ones is taken instead. From
    the full distribution, the default, none of this arises.

    Args:
        max_new_tokens: largest number of tokens of a response, the end token included.
        temperature: divides the logits at sampling, in the policy's and reference's log-probs and in the update. 0 is
            greedy decoding, for evaluation only.
        top_k: sample from this many most likely tokens.
        top_p: sample from the fewest most likely tokens of at least this total probability (after `top_k`).
        min_new_tokens: smallest number of tokens of a response, the end token included: until then no end token is
            sampled. A stop string ends a response at any length.
        stop_token_ids: tokens that end a response, in addition to the model's own (see `stopping.stop_token_ids`).
            They are actions, and part of the response.
        stop_strings: texts that end a response with the token that completes them. They are part of the response.
        missing_eos: what the score of a response becomes that did not finish within `max_new_tokens`. None leaves it;
            the paper is silent.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_new_tokens: int = 1
    stop_token_ids: list[int] = field(default_factory=list)
    stop_strings: list[str] = field(default_factory=list)
    missing_eos: MissingEOS | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.max_new_tokens < 1:
            raise UserError(f"sampling.max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise UserError(f"sampling.temperature must not be negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"sampling.top_k must be at least 1, got {self.top_k}; null samples from all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p must lie in (0, 1], got {self.top_p}; null samples from all tokens")
        if not 1 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(
                f"sampling.min_new_tokens must lie between 1 and max_new_tokens {self.max_new_tokens}, "
                f"got {self.min_new_tokens}"
            )
        if "" in self.stop_strings:
            raise UserError("sampling.stop_strings holds an empty text, which would end every response at once")

    @property
    def filters_tokens(self) -> bool:
        """Whether tokens are filtered by their rank or probability."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)

    def distribution(self) -> dict[str, Any]:
        """Return the settings that log-probs depend on."""
        names = ("temperature", "top_k", "top_p", "min_new_tokens", "stop_token_ids")
        return {name: getattr(self, name) for name in names}

    def apply_missing_eos(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Return the scores (B,) with `missing_eos` applied where a response did not finish, (B,) bool."""
        return scores if self.missing_eos is None else torch.where(finished, scores, self.missing_eos.apply(scores))


def sampling_uniforms(rows: int, length: int, seed: int, *key: int) -> Tensor:
    """Return (rows, length) float64 uniforms in [0, 1) that depend on the seed and the key (iteration, ...) alone.

    Every rank draws the full table and uses its own rows, so a response depends neither on the number of ranks nor on
    the order of the batch, nor on which rows finished before it.
    """
    return torch.rand(rows, length, dtype=torch.float64, generator=make_generator(seed, *key), device="cpu")


def make_generator(seed: int, *key: int) -> torch.Generator:
    """Return a CPU random generator for (seed, key): the same numbers for the same key, unrelated ones otherwise."""
    mixed = seed & 0xFFFFFFFF
    for number in key:
        mixed = (mixed * 6364136223846793005 + number * 1442695040888963407 + 1013904223) & 0x7FFFFFFFFFFFFFFF
    return torch.Generator().manual_seed(mixed)


def sample_tokens(
    logits: Tensor, uniforms: Tensor, sampling: SamplingParams, step: int, stop_token_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Sample one token per row.

    Args:
        logits: (B, V) of any dtype.
        uniforms: (B,) in [0, 1).
        sampling: temperature 0 takes the most likely token, with log-probs at temperature 1.
        step: tokens that the responses have so far.
        stop_token_ids: (any number,) int64, the tokens that end a response.

    Returns:
        tokens (B,) int64 and their log-probs (B,) float32, under the distribution they were sampled from.
    """
    if step + 1 < sampling.min_new_tokens:
        logits = logits.index_fill(-1, stop_token_ids, -torch.inf)
    if sampling.temperature == 0:
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        tokens = logprobs.argmax(-1)
        return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)
    if sampling.filters_tokens:
        threshold = top_k_top_p_threshold(logits[:, None], sampling.temperature, sampling.top_k, sampling.top_p)
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    return sample_inverse_cdf(scaled_logits(logits, sampling.temperature), uniforms)


def sample_inverse_cdf(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return per row the first token whose cumulative probability exceeds the uniform, and its log-prob.

    Sums are in float64, over blocks of the vocabulary and then within one block: one cumulative sum over the full
    vocabulary costs more than everything else.
    """
    rows, size = logits.shape
    weights = logits.softmax(-1)  # (B, V); they sum to 1 up to rounding
    if size % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -size % _BLOCK))
    blocks = weights.view(rows, -1, _BLOCK)
    block_cdf = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    total = block_cdf[:, -1:]
    target = uniforms.to(total)[:, None] * total
    block = _first_above(block_cdf, target)  # (B, 1)
    before = torch.nn.functional.pad(block_cdf, (1, 0)).gather(1, block)
    cdf = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    tokens = block * _BLOCK + _first_above(cdf, target - before)
    logprobs = (weights.gather(1, tokens) / total).log()
    return tokens.squeeze(1), logprobs.squeeze(1).float()


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return the first index whose cumulative weight exceeds the target, (B, 1).

    The target is kept below the total, which rounding could lift it to: so the index has a weight above 0.
    """
    last = cumulative[:, -1:]
    below = torch.minimum(target, torch.nextafter(last, last.new_zeros(())))
    return torch.searchsorted(cumulative, below, right=True)


def sampled_token_logprobs(
    logits: Tensor, tokens: Tensor, sampling: SamplingParams, step: Tensor, stop_token_ids: Tensor
) -> Tensor:
    """Return the log-probs of response tokens under the distributions they were sampled from.

    Args:
        logits: (n, V).
        tokens: (n,) int64.
        sampling: as at sampling; temperature 0 counts as 1.
        step: (n,) int64, the number of tokens before each in its response.
        stop_token_ids: as in `sample_tokens`.

    Returns:
        (n,) float32, in nats. Differentiable once.
    """
    temperature = sampling.temperature or 1.0
    if sampling.min_new_tokens > 1:
        is_stop = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        is_stop = is_stop.index_fill(0, stop_token_ids, True)
        logits = logits.masked_fill((step + 1 < sampling.min_new_tokens)[:, None] & is_stop, -torch.inf)
    row, sampled = logits[None], tokens[None]  # (1, n, V), (1, n)
    if sampling.filters_tokens and sampling.temperature:
        row = apply_top_k_top_p(row, sampled, temperature, sampling.top_k, sampling.top_p)
    return token_logprobs(row, sampled, temperature)[0]
