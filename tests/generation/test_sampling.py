"""Sampling against a float64 reference in plain Python: filters, noise, missing end tokens; invalid settings."""

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

V, STOP = 12, 3
STOP_TOKEN_IDS = torch.tensor([STOP])
NO_STOP_TOKENS = torch.zeros(0, dtype=torch.long)


def reference(logits: list[float], sampling: SamplingParams, step: int, kept: int | None = None) -> list[float]:
    """Return the probabilities of one position by the definitions, in float64; `kept` is never filtered."""
    values = [x / sampling.temperature for x in logits]
    if step + 1 < sampling.min_new_tokens:
        values[STOP] = -math.inf
    order = sorted(range(V), key=lambda token: -values[token])[: sampling.top_k or V]
    weight = {token: math.exp(values[token]) for token in order}
    total, nucleus, mass = sum(weight.values()), set(), 0.0
    for token in order:
        if mass < (sampling.top_p or 1.0):
            nucleus.add(token)
        mass += weight[token] / total
    nucleus |= set() if kept is None else {kept}
    total = sum(math.exp(values[token]) for token in nucleus)
    return [math.exp(values[token]) / total if token in nucleus else 0.0 for token in range(V)]


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed)) * 2


@st.composite
def sampling_params(draw) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=6,
        temperature=draw(st.sampled_from([0.6, 1.0, 1.7])),
        top_k=draw(st.sampled_from([None, 1, 3, 50])),
        top_p=draw(st.sampled_from([None, 0.1, 0.7, 1.0])),
        min_new_tokens=draw(st.integers(1, 6)),
    )


@settings(max_examples=60, deadline=None)
@given(sampling=sampling_params(), step=st.integers(0, 5), seed=st.integers(0, 99))
def test_tokens_follow_the_filtered_distribution(sampling, step, seed):
    logits = random_logits(seed=seed)
    expected = reference(logits.tolist(), sampling, step)
    uniforms = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000  # the inverse transform on a grid
    tokens, logprobs = sample_tokens(logits.expand(2000, -1), uniforms, sampling, step, STOP_TOKEN_IDS)
    frequencies = torch.bincount(tokens, minlength=V).double() / 2000
    torch.testing.assert_close(frequencies, torch.tensor(expected, dtype=torch.float64), atol=1.1e-3, rtol=0)
    exact = torch.tensor([math.log(expected[token]) for token in tokens.tolist()])
    torch.testing.assert_close(logprobs, exact, atol=2e-6, rtol=1e-6)


