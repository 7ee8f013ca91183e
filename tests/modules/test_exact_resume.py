"""A run resumed from any of its checkpoints ends with the weights and logged metrics of the uninterrupted one."""

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
from lit_rlhf.rewards import Reward
from lit_rlhf.rollout.kl_controller import AdaptiveKLController
from tests.helpers.ppo_fakes import PromptData
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import demonstrations, quiet_trainer, write_rows


class NumWords(Reward):
    """The score of a response is its number of words."""

    def score(self, episodes: Any) -> torch.Tensor:
        """Count words."""
        return torch.tensor([float(len(response.split())) for response in episodes.responses])


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def make_ppo(model: str, folder: Path, adapter: LoRA | None = None) -> tuple[Any, Any, list[Any]]:
    """16 episodes in 4 optimizer steps of 2 micro-batches, with the pretraining mix and adaptive KL."""
    settings = PPOConfig(rollout_batch_size=16, micro_batch_size=2, critic_learning_rate=1e-3)
    controller = AdaptiveKLController(coefficient=0.1, target=0.05, horizon=50)
    module = PPOModule(model, NumWords(), SamplingParams(5), settings, controller, optimizer=adam, adapter=adapter)
    text = write_rows(folder / "text.jsonl", [{"text": " ".join(f"w{i % 28}" for i in range(200))}])
    return module, PromptData(), [PretrainingMix(text, coefficient=0.5, micro_batch_size=2, seq_len=8)]


def make_sft(model: str, folder: Path) -> tuple[Any, Any, list[Any]]:
    """Dropout uses the global random generator."""
    rows = write_rows(folder / "rows.jsonl", demonstrations(24))
    return SFTModule(model, adam, dropout=0.2), DemonstrationDataModule(rows, micro_batch_size=2), []


def train(stage: Any, folder: Path, name: str, start: Path | None = None, **settings: Any) -> tuple[Any, Any]:
    """Train to the end; return the weights and the metrics logged at every epoch's end, without times."""
    module, data, callbacks = stage
    checkpoints = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = quiet_trainer(
        folder,
        max_epochs=3,
        accumulate_grad_batches=2,
        callbacks=[*callbacks, checkpoints],
        logger=CSVLogger(folder, name=name, version="log"),
        enable_checkpointing=True,
        **settings,
    )
    if start is not None:
        torch.rand(7)  # a new process's generator is in another state
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


def test_ppo_ptx_from_every_step_of_two_iterations(llama, tmp_path):
    uninterrupted = train(make_ppo(llama, tmp_path), tmp_path, "uninterrupted")
    assert len(uninterrupted[1]) == 3 and len({row["reward/kl_coefficient"] for row in uninterrupted[1]}) == 3
    for step in range(1, 9):
        content = torch.load(tmp_path / "uninterrupted" / f"step={step}.ckpt", weights_only=True)
        assert ("iteration" in content) == (step % 4 != 0)
        resumed = train(
            make_ppo(llama, tmp_path), tmp_path, f"from-{step}", tmp_path / "uninterrupted" / f"step={step}.ckpt"
        )
        assert len(resumed[1]) == 3 - step // 4
        assert_equal(uninterrupted, resumed)


def test_ppo_on_two_ranks(llama, tmp_path):
    ddp = {"devices": 2, "strategy": "ddp"}

    def run_both() -> tuple[Any, Any]:
        settings = PPOConfig(rollout_batch_size=16, micro_batch_size=1, critic_learning_rate=1e-3)

        def stage() -> tuple[Any, Any, list[Any]]:
            return PPOModule(llama, NumWords(), SamplingParams(5), settings, optimizer=adam), PromptData(), []

        uninterrupted = train(stage(), tmp_path, "uninterrupted", **ddp)
        return uninterrupted, train(stage(), tmp_path, "resumed", tmp_path / "uninterrupted" / "step=6.ckpt", **ddp)

    for uninterrupted, resumed in on_ranks(run_both, tmp_path):
        assert_equal(uninterrupted, resumed)


@pytest.mark.parametrize("step", [2, 6, 7])
def test_sft_with_dropout(model_folders, tmp_path, step):
    uninterrupted = train(make_sft(model_folders["gpt2"], tmp_path), tmp_path, "uninterrupted")
    start = tmp_path / "uninterrupted" / f"step={step}.ckpt"
    assert_equal(uninterrupted, train(make_sft(model_folders["gpt2"], tmp_path), tmp_path, "resumed", start))


@pytest.mark.parametrize("make", [make_sft, make_ppo])
@pytest.mark.parametrize("end", [{"max_epochs": 2}, {"max_steps": 6}, {"max_steps": 7}])
def test_the_last_checkpoint_is_of_the_last_step_and_goes_on(make, end, model_folders, tmp_path):
    def fit(name: str, start: Path | None = None, **limits: Any) -> Any:
        module, data, callbacks = make(model_folders["gpt2"], tmp_path)
        save = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=5, save_last=True)
        settings = {"accumulate_grad_batches": 2, "enable_checkpointing": True, **limits}
        torch.rand(7 if start else 1)
        run = quiet_trainer(tmp_path, callbacks=[*callbacks, save], **settings)
        run.fit(module, datamodule=data, ckpt_path=start)
        return run.global_step, {key: value.clone() for key, value in module.state_dict().items()}

    steps, weights = fit("first", **end)
    last = tmp_path / "first" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    assert steps % 5 and content["global_step"] == steps
    for name, weight in content["state_dict"].items():
        assert torch.equal(weight, weights[name]), name
    unbroken, resumed = fit("unbroken", max_epochs=3), fit("resumed", last, max_epochs=3)
    assert resumed[0] == unbroken[0]
    assert_equal((unbroken[1], []), (resumed[1], []))
