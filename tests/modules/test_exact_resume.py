"""A run resumed from any of its checkpoints ends as the unbroken one: the same weights, the same numbers logged."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lit_rlhf.callbacks import PretrainingMix
from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.loading_config import LoRA
from lit_rlhf.modules import PPOConfig, PPOModule, SFTModule
from lit_rlhf.modules.epoch_metrics import EpochMeans
from lit_rlhf.rollout.kl_controller import AdaptiveKLController
from tests.helpers.ppo_fakes import PromptData
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import demonstrations, quiet_trainer, write_rows


class Words:
    """A response's score is its number of words."""

    def prepare(self, tokenizer: Any, device: torch.device) -> None:
        """Nothing to load."""

    def score(self, episodes: Any) -> torch.Tensor:
        """Count."""
        return torch.tensor([float(len(response.split())) for response in episodes.responses])


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def ppo(model: str, folder: Path, adapter: LoRA | None = None) -> tuple[Any, Any, list[Any]]:
    """16 episodes in 4 optimizer steps of 2 micro-batches, with the mix and an adaptive KL."""
    settings = PPOConfig(rollout_batch_size=16, micro_batch_size=2, critic_learning_rate=1e-3)
    controller = AdaptiveKLController(coefficient=0.1, target=0.05, horizon=50)
    module = PPOModule(model, Words(), SamplingParams(5), settings, controller, optimizer=adam, adapter=adapter)
    text = write_rows(folder / "text.jsonl", [{"text": " ".join(f"w{i % 28}" for i in range(200))}])
    return module, PromptData(), [PretrainingMix(text, coefficient=0.5, micro_batch_size=2, seq_len=8)]


def sft(model: str, folder: Path) -> tuple[Any, Any, list[Any]]:
    """Dropout draws from the global generator."""
    rows = write_rows(folder / "rows.jsonl", demonstrations(24))
    return SFTModule(model, adam, dropout=0.2), DemonstrationDataModule(rows, micro_batch_size=2), []


def train(stage: Any, folder: Path, name: str, start: Path | None = None, **settings: Any) -> tuple[Any, Any]:
    """Run to the end; return weights and what was logged at every epoch's end, times apart."""
    module, data, callbacks = stage
    kept = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = quiet_trainer(
        folder,
        max_epochs=3,
        accumulate_grad_batches=2,
        callbacks=[*callbacks, kept],
        logger=CSVLogger(folder, name=name, version="log"),
        enable_checkpointing=True,
        **settings,
    )
    if start is not None:
        torch.rand(7)  # a fresh process's generator stands elsewhere
    trainer.fit(module, datamodule=data, ckpt_path=start)
    rows = []
    log = folder / name / "log" / "metrics.csv"
    if trainer.is_global_zero and log.exists():
        with open(log) as file:
            rows = [
                {key: value for key, value in row.items() if value and not key.startswith("time/")}
                for row in csv.DictReader(file)
                if row.get("reward/score")
            ]
    return {key: value.clone() for key, value in module.state_dict().items()}, rows


def assert_equal(one: Any, other: Any) -> None:
    assert one[0].keys() == other[0].keys()
    for name in one[0]:
        assert torch.equal(one[0][name], other[0][name]), name
    assert other[1] == one[1][len(one[1]) - len(other[1]) :], "logged metrics"


def test_ppo_with_the_mix_from_every_step_of_two_iterations(llama, tmp_path):
    whole = train(ppo(llama, tmp_path), tmp_path, "whole")
    assert len(whole[1]) == 3 and len({row["reward/kl_coefficient"] for row in whole[1]}) == 3
    for step in range(1, 9):
        content = torch.load(tmp_path / "whole" / f"step={step}.ckpt", weights_only=True)
        assert ("iteration" in content) == (step % 4 != 0)
        resumed = train(ppo(llama, tmp_path), tmp_path, f"from-{step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert len(resumed[1]) == 3 - step // 4
        assert_equal(whole, resumed)


def test_ppo_on_two_ranks(llama, tmp_path):
    ddp = {"devices": 2, "strategy": "ddp"}

    def both() -> tuple[Any, Any]:
        settings = PPOConfig(rollout_batch_size=16, micro_batch_size=1, critic_learning_rate=1e-3)

        def stage() -> tuple[Any, Any, list[Any]]:
            return PPOModule(llama, Words(), SamplingParams(5), settings, optimizer=adam), PromptData(), []

        whole = train(stage(), tmp_path, "whole", **ddp)
        return whole, train(stage(), tmp_path, "resumed", tmp_path / "whole" / "step=6.ckpt", **ddp)

    for whole, resumed in on_ranks(both, tmp_path):
        assert_equal(whole, resumed)


@pytest.mark.parametrize("step", [2, 6, 7])
def test_sft_with_dropout(model_folders, tmp_path, step):
    whole = train(sft(model_folders["gpt2"], tmp_path), tmp_path, "whole")
    start = tmp_path / "whole" / f"step={step}.ckpt"
    assert_equal(whole, train(sft(model_folders["gpt2"], tmp_path), tmp_path, "resumed", start))


def test_a_tally_is_the_mean_of_what_was_counted_whatever_the_parts():
    tally = EpochMeans()
    for total, count in ((3.0, 2), (torch.tensor(5.0), torch.tensor(1))):
        tally.add("a", total, count)
    tally.add("empty", 0.0, 0)
    restarted = EpochMeans()
    restarted.load(tally.over_ranks(lambda figures: figures), first_rank=True)
    restarted.add("a", 1.0, 1)
    assert restarted.means(lambda figures: 2 * figures) == {"a": torch.tensor(9.0 / 4)}
    assert restarted.means(lambda figures: figures) == {}
