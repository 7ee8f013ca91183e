"""PPO with responses from a stand-in for a vLLM server: weights synced once per iteration, resume, two ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from lit_rlhf.callbacks import EMA, PPOInvariantCheck
from lit_rlhf.data import PromptDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.generation.vllm import VLLMGenerator
from lit_rlhf.models.loading_config import LoRA
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.rewards import Reward
from lit_rlhf.strategies import FSDP2Strategy
from tests.helpers.ppo_fakes import PromptData
from tests.helpers.ranks import on_ranks
from tests.helpers.services import Reply, Service, refused_url
from tests.helpers.small_runs import (
    assert_same_weights,
    demonstrations,
    full_weights,
    largest_change,
    quiet_trainer,
    write_rows,
)
from tests.helpers.vllm_server import order_of_requests, serve_vllm


class NumWords(Reward):
    """The score of a response is its number of words."""

    def score(self, episodes: Any) -> torch.Tensor:
        """Count words."""
        return torch.tensor([float(len(response.split())) for response in episodes.responses])


class RecordMetrics(Callback):
    """Records the metrics of every iteration, without times."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Record them."""
        metrics = trainer.callback_metrics.items()
        self.rows.append({name: float(value) for name, value in metrics if not name.startswith("time/")})


def make_module(model: str, url: str, folder: Path, old_logprobs: str = "recompute", **settings: Any) -> PPOModule:
    """16 episodes of 8 prompts in 4 steps."""
    ppo = PPOConfig(
        rollout_batch_size=16,
        samples_per_prompt=2,
        micro_batch_size=2,
        critic_learning_rate=1e-3,
        old_logprobs=old_logprobs,
    )
    return PPOModule(
        model,
        NumWords(),
        SamplingParams(5),
        ppo,
        critic=model,
        generator=VLLMGenerator(str(folder), url, retries=0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3),
        **settings,
    )


def train(module: PPOModule, folder: Path, *callbacks: Any, start: Path | None = None, **settings: Any) -> Any:
    """Two iterations; return weights and metrics."""
    recorder = RecordMetrics()
    trainer_settings = {
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "callbacks": [PPOInvariantCheck(), recorder, *callbacks],
        **settings,
    }
    trainer = quiet_trainer(folder, **trainer_settings)
    trainer.fit(module, datamodule=PromptData(), ckpt_path=start)
    return full_weights(module.policy), recorder.rows


def completion_requests(service: Service) -> list[str]:
    """The requests for responses, without those that probe weights, and without the salt, which is of one push."""
    sent = [request.payload for request in service.requests if request.path == "/v1/completions"]
    return [json.dumps({**payload, "cache_salt": ""}) for payload in sent if "prompt_logprobs" not in payload]


@pytest.mark.parametrize("adapter", [None, LoRA(rank=4, alpha=8)], ids=["full", "lora"])
def test_two_iterations(adapter, llama, tmp_path):
    with serve_vllm(llama) as (service, server):
        module = make_module(llama, service.url, tmp_path / "shared", adapter=adapter)
        _, rows = train(module, tmp_path)
        assert len(server.weights_paths) == 2, "once per iteration, and not for the weights after the last"
        assert len(completion_requests(service)) == 16
    assert len(rows) == 2
    for row in rows:  # in the second iteration small only if the server had read the new weights
        assert row["rollout/logprob_mismatch"] < 1e-5 and row["rollout/logprob_mismatch_max"] < 1e-4
    assert rows[1]["policy/approx_kl"] != 0 and rows[0]["reward/kl"] == pytest.approx(0, abs=1e-3)
    assert abs(rows[1]["reward/kl"]) > 1e-2, "the policy moved"


def test_stale_weights_end_the_run(llama, tmp_path, monkeypatch):
    with serve_vllm(llama) as (service, server):
        monkeypatch.setattr(server, "reload", lambda _: Reply({"results": [None]}))
        module = make_module(llama, service.url, tmp_path / "shared")
        with pytest.raises(UserError, match="its log-probs of a prompt differ from the policy's by"):
            train(module, tmp_path)
        assert module.num_iterations == 1, "the first iteration is of the weights that the server started with"


