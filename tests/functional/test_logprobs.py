import math

import pytest
import torch
from torch.testing import assert_close

from lit_rlhf.functional import logprobs as logprobs_module
from lit_rlhf.functional import token_entropy, token_logprobs

B, T, V = 3, 5, 7


def batch(dtype=torch.float32, scale=3.0):
    return (torch.randn(B, T, V) * scale).to(dtype), torch.randint(V, (B, T))


def by_hand(logits, temperature):
    """Return log-probabilities over the vocabulary, (B, T, V) float64, computed in Python floats."""
    result = []
    for row in logits.double().tolist():
        result.append([])
        for position in row:
            scaled = [x / temperature for x in position]
            log_normalizer = max(scaled) + math.log(math.fsum(math.exp(x - max(scaled)) for x in scaled))
            result[-1].append([x - log_normalizer for x in scaled])
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_values_equal_a_loop_in_float64(dtype, temperature):
    logits, tokens = batch(dtype)
    result = token_logprobs(logits, tokens, temperature)
    expected = by_hand(logits, temperature)
    assert result.dtype == torch.float32 and result.shape == (B, T)
    picked = [[expected[b, t, tokens[b, t]] for t in range(T)] for b in range(B)]
    assert_close(result.double(), torch.tensor(picked, dtype=torch.float64), rtol=1e-6, atol=2e-6)
    entropy = token_entropy(logits, temperature)
    assert entropy.dtype == torch.float32 and entropy.shape == (B, T)
    assert_close(entropy.double(), -(expected.exp() * expected).sum(-1), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_equals_finite_differences(temperature):
    logits, tokens = batch(torch.float64, scale=1.0)
    weight = torch.randn(B, T, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    (token_logprobs(leaf, tokens, temperature) * weight).sum().backward()

    def objective(logits):
        return sum(by_hand(logits, temperature)[b, t, tokens[b, t]] * weight[b, t] for b in range(B) for t in range(T))

    step = 1e-5
    for b, t, v in [(0, 0, 0), (1, 3, 4), (2, 4, 6), (0, 2, int(tokens[0, 2])), (2, 0, int(tokens[2, 0]))]:
        bump = torch.zeros_like(logits)
        bump[b, t, v] = step
        slope = (objective(logits + bump) - objective(logits - bump)) / (2 * step)
        assert_close(leaf.grad[b, t, v], slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [1, V, 3 * V, T * V, 2 * T * V, 2 * T * V + 3])
def test_chunks_change_nothing(monkeypatch, dtype, elements):
    logits, tokens = batch(dtype)
    weight = torch.randn(B, T)

    def run():
        leaf = logits.clone().requires_grad_()
        result = token_logprobs(leaf, tokens, 0.9)
        (result * weight).sum().backward()
        return result.detach(), leaf.grad, token_entropy(logits, 0.9)

    unchunked = run()
    monkeypatch.setattr(logprobs_module, "_CHUNK_ELEMENTS", elements)
    assert len(list(logprobs_module.logit_chunks(logits))) > 1
    for actual, expected in zip(run(), unchunked):
        assert torch.equal(actual, expected)


def test_rows_are_independent():
    logits, tokens = batch()
    batched = token_logprobs(logits, tokens)
    for b in range(B):
        assert torch.equal(token_logprobs(logits[b : b + 1], tokens[b : b + 1])[0], batched[b])


def test_a_slice_of_the_logits_gets_its_gradient():
    logits, tokens = batch()
    leaf = logits.clone().requires_grad_()
    token_logprobs(leaf[:, 1:-1], tokens[:, 1:-1]).sum().backward()
    expected = torch.nn.functional.one_hot(tokens, V) - logits.softmax(-1)
    assert_close(leaf.grad[:, 1:-1], expected[:, 1:-1])
    assert not leaf.grad[:, 0].any() and not leaf.grad[:, -1].any()


def test_half_precision_is_converted_to_float32_in_chunks(monkeypatch):
    monkeypatch.setattr(logprobs_module, "_CHUNK_ELEMENTS", 2 * V)
    largest = []

    def spy(logits, temperature):
        largest.append(logits.numel())
        return logits.float() / temperature

    monkeypatch.setattr(logprobs_module, "scaled_logits", spy)
    logits, tokens = batch(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        result = token_logprobs(logits.requires_grad_(), tokens)
    result.sum().backward()
    assert max(largest) == 2 * V and sum(largest) == 2 * B * T * V
    assert [x.dtype for x in saved] == [torch.bfloat16, torch.int64]
    assert logits.grad.dtype == torch.bfloat16


def test_float32_logits_are_not_copied():
    logits, _ = batch()
    assert logprobs_module.scaled_logits(logits, 1.0).data_ptr() == logits.data_ptr()


def test_autocast_does_not_affect_float32():
    logits, tokens = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = token_logprobs(logits, tokens)
    assert torch.equal(inside, token_logprobs(logits, tokens))


def test_a_position_without_incoming_gradient_has_gradient_0(poison):
    logits, tokens = batch()
    logits[0, 0] = poison
    logits.requires_grad_()
    result = token_logprobs(logits, tokens)
    torch.where(torch.arange(T) > 0, result, 0).sum().backward()
    assert (logits.grad[:, 0] == 0).all()
    assert logits.grad.isfinite().all() and logits.grad[:, 1:].any()


def test_extremes():
    logits = torch.tensor([[[1e4, 0.0, -1e4], [0.0, -math.inf, 0.0]]])
    assert token_logprobs(logits, torch.tensor([[0, 0]])).tolist() == [[0.0, pytest.approx(-math.log(2))]]
    assert token_logprobs(logits, torch.tensor([[2, 1]])).tolist() == [[-2e4, -math.inf]]
    assert token_entropy(logits).tolist() == [[0.0, pytest.approx(math.log(2))]]
    uniform = token_entropy(torch.full((1, 1, 50), 3.0))
    assert_close(uniform.item(), math.log(50), rtol=1e-6, atol=0)


def test_invalid_arguments_are_refused():
    logits, tokens = batch()
    with pytest.raises(AssertionError, match="temperature"):
        token_logprobs(logits, tokens, 0.0)
    with pytest.raises(AssertionError, match="temperature"):
        token_entropy(logits, 0.0)
    with pytest.raises(AssertionError, match="shapes differ"):
        token_logprobs(logits, tokens[:, 1:])
