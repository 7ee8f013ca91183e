"""Truncated sampling against a float64 reference in plain Python; missing ends; what cannot be is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import (
    MissingEOS,
    SamplingParams,
    sample_tokens,
    sampled_token_logprobs,
    sampling_uniforms,
)

V, END = 12, 3
ENDS = torch.tensor([END])


def reference(logits: list[float], sampling: SamplingParams, step: int, kept: int | None = None) -> list[float]:
    """Probabilities of one position by the definitions, in float64; `kept` may be drawn whatever its rank."""
    values = [x / sampling.temperature for x in logits]
    if step + 1 < sampling.min_new_tokens:
        values[END] = -math.inf
    order = sorted(range(V), key=lambda token: -values[token])[: sampling.top_k or V]
    weight = {token: math.exp(values[token]) for token in order}
    whole, chosen, mass = sum(weight.values()), set(), 0.0
    for token in order:
        if mass < (sampling.top_p or 1.0):
            chosen.add(token)
        mass += weight[token] / whole
    chosen |= set() if kept is None else {kept}
    total = sum(math.exp(values[token]) for token in chosen)
    return [math.exp(values[token]) / total if token in chosen else 0.0 for token in range(V)]


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed)) * 2


@st.composite
def samplings(draw) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=6,
        temperature=draw(st.sampled_from([0.6, 1.0, 1.7])),
        top_k=draw(st.sampled_from([None, 1, 3, 50])),
        top_p=draw(st.sampled_from([None, 0.1, 0.7, 1.0])),
        min_new_tokens=draw(st.integers(1, 6)),
    )


@settings(max_examples=60, deadline=None)
@given(sampling=samplings(), step=st.integers(0, 5), seed=st.integers(0, 99))
def test_a_token_is_drawn_from_the_truncated_distribution(sampling, step, seed):
    logits = random_logits(seed=seed)
    expected = reference(logits.tolist(), sampling, step)
    noise = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000  # the inverse transform on a grid
    tokens, logprobs = sample_tokens(logits.expand(2000, -1), noise, sampling, step, ENDS)
    shares = torch.bincount(tokens, minlength=V).double() / 2000
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float64), atol=1.1e-3, rtol=0)
    exact = torch.tensor([math.log(expected[token]) for token in tokens.tolist()])
    torch.testing.assert_close(logprobs, exact, atol=2e-6, rtol=1e-6)


def packed_logprobs(logits: torch.Tensor, tokens: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """(B, R) by the function that takes tokens one behind the other."""
    step = torch.arange(tokens.shape[1]).repeat(len(tokens))
    return sampled_token_logprobs(logits.flatten(0, 1), tokens.flatten(), sampling, step, ENDS).view_as(tokens)


@settings(max_examples=30, deadline=None)
@given(sampling=samplings(), seed=st.integers(0, 99))
def test_the_update_sees_the_log_probs_of_sampling_and_after_a_step_those_of_its_own_support(sampling, seed):
    """At the same logits the ratio is 1, bit for bit; at others every log-prob is finite, and as defined."""
    logits = random_logits(4, 6, seed=seed)
    noise = sampling_uniforms(4, 6, seed)
    drawn = [sample_tokens(logits[:, step], noise[:, step], sampling, step, ENDS) for step in range(6)]
    tokens, at_sampling = (torch.stack(parts, 1) for parts in zip(*drawn))
    torch.testing.assert_close(packed_logprobs(logits, tokens, sampling), at_sampling, atol=1e-6, rtol=1e-6)
    moved = (logits + 1.5 * random_logits(4, 6, seed=seed + 1)).requires_grad_()
    after = packed_logprobs(moved, tokens, sampling)
    for row in range(4):
        for step in range(6):
            token = int(tokens[row, step])
            expected = reference(moved[row, step].tolist(), sampling, step, kept=token)[token]
            assert float(after[row, step].detach()) == pytest.approx(math.log(expected), abs=3e-6)
    after.sum().backward()
    assert moved.grad is not None and torch.isfinite(moved.grad).all()


def test_the_full_distribution_costs_no_copy_and_changes_nothing():
    logits, tokens = random_logits(2, 3), torch.tensor([[0, 1, 2], [3, 4, 5]])
    plain = torch.log_softmax(logits.double() / 0.7, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(
        packed_logprobs(logits, tokens, SamplingParams(3, 0.7)).double(), plain, atol=1e-6, rtol=0
    )


def test_greedy_keeps_the_minimum_length():
    logits = torch.zeros(1, V)
    logits[0, END], logits[0, 5] = 2.0, 1.0
    sampling, noise = SamplingParams(4, 0.0, min_new_tokens=3), torch.zeros(1, dtype=torch.float64)
    drawn = [int(sample_tokens(logits, noise, sampling, step, ENDS)[0]) for step in range(4)]
    assert drawn == [5, 5, END, END]


def test_a_missing_end_is_replaced_or_punished_or_left():
    scores, ended = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([True, False, False])
    assert SamplingParams().apply_missing_eos(scores, ended).tolist() == [2.0, -1.0, 0.5]
    assert SamplingParams(missing_eos=MissingEOS(score=-3.0)).apply_missing_eos(scores, ended).tolist() == [
        2.0,
        -3.0,
        -3.0,
    ]
    assert SamplingParams(missing_eos=MissingEOS(penalty=1.5)).apply_missing_eos(scores, ended).tolist() == [
        2.0,
        -2.5,
        -1.0,
    ]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must not be negative"),
        ({"top_k": 0}, "top_k must be at least 1, got 0; null draws"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"min_new_tokens": 65}, "min_new_tokens must lie between 1 and max_new_tokens 64, got 65"),
        ({"stop_strings": ["\n", ""]}, "stop_strings holds an empty text"),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(settings_, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**settings_)


@pytest.mark.parametrize("both", [{}, {"replace": 0.0, "subtract": 1.0}])
def test_a_missing_end_is_one_choice(both):
    with pytest.raises(UserError, match="takes one of replace and subtract"):
        MissingEOS(**both)


def test_noise_is_drawn_on_the_cpu_whatever_the_default_device():
    expected = sampling_uniforms(2, 3, 5, 1)
    with torch.device("meta"):
        assert torch.equal(sampling_uniforms(2, 3, 5, 1), expected)
