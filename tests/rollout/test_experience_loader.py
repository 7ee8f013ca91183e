"""Micro-batches of an iteration: every episode once per epoch with all its tokens, one normalizer per minibatch."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.errors import UserError
from lit_rlhf.rollout.experience import Experience, Trajectories
from lit_rlhf.rollout.experience_loader import (
    BatchSizes,
    ExperienceLoader,
    PPOIteration,
    iter_micro_batches,
)


@st.composite
def batch_sizes(draw) -> BatchSizes:
    """Sizes that divide without a remainder."""
    micro_batch_size, accumulate, world_size, minibatches = (draw(st.integers(1, 3)) for _ in range(4))
    total = micro_batch_size * accumulate * world_size * minibatches
    return BatchSizes(total, micro_batch_size, accumulate, world_size, draw(st.integers(1, 2)))


def make_trajectories(count: int, seed: int = 0, prompt_width: int = 5, width: int = 6) -> Trajectories:
    """Return episodes whose real tokens all differ: row x 100 + column + 1."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, prompt_width + 1, (count, 1), generator=generator)
    responses = torch.randint(1, width + 1, (count, 1), generator=generator)
    prompt_mask = torch.arange(prompt_width) >= prompt_width - prompts
    response_mask = torch.arange(width) < responses
    mask = torch.cat([prompt_mask, response_mask], 1)
    tokens = torch.arange(count)[:, None] * 100 + torch.arange(1, prompt_width + width + 1)
    floats = torch.randn(4, count, width, generator=generator).masked_fill(~response_mask, 0)
    scores = torch.randn(count, generator=generator)
    return Trajectories(
        tokens.masked_fill(~mask, 0), mask.long(), response_mask, floats[0], floats[1], floats[2], scores, scores > 0,
        rollout_logprobs=floats[0], prompt_index=torch.arange(count),
    )  # fmt: skip


def make_micro_batches(
    trajectories: Trajectories, sizes: BatchSizes, seed: int = 1, iteration: int = 0
) -> list[list[Experience]]:
    """Return the micro-batches of each rank; the advantages are the token ids."""
    width = trajectories.response_mask.shape[1]
    marks = trajectories.input_ids[:, -width:].float()
    return [
        list(
            iter_micro_batches(
                PPOIteration(iteration, trajectories, marks, marks, -marks, {"a": torch.tensor(1.0)}), sizes, rank, seed
            )
        )
        for rank in range(sizes.world_size)
    ]


