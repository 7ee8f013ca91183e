"""ExportModel, LogSamples and TerminateOnNaN."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.callbacks import ExportModel, LogHistograms, LogSamples, PretrainingMix, TerminateOnNaN
from lit_rlhf.data import ComparisonDataModule, DemonstrationDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.loading_config import LoRA
from lit_rlhf.modules import PPOConfig, PPOModule, RewardModule, SFTModule
from lit_rlhf.rewards.base import Reward
from lit_rlhf.strategies import FSDP2Strategy
from tests.callbacks.fake_wandb_logger import FakeWandbLogger
from tests.helpers.ppo_fakes import PromptData
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import demonstrations, quiet_trainer, rankings, sgd, write_rows

IDS = torch.tensor([[5, 6, 7, 8, 1]])


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """16 demonstrations."""
    return write_rows(tmp_path / "rows.jsonl", demonstrations(16))


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_the_exported_policy_is_the_trained_one(adapter, llama, tokenizer, rows, tmp_path):
    module = SFTModule(llama, sgd(0.5), adapter=adapter)
    trainer = quiet_trainer(tmp_path / "run", max_epochs=1, callbacks=[ExportModel("last")])
    trainer.fit(module, datamodule=DemonstrationDataModule(rows, micro_batch_size=4))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "last").eval()
    torch.testing.assert_close(plain(IDS).logits, module.model.eval()(IDS).logits, atol=1e-5, rtol=1e-5)
    assert (plain(IDS).logits - AutoModelForCausalLM.from_pretrained(llama)(IDS).logits).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "last").get_vocab() == tokenizer.get_vocab()


def test_the_exported_reward_model_is_the_trained_one(llama, tmp_path):
    module = RewardModule(llama, sgd(0.5))
    data = ComparisonDataModule(write_rows(tmp_path / "rankings.jsonl", rankings(8)), micro_batch_size=4)
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[ExportModel()]).fit(module, datamodule=data)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    score = module.model.eval().score(IDS, torch.ones_like(IDS))
    torch.testing.assert_close(plain(IDS).logits.squeeze(1), score, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_a_sharded_model_is_exported_unsharded(adapter, llama, rows, tmp_path):
    def train() -> torch.Tensor:
        module = SFTModule(llama, sgd(0.5), adapter=adapter)
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[ExportModel()], devices=2, strategy=FSDP2Strategy())
        trainer.fit(module, datamodule=DemonstrationDataModule(rows, micro_batch_size=2))
        return module.model.eval()(input_ids=IDS).logits.detach()

    sharded, _ = on_ranks(train, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(plain(IDS).logits, sharded, atol=1e-5, rtol=1e-5)
    assert (sharded - AutoModelForCausalLM.from_pretrained(llama)(IDS).logits).abs().max() > 1e-3
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(llama, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_rlhf.modules.sft.load_causal_lm", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "taken").write_text("")
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[ExportModel("taken/model")])
    with pytest.raises(UserError, match=r"cannot write to .*taken/model'"):
        trainer.fit(SFTModule(llama), datamodule=DemonstrationDataModule(rows, micro_batch_size=4))


class LoggedScores(L.Callback):
    """Logs a score of the validation set, given per epoch."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("validation/reward_score", self.scores[trainer.current_epoch])


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_the_best_weights_are_exported_if_that_is_asked_for(adapter, llama, rows, tmp_path):
    def train(folder: Path, weights: Any, epochs: int) -> dict[str, torch.Tensor]:
        selecting = ModelCheckpoint(folder / "kept", monitor="validation/reward_score", mode="max", save_last=True)
        callbacks = [ExportModel(weights=weights), LoggedScores([0.1, 0.9, 0.5]), selecting]
        settings = {"max_epochs": epochs, "callbacks": callbacks, "enable_checkpointing": True}
        trainer = quiet_trainer(folder, num_sanity_val_steps=0, **settings)
        data = DemonstrationDataModule(rows, validation_path=rows, micro_batch_size=4)
        trainer.fit(SFTModule(llama, sgd(0.5), adapter=adapter), datamodule=data)
        return load_file(folder / "model" / "model.safetensors")

    best, second, last = (
        train(tmp_path / "a", "best", 3),
        train(tmp_path / "b", "last", 2),
        train(tmp_path / "c", "last", 3),
    )
    for name, weight in best.items():
        torch.testing.assert_close(weight, second[name], msg=name)
    assert any(not torch.equal(weight, last[name]) for name, weight in best.items())


def test_the_best_weights_need_a_checkpoint_with_a_monitor(llama, rows, tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[ExportModel(weights="best")])
    with pytest.raises(UserError, match="no ModelCheckpoint has a monitor"):
        trainer.fit(SFTModule(llama), datamodule=DemonstrationDataModule(rows, micro_batch_size=4))


class WordCount(Reward):
    """Scores the number of words."""

    def score(self, episodes: Any) -> torch.Tensor:
        return torch.tensor([float(len(response.split())) for response in episodes.responses])


