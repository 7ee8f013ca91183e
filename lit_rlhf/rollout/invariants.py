"""Invariants of a PPO update, checked on the numbers of an iteration by `lit_rlhf.callbacks.PPOInvariantCheck`.

Each check returns None, or a `Violation`: what was expected, what was observed, and the likely cause.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_rlhf.functional import k1, masked_mean
from lit_rlhf.rollout.experience import Episodes, Trajectories

WHITENING_TOLERANCE = 1e-3  # largest deviation of whitened mean and variance from 0 and 1, in float32
EXTRA_PADDING = 7  # columns added on either side


class Violation(NamedTuple):
    """An invariant that does not hold."""

    expected: str
    observed: str
    cause: str

    def __str__(self) -> str:
        """One line."""
        return f"expected {self.expected}; observed {self.observed}; likely cause: {self.cause}"


def check_pad_token(pad_id: int | None, end_id: int | None) -> Violation | None:
    """Padding must not be the end token: the end token is an action that is trained."""
    if pad_id is not None and pad_id != end_id:
        return None
    observed = f"the id {end_id} for both" if pad_id is not None else "no padding token"
    cause = "the tokenizer was changed after it was loaded; set model.loading.pad_token"
    return Violation("a padding token that is not the end token", observed, cause)


def active_dropouts(model: nn.Module) -> Iterator[str]:
    """Yield the modules of a model whose dropout is active in a training pass."""
    for name, module in model.named_modules():
        rates = [getattr(module, each, 0.0) for each in ("dropout", "attention_dropout", "p")]
        if module.training and any(isinstance(rate, float) and rate > 0 for rate in rates):
            yield name or type(module).__name__


def check_no_dropout(models: dict[str, nn.Module]) -> Violation | None:
    """No model of PPO may have active dropout: the ratio would be noise."""
    found = [f"{role}.{name}" for role, model in models.items() for name in active_dropouts(model)]
    if not found:
        return None
    cause = "a callback or a subclass set it after loading, which sets every dropout to 0"
    return Violation("no dropout in policy, critic, reference and reward model", f"{len(found)}: {found[0]}, …", cause)


def check_response_mask(trajectories: Trajectories) -> Violation | None:
    """The actions are the tokens of the response, from its first column through its last token."""
    mask, width = trajectories.response_mask, trajectories.response_mask.shape[1]
    attended = trajectories.attention_mask[:, -width:].bool()
    wrong = (mask != attended).any(1) | (mask != (mask.long().cumprod(1) > 0)).any(1) | ~mask[:, 0]
    if not wrong.any():
        return None
    row = int(wrong.nonzero()[0])
    observed = f"{int(wrong.sum())} of {len(mask)} episodes otherwise, first {row}: mask {mask[row].int().tolist()}"
    cause = "the generator's response_mask has a gap, padding, or none of the first token"
    return Violation("actions that are the response's tokens, from the first on without a gap", observed, cause)


def check_score_position(trajectories: Trajectories, rewards: Tensor, coefficient: float) -> Violation | None:
    """The reward of a token is -β times its KL; the score is added at the last action only (§3.5).

    Args:
        trajectories: of the iteration.
        rewards: (B, R).
        coefficient: β of the iteration.
    """
    mask, kl = trajectories.response_mask, k1(trajectories.old_logprobs, trajectories.ref_logprobs).double()
    beyond = torch.where(mask, rewards.double() + coefficient * kl, rewards.double())  # everything but the KL penalty
    last = mask.sum(1, keepdim=True) - 1
    scores = trajectories.scores.double()
    expected = torch.zeros_like(beyond).scatter_(1, last, scores[:, None])
    wrong = (beyond - expected).abs() > 1e-4 * (1 + scores.abs()[:, None])
    if not wrong.any():
        return None
    row, column = (int(index) for index in wrong.nonzero()[0])
    observed = (
        f"{float(beyond[row, column]):.4g} instead of {float(expected[row, column]):.4g} at token {column} of {row}"
    )
    cause = f"the score was put on another token than the last action, {int(last[row])}, or on padding"
    return Violation("the score on the last action, and -β × KL on every one", observed, cause)


def check_whitened(advantages: Tensor, mask: Tensor) -> Violation | None:
    """Advantages have mean 0 and variance 1 over the response tokens of all ranks."""
    advantages = advantages.double()
    mean = masked_mean(advantages, mask)
    variance = masked_mean((advantages - mean) ** 2, mask)
    # constant advantages have no variance that could be scaled to 1
    if abs(mean) < WHITENING_TOLERANCE and (
        abs(variance - 1) < 10 * WHITENING_TOLERANCE or variance < WHITENING_TOLERANCE
    ):
        return None
    cause = "prompt or padding tokens were counted, or each rank whitened its own"
    return Violation("advantages of mean 0 and variance 1", f"{float(mean):.4g} and {float(variance):.4g}", cause)


def check_initial_kl(trajectories: Trajectories, tolerance: float) -> Violation | None:
    """Before the first update the policy equals its reference: the log-prob of every token is the same."""
    difference = k1(trajectories.old_logprobs, trajectories.ref_logprobs).abs()
    mean = float(masked_mean(difference, trajectories.response_mask))
    if mean <= tolerance:
        return None
    cause = "the reference has other weights, another temperature, or another precision than the policy"
    return Violation(
        f"a KL of 0 to the reference at step 0, to {tolerance:g} nats a token", f"{mean:.4g} nats a token", cause
    )


def check_initial_ratio(
    clip_fraction: float, mismatch: float, tolerance: float, max_clip_fraction: float = 0.0
) -> Violation | None:
    """On the first minibatch of an iteration the weights are those of the rollout: the ratio is 1.

    Args:
        clip_fraction: fraction of its tokens whose ratio was clipped.
        mismatch: mean |Δ log-prob| between sampling and the update's pass, in nats.
        tolerance: of the mismatch, in nats.
        max_clip_fraction: of the clipped tokens.
    """
    if clip_fraction <= max_clip_fraction and mismatch <= tolerance:
        return None
    cause = (
        "the generator returns log-probs of another distribution (temperature, truncation, stale weights, precision), "
        "or the weights moved since the rollout; if it is half precision alone, set model.ppo.old_logprobs to recompute"
    )
    limit = f"at most {max_clip_fraction:.0%}" if max_clip_fraction else "nothing"
    return Violation(
        f"a ratio of 1 on the first minibatch: {limit} clipped, log-probs equal to {tolerance:g} nats",
        f"{clip_fraction:.2%} clipped, {mismatch:.4g} nats a token",
        cause,
    )


@torch.no_grad()
def check_padding_invariance(
    score: Callable[[Episodes], Tensor], trajectories: Trajectories, count: int, pad_id: int, tolerance: float
) -> Violation | None:
    """A reward model's score of an episode must not change with the padding around it.

    Args:
        score: of a reward that reads ids and mask alone.
        trajectories: whose first episodes are scored.
        count: number of episodes.
        pad_id: fills the added columns.
        tolerance: relative to 1 + |score|.
    """
    width = trajectories.response_mask.shape[1]
    for ids, mask in zip(trajectories.input_ids[:count], trajectories.attention_mask[:count]):
        prompt = int(mask[:-width].sum())
        ids_alone, mask_alone = ids[mask.bool()][None], mask[mask.bool()][None]
        padded, padded_mask = (
            nn.functional.pad(ids_alone, (EXTRA_PADDING, EXTRA_PADDING), value=pad_id),
            nn.functional.pad(mask_alone, (EXTRA_PADDING, EXTRA_PADDING)),
        )
        alone = float(score(Episodes(ids_alone, mask_alone, [""], [""], [{}], prompt, training=False)))
        padded_score = float(
            score(Episodes(padded, padded_mask, [""], [""], [{}], EXTRA_PADDING + prompt, training=False))
        )
        if abs(alone - padded_score) > tolerance * (1 + abs(alone)):
            cause = "the score is read at a padding token, or positions are not counted from the first real token"
            return Violation("the same score with and without padding", f"{alone:.6g} and {padded_score:.6g}", cause)
    return None
