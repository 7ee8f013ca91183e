"""Peak memory of log-probabilities over a vocabulary of 128k: logits and gradient, without a float32 copy."""

import torch

from lit_rlhf.functional import token_logprobs
from tests.helpers.peak_memory import measure_peak_memory, needs_proc

T, V, D = 1024, 131_072, 32
LOGITS = T * V * 2  # bytes, bfloat16


def unembed() -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.full((V, D), 0.01, dtype=torch.bfloat16, requires_grad=True)
    return weight, torch.full((1, T, D), 0.5, dtype=torch.bfloat16) @ weight.T  # (1, T, V)


def gradient_path() -> None:
    """Allocate the minimum of any loss: logits, their gradient, the gradient of the weight."""
    _, logits = unembed()
    logits.backward(torch.full_like(logits, 0.1))


def logprobs() -> None:
    weight, logits = unembed()
    token_logprobs(logits, torch.zeros(1, T, dtype=torch.int64)).sum().backward()
    assert weight.grad is not None


@needs_proc
def test_the_peak_is_that_of_logits_and_gradient_alone(tmp_path):
    minimum, actual = (measure_peak_memory(work, tmp_path) for work in (gradient_path, logprobs))
    assert 2 * LOGITS < minimum < 2.3 * LOGITS, "the measurement contains logits and gradient"
    assert actual < 1.15 * minimum, (actual / 1e6, minimum / 1e6)
