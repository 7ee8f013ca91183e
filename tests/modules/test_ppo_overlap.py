"""PPO whose next responses are sampled during the update: off by one iteration, corrected, resumed exactly."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf.callbacks import EMA, MetricGuard, MetricLimit, PPOInvariantCheck, StopOnSignal, Throughput
from lit_rlhf.callbacks.stop_on_signal import StoppedBySignal
from lit_rlhf.data import PromptDataModule
from lit_rlhf.errors import RankError, UserError
from lit_rlhf.generation import VLLMGenerator
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.strategies import FSDP2Strategy
from tests.helpers.ranks import on_ranks
from tests.helpers.services import Reply, Request, serve
from tests.helpers.small_runs import assert_same_weights, demonstrations, quiet_trainer, write_rows
from tests.helpers.vllm_server import FakeVLLM, order_of_requests, serve_vllm
from tests.modules.test_ppo_with_vllm import NumWords, completion_requests, train

CAP = 1.5


def make_module(
    model: str, url: str, folder: Path, overlap: bool = True, cap: float = CAP, rate: float = 5e-3, **settings: Any
) -> PPOModule:
    """16 episodes of 8 prompts in 4 steps."""
    ppo = PPOConfig(
        rollout_batch_size=16,
        samples_per_prompt=2,
        micro_batch_size=2,
        critic_learning_rate=1e-3,
        old_logprobs="recompute",
        importance_sampling_cap=cap,
        overlap_rollouts=overlap,
    )
    generator = VLLMGenerator(str(folder), url, retries=0, **settings)
    return PPOModule(
        model,
        NumWords(),
        SamplingParams(5),
        ppo,
        critic=model,
        generator=generator,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate),
    )


def answer_late(model: str, delay: float, numbers: range) -> Callable[[Request, int], Reply]:
    """Answer as a server, but some requests for responses late; the first 8 are those of the first iteration."""
    server, count = FakeVLLM(model), itertools.count()

    def answer(request: Request, before: int) -> Reply:
        is_late = "seed" in (request.payload or {}) and next(count) in numbers
        return server.answer(request, before)._replace(delay=delay if is_late else 0.0)

    return answer


def test_responses_are_of_the_policy_before_the_update(llama, tmp_path):
    """They are requested before it, and weighted by the ratio of the updated policy's probabilities to theirs."""
    with serve_vllm(llama) as (service, server):
        module = make_module(llama, service.url, tmp_path / "shared")
        iterations = []
        collect = module.collect_experience

        def record(prompts: Any) -> Any:
            iterations.append(collect(prompts))
            return iterations[-1]

        module.collect_experience = record  # type: ignore[method-assign]
        _, rows = train(module, tmp_path, max_epochs=3)
        assert 3 * 8 <= len(completion_requests(service)) <= 4 * 8, "those of the fourth were begun, and dropped"
        assert len(server.weights_paths) == 3
    first, *others = iterations
    assert first.importance_weights is not None and first.metrics["rollout/logprob_mismatch"] < 1e-5
    torch.testing.assert_close(first.importance_weights, first.trajectories.response_mask.float(), atol=1e-4, rtol=0)
    for iteration in others:
        sampled = iteration.trajectories
        mask = sampled.response_mask
        weights = (sampled.old_logprobs - sampled.rollout_logprobs).exp().clamp(max=CAP) * mask
        torch.testing.assert_close(iteration.importance_weights, weights)
        assert iteration.metrics["rollout/logprob_mismatch"] > 1e-3, "another policy sampled them"
        assert 0 < iteration.metrics["rollout/importance_capped_fraction"] < 1
        assert iteration.metrics["rollout/importance_weight"] == pytest.approx(float(weights[mask].mean()))
    assert rows[2]["rollout/importance_weight"] != 1


def test_a_policy_that_does_not_change_learns_the_same_with_and_without_overlap(llama, tmp_path):
    found = []
    for overlap in (False, True):
        with serve_vllm(llama) as (service, _):
            module = make_module(llama, service.url, tmp_path / f"shared-{overlap}", overlap, rate=0.0)
            _, rows = train(module, tmp_path)
            requests = completion_requests(service)[:16]
        found.append((sorted(requests), rows))
    assert found[0][0] == found[1][0], "the same prompts and seeds in each iteration"
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_resumed_run_ends_as_the_uninterrupted_one(llama, tmp_path, step, uninterrupted):
    """Within an iteration and after it: the responses that were under way are in the checkpoint."""
    checkpoint, expected = uninterrupted[0] / f"step={step}.ckpt", uninterrupted[1]
    content = torch.load(checkpoint, weights_only=True)
    assert set(content["next_rollout"]) == {"key", "output"} and ("iteration" in content) == (step % 4 != 0)
    assert content["next_rollout"]["output"]["response_ids"].shape == (16, 5)
    with serve_vllm(llama) as (service, _):
        resumed = train(make_module(llama, service.url, tmp_path / "shared"), tmp_path, start=checkpoint, max_epochs=3)
    assert all(torch.equal(one, other) for one, other in zip(expected[0], resumed[0]))
    assert resumed[1][-1] == expected[1][-1]