def test_the_policy_loss_alone_is_weighted():
    sizes, trajectories = BatchSizes(12, 2, 1, 1, 1), make_trajectories(12)
    values = trajectories.values
    plain = PPOIteration(4, trajectories, values, values, -values, {})
    weighted = plain._replace(importance_weights=torch.where(trajectories.response_mask, 3.0, 0.0))
    for one, other in zip(*(list(iter_micro_batches(each, sizes, 0, 1)) for each in (plain, weighted)), strict=True):
        assert torch.equal(other.advantages, one.advantages * 3 * one.response_mask)
        for name in ("old_logprobs", "old_values", "returns", "normalizer"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def group_by_step(ranks: list[list[Experience]], sizes: BatchSizes) -> list[list[Experience]]:
    """Return the micro-batches of all ranks by optimizer step."""
    return [
        [
            batch
            for rank in ranks
            for batch in rank[step * sizes.accumulate_grad_batches : (step + 1) * sizes.accumulate_grad_batches]
        ]
        for step in range(sizes.num_optimizer_steps)
    ]


@given(sizes=batch_sizes(), seed=st.integers(0, 99))
def test_every_episode_comes_once_per_epoch_with_all_its_tokens(sizes, seed):
    trajectories = make_trajectories(sizes.rollout_batch_size, seed)
    ranks = make_micro_batches(trajectories, sizes, seed)
    assert [len(rank) for rank in ranks] == [sizes.num_micro_batches] * sizes.world_size
    steps = group_by_step(ranks, sizes)
    steps_per_epoch = sizes.rollout_batch_size // sizes.minibatch_size
    all_tokens = sorted(int(token) for token in trajectories.input_ids[trajectories.attention_mask.bool()])
    for start in range(0, sizes.num_optimizer_steps, steps_per_epoch):
        batches = [batch for step in steps[start : start + steps_per_epoch] for batch in step]
        assert all(len(batch.input_ids) == sizes.micro_batch_size for batch in batches)
        tokens = [int(token) for batch in batches for token in batch.input_ids[batch.attention_mask.bool()]]
        assert sorted(tokens) == all_tokens


@given(sizes=batch_sizes(), seed=st.integers(0, 99))
def test_the_tensors_of_a_micro_batch_are_aligned(sizes, seed):
    for rank in make_micro_batches(make_trajectories(sizes.rollout_batch_size, seed), sizes, seed):
        for batch in rank:
            width = batch.response_mask.shape[1]
            tokens = batch.input_ids[:, -width:]
            assert torch.equal(batch.attention_mask[:, -width:].bool(), batch.response_mask)
            assert torch.equal(batch.advantages[batch.response_mask], tokens[batch.response_mask].float())
            assert torch.equal(batch.returns, -batch.advantages)
            assert batch.old_logprobs.shape == batch.old_values.shape == batch.response_mask.shape
            # no column that is padding in every row
            assert batch.attention_mask.any(0).all()


@given(sizes=batch_sizes(), seed=st.integers(0, 99))
def test_the_normalizer_counts_the_response_tokens_of_the_full_minibatch(sizes, seed):
    ranks = make_micro_batches(make_trajectories(sizes.rollout_batch_size, seed), sizes, seed)
    for step in group_by_step(ranks, sizes):
        tokens = sum(int(batch.response_mask.sum()) for batch in step)
        assert {float(batch.normalizer) for batch in step} == {float(tokens)}


@given(sizes=batch_sizes(), seed=st.integers(0, 99))
def test_a_minibatch_has_the_same_episodes_for_every_partition(sizes, seed):
    trajectories = make_trajectories(sizes.rollout_batch_size, seed)
    unpartitioned = BatchSizes(sizes.rollout_batch_size, sizes.minibatch_size, 1, 1, sizes.ppo_epochs)

    def episodes(sizes: BatchSizes) -> list[set[int]]:
        steps = group_by_step(make_micro_batches(trajectories, sizes, seed), sizes)
        return [{int(row.max()) // 100 for batch in step for row in batch.input_ids} for step in steps]

    assert episodes(sizes) == episodes(unpartitioned)


def test_epochs_and_iterations_differ_and_are_repeatable():
    trajectories, sizes = make_trajectories(24), BatchSizes(24, 4, 1, 1, 2)

    def order(seed: int, iteration: int) -> list[int]:
        (rank,) = make_micro_batches(trajectories, sizes, seed, iteration)
        return [int(row.max()) // 100 for batch in rank for row in batch.input_ids]

    first = order(1, 0)
    assert first[:24] != first[24:], "two epochs over the same experience"
    assert first != order(1, 1) and first != order(2, 0)
    assert first == order(1, 0)


def test_metrics_are_in_the_first_micro_batch_only():
    for rank in make_micro_batches(make_trajectories(12), BatchSizes(12, 2, 1, 2, 2)):
        assert [bool(batch.rollout_metrics) for batch in rank] == [True] + [False] * 5


def test_derived_sizes():
    sizes = BatchSizes(
        rollout_batch_size=512, micro_batch_size=8, accumulate_grad_batches=2, world_size=4, ppo_epochs=3
    )
    assert (sizes.minibatch_size, sizes.num_optimizer_steps, sizes.num_micro_batches) == (64, 24, 48)
    assert str(sizes) == (
        "512 episodes per iteration = 8 minibatches of 64 (micro-batch 8 x accumulation 2 x 4 ranks), "
        "3 epoch(s): 24 optimizer steps"
    )
    with pytest.raises(
        UserError, match="rollout_batch_size 100 is not a multiple of the minibatch 64 = micro_batch_size 8 x"
    ):
        BatchSizes(100, 8, 2, 4, 1)


def test_the_loader_has_a_length_and_collects_at_the_first_batch_only():
    calls: list[int] = []

    def collect():
        calls.append(len(calls))
        return calls[-1]

    loader = ExperienceLoader(collect, lambda number: iter([number] * 3), 3)  # type: ignore[arg-type, return-value]
    assert len(loader) == 3
    iterator = iter(loader)
    assert not calls, "sampled before the first batch was requested"
    assert list(iterator) == [0, 0, 0]
    assert calls == [0]
    assert list(loader) == [1, 1, 1]


@pytest.mark.parametrize("position", [1, 2, 5])
def test_an_unfinished_iteration_resumes_from_its_state(position):
    sizes = BatchSizes(12, 2, 1, 1, 1)
    trajectories = make_trajectories(12)
    values = trajectories.values
    metrics, weights = {"a": torch.tensor(1.0)}, 1 + values.abs()
    iteration = PPOIteration(4, trajectories, values, values, -values, metrics, importance_weights=weights)

    def make_loader(collect):
        return ExperienceLoader(
            collect, lambda iteration: iter_micro_batches(iteration, sizes, 0, 1), sizes.num_micro_batches
        )

    loader = make_loader(lambda: iteration)
    assert loader.mid_iteration_state() == {}
    iterator = iter(loader)
    for _ in range(position):
        next(iterator)
    buffer = io.BytesIO()
    torch.save(loader.mid_iteration_state(), buffer)
    expected = list(iterator)
    assert loader.mid_iteration_state() == {}, "a finished iteration is not part of a checkpoint"
    buffer.seek(0)
    resumed = make_loader(lambda: pytest.fail("collected again"))
    resumed.resume(torch.load(buffer, weights_only=True), torch.device("cpu"))
    remaining = list(resumed)
    assert len(remaining) == len(expected) == sizes.num_micro_batches - position
    for ours, theirs in zip(remaining, expected):
        for name in (
            "input_ids", "response_mask", "old_logprobs", "old_values", "advantages", "returns", "normalizer"
        ):  # fmt: skip
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
