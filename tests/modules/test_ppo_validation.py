"""PPO's validation: mean score and KL over every validation prompt once, whatever the batches and ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rlhf.data import PromptDataModule
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.rewards import Reward
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import demonstrations, quiet_trainer, write_rows


class RecordingReward(Reward):
    """Scores a response by its words, and records the scores."""

    def __init__(self) -> None:
        self.scores: list[float] = []

    def score(self, episodes: Any) -> torch.Tensor:
        """Count the words w1 to w9."""
        scores = [float(sum(len(word) == 2 for word in response.split())) for response in episodes.responses]
        self.scores += scores
        return torch.tensor(scores)


def validate(model: str, reference: str, path: str, folder: Path, micro_batch_size: int, **settings: Any) -> Any:
    reward = RecordingReward()
    sizes = PPOConfig(rollout_batch_size=4, micro_batch_size=2)
    module = PPOModule(model, reward, SamplingParams(6), sizes, reference=reference, critic=model)
    data = PromptDataModule(path, validation_path=path, validation_batch_size=micro_batch_size)
    trainer = quiet_trainer(folder, **settings)
    return trainer.validate(module, datamodule=data, verbose=False)[0], reward.scores


def test_every_prompt_counts_once_on_one_process_and_two(model_folders, llama, tmp_path):
    path, reference = write_rows(tmp_path / "rows.jsonl", demonstrations(5)), model_folders["qwen2"]
    expected, scores = validate(llama, reference, path, tmp_path, 5)
    assert len(scores) == 5 and len(set(scores)) > 1
    assert expected["validation/score"] == pytest.approx(sum(scores) / 5, rel=1e-6)
    assert abs(expected["validation/kl"]) > 0.1
    assert validate(llama, reference, path, tmp_path, 2)[0] == pytest.approx(expected, rel=1e-5)
    ddp = {"devices": 2, "strategy": "ddp"}  # the fifth prompt is alone: the second rank has none left
    for metrics, _ in on_ranks(lambda: validate(llama, reference, path, tmp_path, 2, **ddp), tmp_path):
        assert metrics == pytest.approx(expected, rel=1e-5)


def test_a_model_that_was_only_validated_can_be_saved(llama, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", demonstrations(4))
    module = PPOModule(
        llama, RecordingReward(), SamplingParams(4), PPOConfig(rollout_batch_size=4, micro_batch_size=2), critic=llama
    )
    trainer = quiet_trainer(tmp_path)
    trainer.validate(module, datamodule=PromptDataModule(path, validation_path=path), verbose=False)
    trainer.save_checkpoint(tmp_path / "validated.ckpt")
    assert "iteration" not in torch.load(tmp_path / "validated.ckpt", weights_only=True)


def test_a_validation_after_training_keeps_the_position_of_the_run(llama, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", demonstrations(4))
    ppo = PPOConfig(rollout_batch_size=4, micro_batch_size=2)
    module = PPOModule(llama, RecordingReward(), SamplingParams(4), ppo, critic=llama)
    trainer, data = quiet_trainer(tmp_path, max_epochs=2), PromptDataModule(path, validation_path=path)
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert saved["collected"] == {"iterations": 2, "prompts": 8, "episodes": 8}
