"""How responses are drawn: the settings, the noise, and a token by inverse transform of it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.functional import apply_top_k_top_p, token_logprobs, top_k_top_p_threshold
from lit_rlhf.functional.logprobs import scaled_logits

_BLOCK = 64  # tokens that are summed together where one is drawn


@dataclass
class MissingEOS:
    """What becomes of the score of a response that did not end. One of the two is set.

    Args:
        score: this score stands in its place (Ziegler et al., 2019: -1). On the scale of the reward source.
        penalty: this penalty is taken off it.
    """

    score: float | None = None
    penalty: float | None = None

    def apply(self, scores: Tensor) -> Tensor:
        """Return what the scores of responses that did not end become."""
        return torch.full_like(scores, self.score) if self.score is not None else scores - (self.penalty or 0.0)

    def __post_init__(self) -> None:
        """Refuse both, and neither."""
        if (self.score is None) == (self.penalty is None):
            raise UserError(
                "sampling.missing_eos takes one of replace and subtract; to leave scores as they are set it to null"
            )


@dataclass
class SamplingParams:
    """How responses are drawn: by default from the full distribution.

    With `top_k`, `top_p` or `min_new_tokens`, log-probs are those of the distribution that is left, renormalised: at
    sampling, of the reference, and in the update. Each model rules out tokens by its own logits, and a token that was
    drawn is never ruled out. So the ratio starts at 1 and the KL at 0, and both stay finite. The price: where a model
    would rule out the token that was drawn, its true probability is 0, and what is taken instead is the token's share
    beside those that stay. From the full distribution, the default, nothing of this arises.

    Args:
        max_new_tokens: most tokens of a response, the end token included.
        temperature: divides the logits when sampling, in the policy's and reference's log-probs and in the update
            alike. 0 is greedy decoding, for evaluation only.
        top_k: draw from the so many likeliest tokens.
        top_p: draw from the fewest likeliest tokens that have this probability together (after `top_k`).
        min_new_tokens: fewest tokens of a response, the end token included: before that no end token is drawn. A stop
            string ends a response at any length.
        stop_token_ids: tokens that end a response, beside those of the model (`stop_token_ids`). They are actions, and part of it.
        stop_strings: texts that end a response with the token that completes them. They are part of it.
        missing_eos: what becomes of the score of a response that did not end within `max_new_tokens`. None leaves it
            as it is; the paper is silent.
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
        """Refuse what cannot be sampled."""
        if self.max_new_tokens < 1:
            raise UserError(f"sampling.max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise UserError(f"sampling.temperature must not be negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"sampling.top_k must be at least 1, got {self.top_k}; null draws from all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p must lie in (0, 1], got {self.top_p}; null draws from all tokens")
        if not 1 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(
                f"sampling.min_new_tokens must lie between 1 and max_new_tokens {self.max_new_tokens}, "
                f"got {self.min_new_tokens}"
            )
        if "" in self.stop_strings:
            raise UserError("sampling.stop_strings holds an empty text, which would end every response at once")

    @property
    def filters_tokens(self) -> bool:
        """Whether some tokens are ruled out by their rank or probability."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)

    def apply_missing_eos(self, scores: Tensor, ended: Tensor) -> Tensor:
        """Return the scores (B,) with `missing_eos` applied where a response did not end, (B,) bool."""
        return scores if self.missing_eos is None else torch.where(ended, scores, self.missing_eos.apply(scores))


def sampling_uniforms(rows: int, length: int, seed: int, *place: int) -> Tensor:
    """Return (rows, length) uniforms in [0, 1) that depend on the seed and the place (iteration, …) alone.

    Every rank draws the whole table and uses its own rows, so a response does not depend on world size, batch order
    or which rows finished before it.
    """
    return torch.rand(rows, length, dtype=torch.float64, generator=make_generator(seed, *place), device="cpu")


def make_generator(seed: int, *place: int) -> torch.Generator:
    """Return a CPU generator for (seed, place): the same numbers for the same place, unrelated ones elsewhere."""
    mixed = seed & 0xFFFFFFFF
    for number in place:
        mixed = (mixed * 6364136223846793005 + number * 1442695040888963407 + 1013904223) & 0x7FFFFFFFFFFFFFFF
    return torch.Generator().manual_seed(mixed)


def sample_tokens(
    logits: Tensor, uniforms: Tensor, sampling: SamplingParams, step: int, stop_token_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by the inverse of the cumulative distribution.

    Args:
        logits: (B, V) of any dtype.
        uniforms: (B,) in [0, 1).
        sampling: temperature 0 takes the likeliest token, with log-probs at temperature 1.
        step: tokens that the responses have so far.
        stop_token_ids: (any number,) int64, the tokens that end a response (`stop_token_ids`).

    Returns:
        tokens (B,) int64 and their log-probs (B,) float32, of the distribution that they were drawn from.
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
    """Return a token a row and its log-prob: the first token whose cumulative probability exceeds the uniform.

    The sums are in float64, over blocks of the vocabulary and then within one block: a cumulative sum over the whole
    of it costs more than all the rest.
    """
    rows, size = logits.shape
    weights = logits.softmax(-1)  # (B, V); they sum to 1 up to rounding
    if size % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -size % _BLOCK))
    blocks = weights.view(rows, -1, _BLOCK)
    up_to = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    total = up_to[:, -1:]
    target = uniforms.to(total)[:, None] * total
    block = _first_above(up_to, target)  # (B, 1)
    before = torch.nn.functional.pad(up_to, (1, 0)).gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    tokens = block * _BLOCK + _first_above(inside, target - before)
    logprobs = (weights.gather(1, tokens) / total).log()
    return tokens.squeeze(1), logprobs.squeeze(1).float()


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return the first place whose cumulative weight exceeds the target, (B, 1).

    The target is kept below the total, which rounding could lift it to: so the place has a weight above 0.
    """
    last = cumulative[:, -1:]
    below = torch.minimum(target, torch.nextafter(last, last.new_zeros(())))
    return torch.searchsorted(cumulative, below, right=True)


def sampled_token_logprobs(
    logits: Tensor, tokens: Tensor, sampling: SamplingParams, step: Tensor, stop_token_ids: Tensor
) -> Tensor:
    """Return the log-probs of response tokens under the distributions that they were drawn from.

    Args:
        logits: (n, V).
        tokens: (n,) int64.
        sampling: as at sampling; temperature 0 counts as 1.
        step: (n,) int64, how many tokens stand before each in its response.
        stop_token_ids: as in `sample_tokens`.

    Returns:
        (n,) float32, in nats. Differentiable once.
    """
    temperature = sampling.temperature or 1.0
    if sampling.min_new_tokens > 1:
        end = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device).index_fill(0, stop_token_ids, True)
        logits = logits.masked_fill((step + 1 < sampling.min_new_tokens)[:, None] & end, -torch.inf)
    row, drawn = logits[None], tokens[None]  # (1, n, V), (1, n)
    if sampling.filters_tokens and sampling.temperature:
        row = apply_top_k_top_p(row, drawn, temperature, sampling.top_k, sampling.top_p)
    return token_logprobs(row, drawn, temperature)[0]
