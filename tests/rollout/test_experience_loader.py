"""Sizes and the cut of an iteration: every episode once per pass, no real token lost, one normalizer a minibatch."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.errors import UserError
from lit_rlhf.rollout.advantages import GAE, compute_rewards
from lit_rlhf.rollout.experience import Experience, Trajectories
from lit_rlhf.rollout.experience_loader import (
    BatchSizes,
    ExperienceLoader,
    PPOIteration,
    iter_micro_batches,
    rollout_metrics,
)


@st.composite
def sizes(draw) -> BatchSizes:
    """Sizes that divide."""
    micro_batch_size, accumulate, world_size, minibatches = (draw(st.integers(1, 3)) for _ in range(4))
    total = micro_batch_size * accumulate * world_size * minibatches
    return BatchSizes(total, micro_batch_size, accumulate, world_size, draw(st.integers(1, 2)))


def trajectories(count: int, seed: int = 0, prompt_width: int = 5, width: int = 6) -> Trajectories:
    """Episodes whose every real token is its own number: row x 100 + column + 1."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, prompt_width + 1, (count, 1), generator=generator)
    responses = torch.randint(1, width + 1, (count, 1), generator=generator)
    prompt_mask = torch.arange(prompt_width) >= prompt_width - prompts
    response_mask = torch.arange(width) < responses
    mask = torch.cat([prompt_mask, response_mask], 1)
    numbers = torch.arange(count)[:, None] * 100 + torch.arange(1, prompt_width + width + 1)
    floats = torch.randn(4, count, width, generator=generator).masked_fill(~response_mask, 0)
    scores = torch.randn(count, generator=generator)
    return Trajectories(
        numbers.masked_fill(~mask, 0), mask.long(), response_mask, floats[0], floats[1], floats[2], scores, scores > 0,
        rollout_logprobs=floats[0], prompt_index=torch.arange(count),
    )  # fmt: skip


def pieces(given: Trajectories, of: BatchSizes, seed: int = 1, iteration: int = 0) -> list[list[Experience]]:
    """The micro-batches of each rank; the advantages carry the tokens' numbers."""
    width = given.response_mask.shape[1]
    marks = given.input_ids[:, -width:].float()
    return [
        list(
            iter_micro_batches(
                PPOIteration(iteration, given, marks, marks, -marks, {"a": torch.tensor(1.0)}), of, rank, seed
            )
        )
        for rank in range(of.world_size)
    ]


def minibatches(ranks: list[list[Experience]], of: BatchSizes) -> list[list[Experience]]:
    """Micro-batches of all ranks, by optimizer step."""
    return [
        [
            batch
            for rank in ranks
            for batch in rank[step * of.accumulate_grad_batches : (step + 1) * of.accumulate_grad_batches]
        ]
        for step in range(of.num_optimizer_steps)
    ]


@given(of=sizes(), seed=st.integers(0, 99))
def test_every_episode_comes_once_per_pass_with_all_its_tokens(of, seed):
    whole = trajectories(of.rollout_batch_size, seed)
    ranks = pieces(whole, of, seed)
    assert [len(rank) for rank in ranks] == [of.batches] * of.world_size
    steps = minibatches(ranks, of)
    per_pass = of.rollout_batch_size // of.minibatch
    everything = sorted(int(number) for number in whole.input_ids[whole.attention_mask.bool()])
    for start in range(0, of.steps, per_pass):
        batches = [batch for step in steps[start : start + per_pass] for batch in step]
        assert all(len(batch.input_ids) == of.micro_batch_size for batch in batches)
        seen = [int(number) for batch in batches for number in batch.input_ids[batch.attention_mask.bool()]]
        assert sorted(seen) == everything


@given(of=sizes(), seed=st.integers(0, 99))
def test_a_micro_batch_keeps_every_table_aligned(of, seed):
    for rank in pieces(trajectories(of.rollout_batch_size, seed), of, seed):
        for batch in rank:
            width = batch.response_mask.shape[1]
            tokens = batch.input_ids[:, -width:]
            assert torch.equal(batch.attention_mask[:, -width:].bool(), batch.response_mask)
            assert torch.equal(batch.advantages[batch.response_mask], tokens[batch.response_mask].float())
            assert torch.equal(batch.returns, -batch.advantages)
            assert batch.old_logprobs.shape == batch.old_values.shape == batch.response_mask.shape
            # no column that is padding in every row
            assert batch.attention_mask.any(0).all()


@given(of=sizes(), seed=st.integers(0, 99))
def test_the_normalizer_counts_the_response_tokens_of_the_whole_minibatch(of, seed):
    for step in minibatches(pieces(trajectories(of.rollout_batch_size, seed), of, seed), of):
        tokens = sum(int(batch.response_mask.sum()) for batch in step)
        assert {float(batch.normalizer) for batch in step} == {float(tokens)}


