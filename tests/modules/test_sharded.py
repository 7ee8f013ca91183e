"""FSDP2 on two gloo ranks gives the weights of one process, for all three modules."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from ppo_fakes import PromptData
from ranks import on_ranks
from small_runs import assert_same_weights, demonstrations, quiet_trainer, rankings, sgd, whole_weights, write_rows

from lit_rlhf.cli import main
from lit_rlhf.data import ComparisonDataModule, DemonstrationDataModule
from lit_rlhf.modules import PPOModule, PPOSettings, RewardModule, SFTModule
from lit_rlhf.rollout.sampling import Sampling
from lit_rlhf.strategies import FSDP2Strategy


class CountOf:
    """Scores the share of one word."""

    def prepare(self, *_: Any) -> None:
        """Nothing to load."""

    def score(self, episodes: Any) -> torch.Tensor:
        """Return the share."""
        return torch.tensor([response.split().count("w3") / 8 for response in episodes.responses])


def sft(model: str, folder: Path, micro_batch: int) -> tuple[L.LightningModule, L.LightningDataModule]:
    path = write_rows(folder / "rows.jsonl", demonstrations(24))
    return SFTModule(model, sgd(0.1)), DemonstrationDataModule(path, micro_batch=micro_batch)


def reward(model: str, folder: Path, micro_batch: int) -> tuple[L.LightningModule, L.LightningDataModule]:
    path = write_rows(folder / "rows.jsonl", rankings(24))
    return RewardModule(model, sgd(0.3)), ComparisonDataModule(path, micro_batch=micro_batch)


def ppo(model: str, folder: Path, micro_batch: int) -> tuple[L.LightningModule, L.LightningDataModule]:
    settings = PPOSettings(rollout_batch=24, micro_batch=micro_batch, epochs=2, critic_learning_rate=0.05)
    return PPOModule(model, CountOf(), Sampling(8), settings, optimizer=sgd(0.1)), PromptData()


def train(stage: Any, model: str, folder: Path, micro_batch: int, **settings: Any) -> Any:
    module, data = stage(model, folder, micro_batch)
    if settings.get("devices") == 2:
        settings["strategy"] = FSDP2Strategy()
    trainer = quiet_trainer(folder, max_epochs=2, gradient_clip_val=0.05, **settings)
    trainer.fit(module, datamodule=data)
    assert hasattr(next(module.parameters()), "full_tensor") == (settings.get("devices") == 2), "sharded, or not"
    trainer.save_checkpoint(folder / "sharded.ckpt")
    return whole_weights(module)


@pytest.mark.parametrize("stage", [sft, reward, ppo])
def test_sharded_weights_are_those_of_one_process(stage, llama, tmp_path):
    one = train(stage, llama, tmp_path, 12)
    checkpoint = torch.load(tmp_path / "sharded.ckpt", weights_only=True)["state_dict"]
    (tmp_path / "sharded.ckpt").unlink()
    for weights in on_ranks(lambda: train(stage, llama, tmp_path, 3, devices=2, accumulate_grad_batches=2), tmp_path):
        assert_same_weights(weights, one)
    saved = torch.load(tmp_path / "sharded.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == checkpoint.keys()
    for name, weight in checkpoint.items():
        torch.testing.assert_close(saved[name], weight, atol=1e-5, rtol=1e-5, msg=name)
    assert main(["export", str(tmp_path / "sharded.ckpt"), str(tmp_path / "model")]) == 0
    assert not json.loads((tmp_path / "model" / "config.json").read_text())["architectures"][0].startswith("FSDP")
