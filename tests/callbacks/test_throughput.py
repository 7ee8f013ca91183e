"""Seconds and rates of a PPO iteration against each other, and utilisation against a count by hand."""

from typing import Any

import lightning as L
import pytest
import torch

from lit_rlhf.callbacks import Throughput, throughput
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.modules import PPOConfig, PPOModule
from tests.helpers.ppo_fakes import PromptData


class Letters:
    """Scores the length in letters."""

    def prepare(self, *_: Any) -> None:
        """Nothing to load."""

    def score(self, episodes: Any) -> torch.Tensor:
        """Return it."""
        return torch.tensor([float(len(response)) for response in episodes.responses])


class Figures(L.Callback):
    """What was logged, and how many tokens there were."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep them; this callback comes after the one under test."""
        iteration = pl_module.loader.iteration.trajectories
        counts = {"all": int(iteration.attention_mask.sum()), "response": int(iteration.response_mask.sum())}
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()} | counts)


@pytest.fixture
def run(llama, trainer_of) -> Any:
    def fit() -> tuple[list[dict[str, float]], PPOModule]:
        settings = PPOConfig(rollout_batch_size=8, micro_batch_size=4, ppo_epochs=2)
        module, figures = PPOModule(llama, Letters(), SamplingParams(max_new_tokens=6), settings), Figures()
        trainer_of(max_epochs=2, callbacks=[Throughput(), figures]).fit(module, datamodule=PromptData())
        return figures.epochs, module

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
        assert "throughput/mfu" not in epoch  # of a CPU nothing is known


def test_utilisation_counts_six_operations_a_weight_and_token(run, monkeypatch):
    monkeypatch.setattr(throughput, "get_available_flops", lambda device, dtype: 10**9 if dtype == torch.float32 else 0)
    epochs, module = run()
    weights = sum(p.numel() for model in (module.policy, module.critic) for p in model.parameters())
    done = 6 * weights * 2 * epochs[1]["all"]
    assert epochs[1]["throughput/mfu"] == pytest.approx(done / (epochs[1]["time/update"] * 1e9), rel=1e-5)