@given(of=sizes(), seed=st.integers(0, 99))
def test_a_minibatch_holds_the_same_episodes_however_it_is_cut(of, seed):
    whole = trajectories(of.rollout_batch_size, seed)
    one = BatchSizes(of.rollout_batch_size, of.minibatch, 1, 1, of.epochs)

    def episodes(sizes: BatchSizes) -> list[set[int]]:
        steps = minibatches(pieces(whole, sizes, seed), sizes)
        return [{int(row.max()) // 100 for batch in step for row in batch.input_ids} for step in steps]

    assert episodes(of) == episodes(one)


def test_passes_and_iterations_differ_and_are_repeatable():
    whole, of = trajectories(24), BatchSizes(24, 4, 1, 1, 2)

    def order(seed: int, iteration: int) -> list[int]:
        return [int(row.max()) // 100 for batch in pieces(whole, of, seed, iteration)[0] for row in batch.input_ids]

    first = order(1, 0)
    assert first[:24] != first[24:], "two passes over the same experience"
    assert first != order(1, 1) and first != order(2, 0)
    assert first == order(1, 0)


def test_statistics_ride_in_the_first_micro_batch_alone():
    for rank in pieces(trajectories(12), BatchSizes(12, 2, 1, 2, 2)):
        assert [bool(batch.rollout_metrics) for batch in rank] == [True] + [False] * 5


def test_sizes_are_derived():
    of = BatchSizes(rollout_batch_size=512, micro_batch_size=8, accumulate_grad_batches=2, world_size=4, ppo_epochs=3)
    assert (of.minibatch_size, of.num_optimizer_steps, of.num_micro_batches) == (64, 24, 48)
    assert str(of) == (
        "512 episodes an iteration = 8 minibatches of 64 (micro-batch 8 x accumulation 2 x 4 ranks), "
        "3 epoch(s): 24 optimizer steps"
    )
    with pytest.raises(
        UserError, match="rollout_batch_size 100 is not a multiple of the minibatch 64 = micro_batch_size 8 x"
    ):
        BatchSizes(100, 8, 2, 4, 1)


def test_the_loader_has_its_length_and_collects_at_the_first_batch_alone():
    calls: list[int] = []

    def collect():
        calls.append(len(calls))
        return calls[-1]

    loader = ExperienceLoader(collect, lambda number: iter([number] * 3), 3)  # type: ignore[arg-type, return-value]
    assert len(loader) == 3
    iterator = iter(loader)
    assert not calls, "nothing is sampled before the first batch is asked for"
    assert list(iterator) == [0, 0, 0]
    assert calls == [0]
    assert list(loader) == [1, 1, 1]


@pytest.mark.parametrize("position", [1, 2, 5])
def test_an_unfinished_iteration_goes_on_from_its_state_alone(position):
    of = BatchSizes(12, 2, 1, 1, 1)
    whole = trajectories(12)
    made = PPOIteration(4, whole, whole.values, whole.values, -whole.values, {"a": torch.tensor(1.0)})

    def loader(collect):
        return ExperienceLoader(
            collect, lambda iteration: iter_micro_batches(iteration, of, 0, 1), of.num_micro_batches
        )

    first = loader(lambda: made)
    assert first.mid_iteration_state() == {}
    iterator = iter(first)
    for _ in range(position):
        next(iterator)
    buffer = io.BytesIO()
    torch.save(first.mid_iteration_state(), buffer)
    expected = list(iterator)
    assert first.mid_iteration_state() == {}, "an iteration that is done is no part of a checkpoint"
    buffer.seek(0)
    second = loader(lambda: pytest.fail("rolled out again"))
    second.resume(torch.load(buffer, weights_only=True), torch.device("cpu"))
    rest = list(second)
    assert len(rest) == len(expected) == of.num_micro_batches - position
    for one, other in zip(rest, expected):
        for name in ("input_ids", "response_mask", "logprobs", "values", "advantages", "returns", "normalizer"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_advantages_by_hand():
    """Two episodes of 2 and 1 tokens, β 0.1, γ 1, λ 0.5, written out."""
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, 9.0]])
    reference = torch.tensor([[-1.5, -1.0], [-0.5, -9.0]])
    values = torch.tensor([[0.2, 0.4], [0.1, 7.0]])
    given = Trajectories(
        torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3), mask, logprobs, reference, values,
        torch.tensor([1.0, -1.0]), torch.tensor([True, True]), logprobs, torch.arange(2),
    )  # fmt: skip
    advantages, returns = GAE(1.0, 0.5).estimate(compute_rewards(given, 0.1), given)
    assert returns is not None
    # rewards: -0.1 x 0.5 and -0.1 x -1 + 1 for the first episode, 0 - 1 for the second
    second = 1.1 - 0.4
    first = (-0.05 + 0.4 - 0.2) + 0.5 * second
    raw = torch.tensor([first, second, -1.1])
    torch.testing.assert_close(returns[mask], raw + torch.tensor([0.2, 0.4, 0.1]))
    assert float(advantages[mask].mean()) == pytest.approx(0, abs=1e-6)
    scaled = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(advantages[mask], scaled, atol=1e-5, rtol=1e-5)


def test_statistics_by_hand():
    whole = trajectories(7, seed=3)
    figures = rollout_metrics(whole, 0.25, whole.values + 1)
    kls, lengths, tokens = [], [], []
    for row in range(7):
        mask = whole.response_mask[row]
        kls.append(float((whole.old_logprobs[row][mask] - whole.ref_logprobs[row][mask]).sum()))
        lengths.append(int(mask.sum()))
        tokens += whole.old_logprobs[row][mask].tolist()
    scores = whole.scores.tolist()
    expected = {
        "reward/score": sum(scores) / 7,
        "reward/kl": sum(kls) / 7,
        "reward/kl_coefficient": 0.25,
        "reward/kl_penalized_score": sum(s - 0.25 * k for s, k in zip(scores, kls)) / 7,
        "response/length": sum(lengths) / 7,
        "response/eos_fraction": sum(score > 0 for score in scores) / 7,
        "policy/entropy_estimate": -sum(tokens) / len(tokens),
        "value/explained_variance": 1.0,
    }
    for name, figure in expected.items():
        assert float(figures[name]) == pytest.approx(figure, abs=1e-5), name