@pytest.fixture(scope="module")
def uninterrupted(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("uninterrupted")
    checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with serve_vllm(llama) as (service, _):
        module = make_module(llama, service.url, folder / "shared")
        return folder, train(module, folder, checkpoints, enable_checkpointing=True, max_epochs=3)


def test_responses_of_a_checkpoint_are_used_for_the_same_sampling_only(llama, tmp_path, uninterrupted, capsys):
    checkpoint = uninterrupted[0] / "step=4.ckpt"
    with serve_vllm(llama) as (service, _):
        module = make_module(llama, service.url, tmp_path / "shared")
        module.sampling = SamplingParams(4)
        _, rows = train(module, tmp_path, start=checkpoint, max_epochs=2)
        assert 8 <= len(completion_requests(service)) <= 16, "sampled again, and begun for the next"
        assert rows[-1]["response/length"] <= 4
    with serve_vllm(llama) as (service, _):
        plain = make_module(llama, service.url, tmp_path / "plain", overlap=False)
        _, rows = train(plain, tmp_path, start=checkpoint, max_epochs=2)
        assert len(completion_requests(service)) == 8 and rows[-1]["rollout/logprob_mismatch"] < 1e-5


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_learn_as_one(strategy, llama, tmp_path, uninterrupted):
    """Also from a checkpoint of one process, whose responses are divided among them; FSDP2 cannot resume from one."""
    start = uninterrupted[0] / "step=6.ckpt" if strategy == "ddp" else None

    def rank() -> Any:
        chosen: Any = FSDP2Strategy() if strategy == "fsdp2" else strategy
        settings = {"devices": 2, "strategy": chosen, "accumulate_grad_batches": 1}
        module = make_module(llama, service.url, tmp_path / "shared")
        return train(module, tmp_path, start=start, max_epochs=3, **settings)

    with serve_vllm(llama) as (service, _):
        for weights, rows in on_ranks(rank, tmp_path):
            assert_same_weights(weights, uninterrupted[1][0])
            name = "rollout/importance_weight"
            assert rows[-1][name] == pytest.approx(uninterrupted[1][1][-1][name], rel=1e-3)


def test_validation_waits_for_the_responses_that_are_under_way(llama, tmp_path):
    """It hands over other weights, and the responses are of those before."""
    path = write_rows(tmp_path / "rows.jsonl", demonstrations(16))
    with serve(answer_late(llama, 1.0, range(8, 16))) as service:
        module = make_module(llama, service.url, tmp_path / "shared")
        data = PromptDataModule(path, validation_path=path, validation_batch_size=16)
        trainer = quiet_trainer(
            tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=[EMA(0.9)], num_sanity_val_steps=0
        )
        trainer.fit(module, datamodule=data)
    order = order_of_requests(service)
    # iteration 0; the next under way; averaged weights; the weights of iteration 1
    assert order[:34] == "w" + "." * 16 + "w" + "." * 16
    assert order[34:] == "w" + "." * 8 + "w" + "." * 16


def test_a_server_that_loses_the_weights_during_the_update(llama, tmp_path):
    """The iteration samples from the policy as it is."""
    server = FakeVLLM(llama)
    count = 0

    def answer(request: Request, before: int) -> Reply:
        nonlocal count
        reply = server.answer(request, before)
        count += request.path == "/v1/completions" and "prompt_logprobs" not in request.payload
        if count == 16:  # of the first iteration and the next
            count += 1
            server.restart()
        return reply

    with serve(answer) as service:
        module = make_module(llama, service.url, tmp_path / "shared")
        _, rows = train(module, tmp_path)
        assert 24 <= len(completion_requests(service)) <= 32 and rows[1]["rollout/logprob_mismatch"] < 1e-5


def test_a_run_that_ends_does_not_wait_for_responses(llama, tmp_path):
    class Fail(PPOInvariantCheck):
        def on_before_optimizer_step(self, *_: Any) -> None:
            raise UserError("no more")

    with serve(answer_late(llama, 20.0, range(8, 99))) as service:
        start = time.monotonic()
        module = make_module(llama, service.url, tmp_path / "shared")
        with pytest.raises(UserError, match="no more"):
            train(module, tmp_path, Fail())
        assert module.generator.pending is None  # type: ignore[attr-defined]
        for thread in [each for each in threading.enumerate() if each is not threading.current_thread()]:
            if "ThreadPoolExecutor" in thread.name:
                thread.join(10)
        assert time.monotonic() - start < 15


class Schedule(Callback):
    """Violates a limit in one iteration, and keeps the weights after each."""

    def __init__(self, iteration: int) -> None:
        self.iteration, self.weights = iteration, []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.log("scheduled", float(trainer.current_epoch == self.iteration))
        self.weights.append(pl_module.policy.lm_head.weight.detach().clone())


def test_a_rollback_takes_weights_whose_own_rollout_was_good(llama, tmp_path):
    """Iteration 3 is sampled by the weights after 1: those after 0, which sampled 2, are the last good ones."""
    schedule = Schedule(3)
    limits = {"scheduled": MetricLimit(above=0.5, action="rollback")}
    with serve_vllm(llama) as (service, _), pytest.warns(UserWarning, match="rolled back to the weights of step 4"):
        module = make_module(llama, service.url, tmp_path / "shared")
        guard = MetricGuard(limits, keep_every_n_epochs=1)
        train(module, tmp_path, schedule, guard, max_epochs=4)
        assert torch.equal(module.policy.lm_head.weight, schedule.weights[0])
        assert not torch.equal(schedule.weights[0], schedule.weights[3])


def test_after_a_rollback_the_restored_policy_samples(llama, tmp_path):
    limits = {"scheduled": MetricLimit(above=0.5, action="rollback")}
    with serve_vllm(llama) as (service, _), pytest.warns(UserWarning, match="rolled back"):
        module = make_module(llama, service.url, tmp_path / "shared")
        guard = MetricGuard(limits, keep_every_n_epochs=1)
        _, rows = train(module, tmp_path, Schedule(3), guard, max_epochs=5)
    assert rows[4]["rollout/logprob_mismatch"] < 1e-5 < 1e-3 < rows[3]["rollout/logprob_mismatch"]


def test_a_server_that_fails_for_the_next_iteration_costs_no_iteration(llama, tmp_path):
    with serve_vllm(llama) as (service, _), pytest.warns(UserWarning, match="iteration 1 are not sampled .* the disk"):
        module = make_module(llama, service.url, tmp_path / "shared")
        start, calls = module.generator.start, []  # type: ignore[attr-defined]

        def fail_once(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 1:
                raise UserError("the disk is full")
            start(*args)

        module.generator.start = fail_once  # type: ignore[attr-defined]
        _, rows = train(module, tmp_path, max_epochs=3)
        assert module.policy.training, "the generator puts it into eval mode"
    assert [row["rollout/logprob_mismatch"] < 1e-5 for row in rows] == [True, True, False] and len(calls) == 3


def test_a_failure_of_one_rank_alone_ends_the_run(llama, tmp_path):
    def fail(*_: Any) -> None:
        raise RankError("the others wait")

    with serve_vllm(llama) as (service, _):
        module = make_module(llama, service.url, tmp_path / "shared")
        module.generator.start = fail  # type: ignore[attr-defined]
        with pytest.raises(RankError, match="the others wait"):
            train(module, tmp_path)


def test_the_speed_of_generating_is_not_told_by_the_time_that_was_waited(llama, tmp_path):
    for overlap in (True, False):
        with serve_vllm(llama) as (service, _):
            module = make_module(llama, service.url, tmp_path / f"shared-{overlap}", overlap)
            _, rows = train(module, tmp_path, Throughput())
        assert ("throughput/generate_tokens_per_sec" in rows[1]) is not overlap
        assert "throughput/update_tokens_per_sec" in rows[1]


def test_split_tensors_are_refused(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_rlhf.modules.ppo.tensor_parallel_size", lambda strategy: 2)
    with pytest.raises(UserError, match="tensor_parallel_size: a generator outside this process"):
        train(make_module(llama, "http://127.0.0.1:9", tmp_path / "shared", overlap=False), tmp_path)


def test_a_signal_does_not_wait_for_the_next_responses(llama, tmp_path, monkeypatch):
    """The checkpoint is written without them, and a resumed run samples them again."""
    monkeypatch.setattr("lit_rlhf.modules.ppo.STOP_TIMEOUT", 0.1)

    class Signal(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=100)
    with serve(answer_late(llama, 20.0, range(8, 99))) as service:
        start = time.monotonic()
        module = make_module(llama, service.url, tmp_path / "shared")
        with pytest.raises(StoppedBySignal):
            train(module, tmp_path, Signal(), StopOnSignal(), checkpoints, enable_checkpointing=True)
        assert time.monotonic() - start < 15
    saved = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    assert "next_rollout" not in saved and saved["global_step"] == 1


def test_settings_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"set ppo\.importance_sampling_cap, such as 2, as -c generator/vllm-overlap does"
    ):
        PPOConfig(overlap_rollouts=True, old_logprobs="recompute")
    with pytest.raises(UserError, match="all weights are 1; set it to 'recompute'"):
        PPOConfig(importance_sampling_cap=2.0)
    with pytest.raises(UserError, match=r"must be at least 1, or null, got 0\.5"):
        PPOConfig(importance_sampling_cap=0.5, old_logprobs="recompute")
    ppo = PPOConfig(overlap_rollouts=True, old_logprobs="recompute", importance_sampling_cap=2.0)
    with pytest.raises(UserError, match="CachedGenerator samples in this process"):
        PPOModule("no-such-model", NumWords(), ppo=ppo)
    with pytest.raises(UserError, match="the server sleeps during the update"):
        PPOModule("no-such-model", NumWords(), ppo=ppo, generator=VLLMGenerator(str(tmp_path), sleep=True))
