"""Centering: the demonstrations score 0 on average, in the module, its checkpoint, its export and after a reload."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForSequenceClassification

from lit_rlhf.callbacks import EMA, CenterScores, ExportModel
from lit_rlhf.cli import main
from lit_rlhf.data import ComparisonDataModule
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.scalar_model import ScalarModel, load_scalar_model
from lit_rlhf.modules import RewardModule
from lit_rlhf.strategies import FSDP2Strategy
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import demonstrations, quiet_trainer, rankings, sgd, write_rows

ROWS = demonstrations(40)


def compute_mean_score(model: ScalarModel, tokenizer: Any) -> float:
    """Return the mean score of the demonstrations, scored one by one."""
    scores = []
    for row in ROWS:
        ids = torch.tensor([[*tokenizer.encode(row["prompt"]), *tokenizer.encode(row["completion"]), 1]])
        scores.append(float(model.eval().score(ids, torch.ones_like(ids)).detach()))
    return sum(scores) / len(scores)


def fit(llama: str, folder: Path, adapter: LoRA | None = None, **settings: Any) -> RewardModule:
    validation, micro_batch_size = settings.pop("validation", True), settings.pop("micro_batch_size", 4)
    comparisons = write_rows(folder / "rankings.jsonl", rankings(16))
    data = ComparisonDataModule(
        comparisons, validation_path=comparisons if validation else None, micro_batch_size=micro_batch_size
    )
    module = RewardModule(llama, sgd(0.1), adapter=adapter)
    centering = CenterScores(write_rows(folder / "demonstrations.jsonl", ROWS), batch_size=16)
    # last in the list: Lightning moves checkpoint callbacks to the end
    save = ModelCheckpoint(folder / "kept", save_last=True, every_n_train_steps=settings.pop("save_every", None))
    callbacks = [save, ExportModel(), centering]
    trainer = quiet_trainer(folder, max_epochs=2, enable_checkpointing=True, callbacks=callbacks, **settings)
    trainer.fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("validation", [True, False], ids=["validation", "no_validation"])
def test_demonstrations_score_zero_in_module_export_and_checkpoint(validation, llama, tokenizer, tmp_path):
    module = fit(llama, tmp_path, validation=validation)
    assert abs(float(module.model.shift)) > 0.01, "a shift of zero would test nothing"
    assert compute_mean_score(module.model, tokenizer) == pytest.approx(0, abs=1e-4)

    exported = load_scalar_model(str(tmp_path / "model"), tokenizer, ModelLoadingConfig())
    assert exported.is_centered
    assert compute_mean_score(exported, tokenizer) == pytest.approx(0, abs=1e-4)

    assert main(["export", str(tmp_path / "kept" / "last.ckpt"), str(tmp_path / "from_checkpoint")]) == 0
    from_checkpoint = load_scalar_model(str(tmp_path / "from_checkpoint"), tokenizer, ModelLoadingConfig())
    assert from_checkpoint.is_centered
    assert compute_mean_score(from_checkpoint, tokenizer) == pytest.approx(0, abs=1e-4)

    # plain transformers returns the raw score; the shift is in the config
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    ids = torch.tensor([[5, 6, 7, 1]])
    centered_score = (float(plain(ids).logits.detach()) - plain.config.score_shift) / plain.config.score_scale
    assert centered_score == pytest.approx(float(exported.eval().score(ids, torch.ones_like(ids)).detach()), abs=1e-5)


@pytest.mark.parametrize("save_every", [3, 8])
def test_the_last_checkpoint_by_steps_is_centered(save_every, llama, tokenizer, tmp_path):
    module = fit(llama, tmp_path, validation=False, save_every=save_every)  # 8 steps
    content = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 8
    assert content["state_dict"]["model.shift"] == module.model.shift != 0


def test_centering_lets_no_checkpoint_be_written_within_an_accumulation(llama, tmp_path, monkeypatch):
    saved = []
    save = ModelCheckpoint._save_checkpoint

    def record(self: Any, trainer: Any, path: str) -> None:
        saved.append((trainer.global_step, trainer.fit_loop.batch_idx + 1))
        save(self, trainer, path)

    monkeypatch.setattr(ModelCheckpoint, "_save_checkpoint", record)
    # 2 batches of 4 a step, validated and saved at each; Lightning asks whether to save at every batch
    fit(llama, tmp_path, save_every=1, micro_batch_size=2, accumulate_grad_batches=4, val_check_interval=4)
    assert saved
    assert all(batch % 4 == 0 for _, batch in saved)


def test_a_resumed_run_has_the_constants_of_its_checkpoint(llama, tokenizer, tmp_path):
    module = fit(llama, tmp_path)
    again = RewardModule(llama, sgd(0.1))
    data = ComparisonDataModule(str(tmp_path / "rankings.jsonl"), micro_batch_size=4)
    checkpoint = str(tmp_path / "kept" / "last.ckpt")
    quiet_trainer(tmp_path, max_epochs=2).fit(again, datamodule=data, ckpt_path=checkpoint)
    assert again.model.is_centered
    assert float(again.model.shift) == pytest.approx(float(module.model.shift))
    assert compute_mean_score(again.model, tokenizer) == pytest.approx(0, abs=1e-4)


def test_dropout_of_an_adapter_does_not_change_the_mean(llama, tokenizer, tmp_path):
    module = fit(llama, tmp_path, adapter=LoRA(rank=2, dropout=0.5))
    assert compute_mean_score(module.model, tokenizer) == pytest.approx(0, abs=1e-4)


def test_sharded_scores_are_centered_and_exported(llama, tokenizer, tmp_path):
    (tmp_path / "one").mkdir()
    unsharded = fit(llama, tmp_path / "one")

    def train() -> float:
        sizes = {"devices": 2, "strategy": FSDP2Strategy(), "micro_batch_size": 2}
        return float(fit(llama, tmp_path, **sizes).model.shift)

    assert on_ranks(train, tmp_path) == pytest.approx([float(unsharded.model.shift)] * 2, abs=1e-5)
    exported = load_scalar_model(str(tmp_path / "model"), tokenizer, ModelLoadingConfig())
    assert compute_mean_score(exported, tokenizer) == pytest.approx(0, abs=1e-4)


def test_validation_alone_needs_no_demonstrations(llama, tmp_path):
    comparisons = write_rows(tmp_path / "rankings.jsonl", rankings(8))
    data = ComparisonDataModule(comparisons, validation_path=comparisons, micro_batch_size=4)
    module = RewardModule(llama)
    centering = CenterScores(str(tmp_path / "demonstrations.jsonl"))
    quiet_trainer(tmp_path, callbacks=[centering]).validate(module, datamodule=data, verbose=False)
    assert not module.model.is_centered


def test_centering_does_not_change_training(llama, tmp_path):
    """The loss depends on score differences only, so the weights are those of a run without centering."""
    centered = fit(llama, tmp_path)
    plain = RewardModule(llama, sgd(0.1))
    comparisons = str(tmp_path / "rankings.jsonl")
    data = ComparisonDataModule(comparisons, validation_path=comparisons, micro_batch_size=4)
    quiet_trainer(tmp_path, max_epochs=2).fit(plain, datamodule=data)
    for actual, expected in zip(centered.parameters(), plain.parameters()):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("validation", [True, False], ids=["validation", "no_validation"])
@pytest.mark.parametrize("order", [1, -1], ids=["average first", "average last"])
def test_the_average_is_centered_not_the_current_weights(order, validation, llama, tokenizer, tmp_path):
    rows = rankings(8)
    data = ComparisonDataModule(rows, validation_path=rows[:1] if validation else None, micro_batch_size=4)
    module = RewardModule(llama, sgd(0.2))
    callbacks = [EMA(0.9), CenterScores(ROWS)][::order]
    quiet_trainer(tmp_path, max_epochs=2, callbacks=callbacks).fit(module, datamodule=data)
    assert compute_mean_score(module.model, tokenizer) == pytest.approx(0, abs=1e-4)
