"""The loss on pretraining text equals that of plain transformers, at any batch size, on one rank, two, and sharded."""

import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlhf.callbacks import ExportModel, PretrainingValidation
from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.modules import PPOConfig, PPOModule, SFTModule
from lit_rlhf.rewards.base import Reward
from lit_rlhf.strategies import FSDP2Strategy
from tests.helpers.ppo_fakes import PromptData
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import demonstrations, quiet_trainer, sgd, words, write_rows


class RecordLoss(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float | None] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = trainer.callback_metrics.get("validation/pretraining_loss")
        self.losses.append(None if loss is None else round(float(loss), 6))


@pytest.fixture
def text(tmp_path: Path) -> str:
    generator = random.Random(0)
    return write_rows(tmp_path / "text.jsonl", [{"text": " ".join(words(generator, 9))} for _ in range(13)])


def compute_reference(folder: Path, text: str) -> float:
    """Return the mean loss of 13 documents of 9 words and an end token, one per block of 10."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    losses = []
    for line in Path(text).read_text().splitlines():
        ids = torch.tensor([[*tokenizer.encode(line.split('"')[3]), tokenizer.eos_token_id]])
        losses.append(float(model(ids, labels=ids).loss.detach()))
    return sum(losses) / len(losses)


def train(model: str, folder: Path, text: str, batch_size: int, **settings: Any) -> float:
    data = DemonstrationDataModule(write_rows(folder / "rows.jsonl", demonstrations(16)), micro_batch_size=4)
    callback = PretrainingValidation(text, seq_len=10, batch_size=batch_size)
    trainer = quiet_trainer(folder, max_epochs=1, callbacks=[callback, ExportModel()], **settings)
    trainer.fit(SFTModule(model, sgd(0.2)), datamodule=data)
    return float(trainer.callback_metrics["validation/pretraining_loss"])


def test_it_is_the_loss_of_plain_transformers(llama, text, tmp_path):
    loss = train(llama, tmp_path, text, 4)
    assert loss == pytest.approx(compute_reference(tmp_path / "model", text), abs=1e-5)
    assert abs(loss - compute_reference(Path(llama), text)) > 1e-2
    assert train(llama, tmp_path, text, 32) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_share_the_text_and_log_the_same_loss(strategy, llama, text, tmp_path):
    def rank() -> float:
        return train(llama, tmp_path, text, 3, devices=2, strategy="ddp" if strategy == "ddp" else FSDP2Strategy())

    one, other = on_ranks(rank, tmp_path)
    assert one == other == pytest.approx(compute_reference(tmp_path / "model", text), abs=1e-5)


def test_ppo_is_evaluated_every_n_epochs_and_at_the_end(llama, text, tmp_path, monkeypatch):
    recorder = RecordLoss()
    reward = type("Zero", (Reward,), {"score": lambda _, episodes: torch.zeros(len(episodes.responses))})()
    module = PPOModule(
        llama, reward, SamplingParams(max_new_tokens=4), PPOConfig(rollout_batch_size=8, micro_batch_size=4)
    )
    callback = PretrainingValidation(text, every_n_epochs=2, seq_len=10)
    evaluated: list[int] = []
    sum_losses = callback.sum_losses
    monkeypatch.setattr(
        callback,
        "sum_losses",
        lambda trainer, module: evaluated.append(trainer.current_epoch) or sum_losses(trainer, module),
    )
    quiet_trainer(tmp_path, max_epochs=5, callbacks=[callback, recorder]).fit(module, datamodule=PromptData())
    assert evaluated == [1, 3, 4]
    assert recorder.losses[0] is None and None not in recorder.losses[1:]
    assert module.policy.training


def test_invalid_settings_are_refused(llama, text, tmp_path):
    for name in ("every_n_epochs", "batch_size", "limit"):
        with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
            PretrainingValidation(text, **{name: 0})
    with pytest.raises(UserError, match="block has 200 tokens, more than the model's 128 positions"):
        callback = PretrainingValidation(text, seq_len=200)
        callback.setup(quiet_trainer(tmp_path), SFTModule(llama), "fit")
