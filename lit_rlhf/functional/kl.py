"""Estimators of KL(policy || reference) from tokens that the policy sampled.

With `x ~ policy` and `d = log policy(x) - log reference(x)` (Schulman, 2020, http://joschu.net/blog/kl-approx.html):

| estimator | per token | as an estimate of the KL |
|---|---|---|
| `k1` | `d` | unbiased, high variance, may be negative; the penalty of InstructGPT (Eq. 2) |
| `k2` | `d^2 / 2` | biased, low variance, never negative |
| `k3` | `exp(-d) - 1 + d` | unbiased, low variance, never negative |

Each takes the log-probabilities of the same sampled tokens under both models, any shape, and returns that shape, in
nats. None is clamped: `k1` clamped at 0 would be biased. The caller masks what lies outside the response.
"""

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Compute `d`, whose sum over a response is the log-ratio in InstructGPT's Eq. 2."""
    assert logprobs.shape == ref_logprobs.shape
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Compute `d^2 / 2`; its gradient, unlike its value, is in expectation that of the KL."""
    return k1(logprobs, ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Compute `exp(-d) - 1 + d`: `k1` with a control variate of expectation 0."""
    log_ratio = k1(logprobs, ref_logprobs)
    # exp(-d) - 1 would lose every digit of a small d
    return torch.expm1(-log_ratio) + log_ratio