def packed_logprobs(logits: torch.Tensor, tokens: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Return (B, R) log-probs by the function for packed tokens."""
    step = torch.arange(tokens.shape[1]).repeat(len(tokens))
    return sampled_token_logprobs(logits.flatten(0, 1), tokens.flatten(), sampling, step, STOP_TOKEN_IDS).view_as(
        tokens
    )


@settings(max_examples=30, deadline=None)
@given(sampling=sampling_params(), seed=st.integers(0, 99))
def test_log_probs_of_the_update_equal_those_of_sampling_and_after_a_step_use_its_own_filter(sampling, seed):
    """For the same logits the ratio is 1; for others every log-prob is finite, and as defined."""
    logits = random_logits(4, 6, seed=seed)
    uniforms = sampling_uniforms(4, 6, seed)
    steps = [sample_tokens(logits[:, step], uniforms[:, step], sampling, step, STOP_TOKEN_IDS) for step in range(6)]
    tokens, at_sampling = (torch.stack(parts, 1) for parts in zip(*steps))
    torch.testing.assert_close(packed_logprobs(logits, tokens, sampling), at_sampling, atol=1e-6, rtol=1e-6)
    updated = (logits + 1.5 * random_logits(4, 6, seed=seed + 1)).requires_grad_()
    after = packed_logprobs(updated, tokens, sampling)
    for row in range(4):
        for step in range(6):
            token = int(tokens[row, step])
            expected = reference(updated[row, step].tolist(), sampling, step, kept=token)[token]
            assert float(after[row, step].detach()) == pytest.approx(math.log(expected), abs=3e-6)
    after.sum().backward()
    assert updated.grad is not None and torch.isfinite(updated.grad).all()


def test_log_probs_of_the_full_distribution_are_a_log_softmax():
    logits, tokens = random_logits(2, 3), torch.tensor([[0, 1, 2], [3, 4, 5]])
    plain = torch.log_softmax(logits.double() / 0.7, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(
        packed_logprobs(logits, tokens, SamplingParams(3, 0.7)).double(), plain, atol=1e-6, rtol=0
    )


def test_greedy_decoding_respects_min_new_tokens():
    logits = torch.zeros(1, V)
    logits[0, STOP], logits[0, 5] = 2.0, 1.0
    sampling, uniform = SamplingParams(4, 0.0, min_new_tokens=3), torch.zeros(1, dtype=torch.float64)
    tokens = [int(sample_tokens(logits, uniform, sampling, step, STOP_TOKEN_IDS)[0]) for step in range(4)]
    assert tokens == [5, 5, STOP, STOP]


def test_the_score_without_an_end_token_is_replaced_or_penalized_or_kept():
    scores, finished = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([True, False, False])
    assert SamplingParams().apply_missing_eos(scores, finished).tolist() == [2.0, -1.0, 0.5]
    assert SamplingParams(missing_eos=MissingEOS(score=-3.0)).apply_missing_eos(scores, finished).tolist() == [
        2.0,
        -3.0,
        -3.0,
    ]
    assert SamplingParams(missing_eos=MissingEOS(penalty=1.5)).apply_missing_eos(scores, finished).tolist() == [
        2.0,
        -2.5,
        -1.0,
    ]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must not be negative"),
        ({"top_k": 0}, "top_k must be at least 1, got 0; null samples"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"min_new_tokens": 65}, "min_new_tokens must lie between 1 and max_new_tokens 64, got 65"),
        ({"stop_strings": ["\n", ""]}, "stop_strings holds an empty text"),
    ],
)
def test_invalid_settings_are_refused_by_name(settings_, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**settings_)


@pytest.mark.parametrize("arguments", [{}, {"score": 0.0, "penalty": 1.0}])
def test_missing_eos_takes_exactly_one_of_score_and_penalty(arguments):
    with pytest.raises(UserError, match="takes one of score and penalty"):
        MissingEOS(**arguments)


def test_the_frequencies_of_samples_are_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -1.0]]).expand(60_000, -1)
    uniforms = sampling_uniforms(60_000, 1, 0).squeeze(1)
    tokens, logprobs = sample_tokens(logits, uniforms, SamplingParams(temperature=0.5), 0, NO_STOP_TOKENS)
    expected = torch.softmax(logits[0].double() / 0.5, -1)
    observed = torch.bincount(tokens, minlength=5) / 60_000
    assert observed[2] == 0
    assert (observed - expected).abs().max() < 4 * 0.5 / 60_000**0.5
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], atol=1e-6, rtol=1e-6)


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 10_000))
def test_a_token_of_probability_zero_is_never_sampled(uniform, seed):
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(seed))
    logits[0, ::2] = -torch.inf
    uniforms = torch.tensor([uniform], dtype=torch.float64)
    token, _ = sample_tokens(logits, uniforms, SamplingParams(), 0, NO_STOP_TOKENS)
    assert int(token) % 2 == 1


@given(st.integers(1, 200), st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_the_first_token_whose_cumulative_probability_exceeds_the_uniform_is_sampled(size, seed, uniform):
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * 3
    uniforms = torch.tensor([uniform], dtype=torch.float64)
    token, logprob = sample_tokens(logits, uniforms, SamplingParams(), 0, NO_STOP_TOKENS)
    probabilities = torch.softmax(logits[0].double(), -1)
    cumulative = probabilities.cumsum(-1)
    assert float(cumulative[token]) > uniform - 1e-6
    assert float(cumulative[token] - probabilities[token]) < uniform + 1e-6
    assert float(logprob) == pytest.approx(float(probabilities[token].log()), abs=2e-6)


@pytest.mark.parametrize(("size", "last"), [(64, 63), (130, 129), (130, 5)])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_the_only_possible_token_is_sampled_for_every_uniform(size, last, uniform):
    logits = torch.full((2, size), -torch.inf)
    logits[:, last] = 3.0
    uniforms = torch.full((2,), uniform, dtype=torch.float64)
    tokens, logprobs = sample_tokens(logits, uniforms, SamplingParams(), 0, NO_STOP_TOKENS)
    assert tokens.tolist() == [last, last] and logprobs.tolist() == [0.0, 0.0]


def test_uniforms_depend_on_seed_and_key_alone():
    assert torch.equal(sampling_uniforms(4, 3, 1, 2, 0), sampling_uniforms(4, 3, 1, 2, 0))
    assert torch.equal(sampling_uniforms(4, 3, 1, 2, 0)[:2], sampling_uniforms(8, 3, 1, 2, 0)[:2])
    for other in [(2, 2, 0), (1, 3, 0), (1, 2, 1)]:
        assert not torch.equal(sampling_uniforms(4, 3, 1, 2, 0), sampling_uniforms(4, 3, *other))


def test_uniforms_are_drawn_on_the_cpu_for_every_default_device():
    expected = sampling_uniforms(2, 3, 5, 1)
    with torch.device("meta"):
        assert torch.equal(sampling_uniforms(2, 3, 5, 1), expected)