def test_samples_of_the_same_prompts_go_to_a_file_and_to_one_growing_table(llama, tmp_path):
    csv_logger, logger = CSVLogger(str(tmp_path / "log"), name="", version=""), FakeWandbLogger()
    module = PPOModule(
        llama, WordCount(), SamplingParams(6), PPOConfig(rollout_batch_size=8, micro_batch_size=4), optimizer=sgd(0.1)
    )
    table = LogSamples(every_n_epochs=2, rows=3)
    trainer = quiet_trainer(tmp_path, max_epochs=4, logger=[csv_logger, logger], callbacks=[table])
    trainer.fit(module, datamodule=PromptData())
    written = [json.loads(line) for line in (tmp_path / "log" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written] == [2, 2, 2, 6, 6, 6]
    assert [row["iteration"] for row in written] == [1, 1, 1, 3, 3, 3]
    assert [row["prompt"] for row in written[:3]] == [row["prompt"] for row in written[3:]]
    first, second = (row for row in logger.rows if "samples" in row)
    assert (first["trainer/global_step"], first["iteration"], first["episodes"]) == (2, 1, 8)
    assert (second["trainer/global_step"], second["iteration"], second["episodes"]) == (6, 3, 24)
    assert first["samples"] is second["samples"] and second["samples"].log_mode == "INCREMENTAL"
    columns = ["iteration", "prompt", "reference", "response", "score", "kl"]
    assert second["samples"].columns == columns
    assert second["samples"].data == [[row.get(name) for name in columns] for row in written]
    for row in written:
        assert row["score"] == len(row["response"].split())
        assert set(row["prompt"].split()) <= {f"w{i}" for i in range(28)}


def test_samples_change_no_number_of_the_training(llama, tmp_path):
    weights = []
    for callbacks in ([], [LogSamples(1, rows=3)]):
        config = PPOConfig(rollout_batch_size=8, micro_batch_size=4)
        module = PPOModule(llama, WordCount(), SamplingParams(6), config, optimizer=sgd(0.1))
        quiet_trainer(tmp_path, max_epochs=3, logger=False, callbacks=callbacks).fit(module, datamodule=PromptData())
        weights.append([*module.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_a_nan_loss_stops_before_the_weights_change(llama, rows, tmp_path):
    module = SFTModule(llama, sgd(0.5))

    def nan_step(batch: Any, batch_idx: int) -> torch.Tensor:
        loss = SFTModule.training_step(module, batch, batch_idx)
        return loss * float("nan") if (module.current_epoch, batch_idx) == (1, 2) else loss

    module.training_step = nan_step  # type: ignore[method-assign]
    kept = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_last=True)
    callbacks = [kept, TerminateOnNaN()]
    trainer = quiet_trainer(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=callbacks)
    data = DemonstrationDataModule(rows, micro_batch_size=4)
    with pytest.raises(UserError, match=r"the loss is nan at step 6 \(epoch 1, batch 2\)") as stop:
        trainer.fit(module, datamodule=data)
    assert "\n" not in str(stop.value)
    saved = torch.load(kept.last_model_path, weights_only=True)
    assert saved["global_step"] == 6
    for name, weight in module.state_dict().items():
        if name.startswith("model."):
            assert torch.isfinite(weight).all()
            assert torch.equal(weight, saved["state_dict"][name]), name
    healthy = SFTModule(llama, sgd(0.5))
    resumed = quiet_trainer(tmp_path, max_epochs=3, callbacks=[TerminateOnNaN()])
    resumed.fit(healthy, datamodule=DemonstrationDataModule(rows, micro_batch_size=4), ckpt_path=kept.last_model_path)
    assert resumed.global_step == 12


def test_an_infinite_pretraining_loss_stops_too(llama, rows, tmp_path):
    class InfiniteMix(SFTModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if type(batch).__name__ == "PretrainingBatch" else loss

    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 28}" for i in range(200)))
    mix = PretrainingMix(str(tmp_path / "text.txt"), 1.0, micro_batch_size=2, seq_len=16)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[mix, TerminateOnNaN()])
    with pytest.raises(UserError, match=r"the loss is inf at step 0 \(epoch 0, batch 0\)"):
        trainer.fit(InfiniteMix(llama), datamodule=DemonstrationDataModule(rows, micro_batch_size=4))


def test_a_module_without_samples_writes_no_file(llama, rows, tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[LogSamples(1)])
    trainer.fit(SFTModule(llama), datamodule=DemonstrationDataModule(rows, micro_batch_size=4))
    assert not list(tmp_path.rglob("samples.jsonl"))


@pytest.mark.parametrize("kind", [LogSamples, LogHistograms])
def test_an_interval_below_one_is_refused(kind: type) -> None:
    with pytest.raises(UserError, match=f"{kind.__name__}: every_n_epochs must be 1 or more, got 0"):
        kind(every_n_epochs=0)


def test_every_fit_exports_to_the_folder_of_its_own_run(llama, tmp_path):
    callback = ExportModel("out")
    for run in ("a", "b"):
        callback.setup(quiet_trainer(tmp_path / run), SFTModule(llama), "fit")
        assert callback.directory == tmp_path / run / "out"
