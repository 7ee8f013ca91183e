"""Seconds and rates of a PPO iteration are consistent, and MFU equals a count by hand."""

from typing import Any

import lightning as L
import pytest
import torch

from lit_rlhf.callbacks import Throughput, throughput
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.rewards.base import Reward
from tests.helpers.ppo_fakes import PromptData


class LetterCount(Reward):
    """Scores the length in letters."""

    def score(self, episodes: Any) -> torch.Tensor:
        return torch.tensor([float(len(response)) for response in episodes.responses])


class RecordMetrics(L.Callback):
    """Store the logged metrics and the number of tokens."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Store them; this callback follows the one under test."""
        trajectories = trainer.train_dataloader.iteration.trajectories
        counts = {"all": int(trajectories.attention_mask.sum()), "response": int(trajectories.response_mask.sum())}
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()} | counts)


@pytest.fixture
def run(llama, make_trainer) -> Any:
    def fit() -> tuple[list[dict[str, float]], PPOModule]:
        settings = PPOConfig(rollout_batch_size=8, micro_batch_size=4, ppo_epochs=2)
        module, recorder = PPOModule(llama, LetterCount(), SamplingParams(max_new_tokens=6), settings), RecordMetrics()
        make_trainer(max_epochs=2, callbacks=[Throughput(), recorder]).fit(module, datamodule=PromptData())
        return recorder.epochs, module

    return fit


def test_rates_are_tokens_over_seconds(run):
    for epoch in run()[0]:
        assert epoch["throughput/generate_tokens_per_sec"] * epoch["time/generate"] == pytest.approx(
            epoch["response"], rel=1e-5
        )
        assert epoch["throughput/score_tokens_per_sec"] * epoch["time/score"] == pytest.approx(epoch["all"], rel=1e-5)
        assert epoch["throughput/update_tokens_per_sec"] * epoch["time/update"] == pytest.approx(
            2 * epoch["all"], rel=1e-5
        )
        assert epoch["time/other"] >= 0
        assert "throughput/mfu" not in epoch  # the FLOPs of a CPU are unknown


def test_mfu_counts_six_flops_per_weight_and_token(run, monkeypatch):
    monkeypatch.setattr(throughput, "get_available_flops", lambda device, dtype: 10**9 if dtype == torch.float32 else 0)
    epochs, module = run()
    weights = sum(p.numel() for model in (module.policy, module.critic) for p in model.parameters())
    flops = 6 * weights * 2 * epochs[1]["all"]
    assert epochs[1]["throughput/mfu"] == pytest.approx(flops / (epochs[1]["time/update"] * 1e9), rel=1e-5)
