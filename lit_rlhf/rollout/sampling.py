"""Drawing a token: inverse-transform sampling from noise that is drawn beforehand."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rlhf.errors import UserError


@dataclass
class Sampling:
    """How responses are drawn. Always from the full distribution: no top-k, no top-p, no minimum length.

    Args:
        response_length: most tokens of a response, the end token included.
        temperature: divides the logits when sampling, in the policy's and reference's log-probs and in the update
            alike. 0 is greedy decoding, for evaluation only.
        missing_end_score: score of a response that did not end within `response_length`, in place of the reward
            source's (Ziegler 2019: -1). None leaves the score as it is; the paper is silent.
    """

    response_length: int = 64
    temperature: float = 1.0
    missing_end_score: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled."""
        if self.response_length < 1:
            raise UserError(f"sampling.response_length must be at least 1, got {self.response_length}")
        if self.temperature < 0:
            raise UserError(f"sampling.temperature must not be negative, got {self.temperature}")


def draw_noise(rows: int, length: int, seed: int, *place: int) -> Tensor:
    """Return (rows, length) uniforms in [0, 1) that depend on the seed and the place (iteration, …) alone.

    Every rank draws the whole table and uses its own rows, so a response does not depend on world size, batch order
    or which rows finished before it.
    """
    return torch.rand(rows, length, dtype=torch.float64, generator=seeded(seed, *place))


def seeded(seed: int, *place: int) -> torch.Generator:
    """Return a CPU generator for (seed, place): the same numbers for the same place, unrelated ones elsewhere."""
    mixed = seed & 0xFFFFFFFF
    for number in place:
        mixed = (mixed * 6364136223846793005 + number * 1442695040888963407 + 1013904223) & 0x7FFFFFFFFFFFFFFF
    return torch.Generator().manual_seed(mixed)


def choose_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token a row by the inverse of the cumulative distribution.

    Args:
        logits: (B, V) of any dtype.
        uniforms: (B,) in [0, 1).
        temperature: 0 takes the likeliest token, with log-probs at temperature 1.

    Returns:
        tokens (B,) int64 and their log-probs (B,) float32.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)  # (B, V)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
        target = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
        # right=True: the first token whose cumulative exceeds the target, so a token of probability 0 is never drawn
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)