def test_a_resumed_run_sends_the_same_requests_and_ends_with_the_same_weights(llama, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with serve_vllm(llama) as (service, _):
        module = make_module(llama, service.url, tmp_path / "shared")
        expected = train(module, tmp_path, checkpoints, enable_checkpointing=True)
        requests = completion_requests(service)
    for step in (2, 4):  # within the first iteration, and after it
        with serve_vllm(llama) as (service, server):
            module = make_module(llama, service.url, tmp_path / "shared")
            resumed = train(module, tmp_path, start=tmp_path / f"step={step}.ckpt")
            assert len(server.weights_paths) == 1, "the server was restarted with the initial weights"
            assert sorted(completion_requests(service)) == sorted(requests[8:])
        assert all(torch.equal(one, other) for one, other in zip(expected[0], resumed[0]))
        assert resumed[1][-1] == expected[1][-1]


@pytest.mark.parametrize(("strategy", "adapter"), [("ddp", None), ("fsdp2", None), ("fsdp2", LoRA(rank=4, alpha=8))])
def test_two_ranks_request_their_own_rows_and_rank_zero_syncs_weights(strategy, adapter, llama, tmp_path):
    with serve_vllm(llama) as (service, _):
        module = make_module(llama, service.url, tmp_path / "shared", adapter=adapter)
        start = full_weights(AutoModelForCausalLM.from_pretrained(llama))
        expected, _ = train(module, tmp_path)
        single_process = completion_requests(service)

    def rank() -> Any:
        module = make_module(llama, service.url, tmp_path / "shared", adapter=adapter)
        chosen = FSDP2Strategy() if strategy == "fsdp2" else strategy
        return train(module, tmp_path, devices=2, strategy=chosen, accumulate_grad_batches=1)

    with serve_vllm(llama) as (service, server):
        ranks = on_ranks(rank, tmp_path)
        assert len(server.weights_paths) == 2
        assert len(completion_requests(service)) == 16
        first = {(payload["seed"], *payload["prompt"]) for payload in map(json.loads, completion_requests(service)[:8])}
        assert first == {(payload["seed"], *payload["prompt"]) for payload in map(json.loads, single_process[:8])}
    for weights, rows in ranks:
        assert_same_weights(weights, expected)
        assert rows[1]["rollout/logprob_mismatch"] < 1e-5
    assert adapter or largest_change(expected, start) > 1e-3


def test_validation_syncs_the_weights_that_it_validates(llama, tmp_path):
    """Averaged weights replace the trained ones during validation, and are replaced by them afterwards."""
    path = write_rows(tmp_path / "rows.jsonl", demonstrations(16))
    with serve_vllm(llama) as (service, server):
        module = make_module(llama, service.url, tmp_path / "shared")
        data = PromptDataModule(path, validation_path=path, validation_batch_size=8)
        trainer = quiet_trainer(
            tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=[EMA(0.9)], num_sanity_val_steps=0
        )
        trainer.fit(module, datamodule=data)
        assert len(server.weights_paths) == 4 and len(set(server.weights_paths)) == 4  # two iterations, two validations
    order = order_of_requests(service)
    assert order == "w........" + "w" + "." * 16 + "w........" + "w" + "." * 16


def test_a_server_that_fails_on_the_first_rank_ends_every_rank(llama, tmp_path):
    def rank() -> str:
        module = make_module(llama, url, tmp_path / "shared")
        with pytest.raises(UserError) as problem:
            train(module, tmp_path, devices=2, strategy="ddp", accumulate_grad_batches=1)
        return str(problem.value)

    with refused_url() as url:
        for message in on_ranks(rank, tmp_path):
            assert message.startswith(f"vLLM at {url}: it has stopped (")


def test_old_logprobs_of_the_rollout_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match=r"set ppo\.old_logprobs to 'recompute', as -c generator/vllm does"):
        make_module("no-such-model", "http://127.0.0.1:1", tmp_path, old_logprobs="rollout")
