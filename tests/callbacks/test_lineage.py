"""The callback in plain Python: what it records with and without a logger, and that it never costs a run."""

import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lit_rlhf.callbacks import ExportModel, Lineage, RunState
from lit_rlhf.callbacks import lineage as lineage_module
from lit_rlhf.callbacks.lineage import add_compute
from lit_rlhf.data import DemonstrationDataModule, PretrainingDataModule
from lit_rlhf.generation import SamplingParams
from lit_rlhf.lineage.environment import read_git_state
from lit_rlhf.lineage.records import Compute, LineageRecord, read_record
from lit_rlhf.lineage.traceable import Traceable
from lit_rlhf.modules import PPOConfig, PPOModule, SFTModule
from tests.callbacks.fake_wandb_logger import FakeWandbLogger
from tests.helpers.fake_wandb_run import FakeRun, Registry
from tests.helpers.ppo_fakes import PromptData, WordShare
from tests.helpers.small_runs import demonstrations, quiet_trainer, sgd, write_rows


def fit(folder: Path, llama: str, callbacks: list[Any], data: Any = None, **settings: Any) -> LineageRecord | None:
    """Train for one step and export; return the record of the exported folder."""
    path = write_rows(folder / "rows.jsonl", demonstrations(4))
    trainer = quiet_trainer(folder, max_steps=1, callbacks=[*callbacks, ExportModel()], **settings)
    trainer.fit(SFTModule(llama, sgd(0.1)), data or DemonstrationDataModule(path, micro_batch_size=4))
    return read_record(folder / "model")


def test_without_the_callback_the_inputs_are_recorded_alone(tmp_path: Path, llama: str) -> None:
    record = fit(tmp_path, llama, [])
    assert record is not None and record.role == "sft" and record.compute.flops is record.compute.wall_seconds is None
    assert [each.path for each in record.models] == [llama]
    assert [(each.role, each.rows_kept) for each in record.data] == [("demonstrations", 4)]
    assert record.environment.devices.startswith("1 x CPU")


@pytest.mark.parametrize("kind", ["none", "csv", "dummy"])
def test_the_record_needs_no_logger_of_any_kind(kind: str, tmp_path: Path, llama: str) -> None:
    logger = {"none": False, "csv": CSVLogger(tmp_path), "dummy": DummyLogger()}[kind]
    record = fit(tmp_path, llama, [Lineage()], logger=logger)
    assert record is not None and record.wandb is None
    assert record.compute.wall_seconds and record.compute.flops and record.compute.sessions == 1


def test_pretraining_is_told_from_sft(tmp_path: Path, llama: str) -> None:
    text = write_rows(tmp_path / "text.jsonl", [{"text": "w1 w2 w3 w4"}] * 8)
    data = PretrainingDataModule(text, seq_len=8, micro_batch_size=2)
    record = fit(tmp_path, llama, [Lineage()], data)
    assert record is not None and record.role == "pretraining" and record.data[0].role == "pretraining text"
    assert record.compute.tokens == 16


class OwnData(LightningDataModule):
    """A data module that says nothing about what it reads."""

    def __init__(self, inner: DemonstrationDataModule) -> None:
        super().__init__()
        self.inner = inner

    def setup(self, stage: str) -> None:
        self.inner.trainer = self.trainer
        self.inner.setup(stage)

    def train_dataloader(self) -> Any:
        return self.inner.train_dataloader()


def test_files_that_the_settings_of_another_data_module_name_are_recorded(tmp_path: Path, llama: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", demonstrations(4))
    state = RunState({"data": {"class_path": "own.Data", "init_args": {"files": {"train": path, "kind": "x"}}}})
    record = fit(tmp_path, llama, [state, Lineage()], OwnData(DemonstrationDataModule(path, micro_batch_size=4)))
    assert record is not None
    assert [(each.role, each.path, each.rows_kept) for each in record.data] == [("files.train", path, None)]


def test_an_input_that_disappears_costs_no_run(tmp_path: Path, llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise FileNotFoundError("rows.jsonl")

    monkeypatch.setattr(lineage_module, "describe_data_input", missing)
    with pytest.warns(UserWarning, match="the inputs of this run are not recorded: rows.jsonl"):
        record = fit(tmp_path, llama, [Lineage()])
    assert record is not None and record.models == () and record.compute.flops


def test_hashing_does_not_hold_up_the_first_step(tmp_path: Path, llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    released, order = threading.Event(), list[str]()
    describe = lineage_module.describe_model_input

    def wait(*arguments: Any) -> Any:
        assert released.wait(30)
        order.append("hashed")
        return describe(*arguments)

    class Step(RunState):
        def on_train_batch_end(self, *_: Any) -> None:
            order.append("step")
            released.set()

    monkeypatch.setattr(lineage_module, "describe_model_input", wait)
    assert fit(tmp_path, llama, [Lineage(), Step()]) is not None
    assert order == ["step", "hashed"]


class WandbLogger(FakeWandbLogger):
    """One with a run in this process."""

    def __init__(self, run: FakeRun) -> None:
        super().__init__()
        self.run = run

    @property
    def experiment(self) -> Any:
        return self.run


def test_an_online_run_gets_inputs_and_output(tmp_path: Path, llama: str) -> None:
    registry = Registry()
    logger = WandbLogger(FakeRun(registry, "run"))
    record = fit(tmp_path, llama, [Lineage(registry="wandb-registry-model/x")], logger=logger)
    assert record is not None and record.wandb is not None and record.wandb.id == "run"
    assert registry.logged["run"] == ["demo-sft"] and len(registry.used["run"]) == 2
    assert "entity/project/demo-sft:step-1" in registry.versions
    assert registry.links == [("demo-sft", "wandb-registry-model/x")]


class ExtraTokens(Callback, Traceable):
    """Trains on further tokens, as the pretraining mix does."""

    def extra_tokens_per_step(self) -> int:
        return 100

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.log("unknown", float("nan"))


def test_a_resumed_run_has_the_operations_of_an_unbroken_one(tmp_path: Path, llama: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", demonstrations(8))

    def train(folder: Path, steps: int, start: Path | None = None) -> LineageRecord:
        callbacks = [Lineage(), ExtraTokens(), ModelCheckpoint(folder, save_last=True), ExportModel()]
        trainer = quiet_trainer(folder, max_steps=steps, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(SFTModule(llama, sgd(0.1)), DemonstrationDataModule(path, micro_batch_size=4), ckpt_path=start)
        record = read_record(folder / "model")
        assert record is not None and record.compute.flops
        return record

    unbroken, first = train(tmp_path / "unbroken", 2), train(tmp_path / "first", 1)
    resumed = train(tmp_path / "resumed", 2, tmp_path / "first" / "last.ckpt")
    assert first.compute.tokens != unbroken.compute.tokens == resumed.compute.tokens
    assert resumed.compute.flops == pytest.approx(unbroken.compute.flops) and resumed.compute.sessions == 2
    assert "train/loss" in unbroken.metrics and "unknown" not in unbroken.metrics


def test_each_fit_of_a_trainer_counts_from_zero_and_a_rollout_once(tmp_path: Path, llama: str) -> None:
    lineage, ppo = Lineage(), PPOConfig(rollout_batch_size=8, micro_batch_size=4, ppo_epochs=2)
    for _ in range(2):
        module = PPOModule(llama, WordShare(), SamplingParams(4), ppo)
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[lineage])
        trainer.fit(module, datamodule=PromptData())
        record = lineage.finish(trainer, module)
        assert record is not None and record.compute.tokens == module.num_tokens > 0


def test_the_devices_of_all_ranks_are_counted() -> None:
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda value, **_: value)
    trainer: Any = SimpleNamespace(strategy=strategy, world_size=3, callbacks=[], global_step=0)
    compute = Lineage().measure(trainer, object())
    assert compute.wall_seconds and compute.device_seconds == pytest.approx(3 * compute.wall_seconds)


def test_sessions_add_up_and_what_is_not_known_stays_so() -> None:
    first = Compute("a", "b", 1.0, 2.0, 3, 4.0)
    assert add_compute(first, Compute("c", "d", 10.0, 20.0, 30, 40.0)) == Compute("a", "d", 11.0, 22.0, 33, 44.0, 2)
    assert add_compute(first, Compute("c", "d", 10.0, 20.0)).flops is None


def test_the_state_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert read_git_state() == ("", False)
    (tmp_path / "file").write_text("one")
    user = ["-c", "user.name=ada", "-c", "user.email=ada@example.com"]
    for command in (["init", "-q"], ["add", "file"], [*user, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], check=True, capture_output=True)
    commit, dirty = read_git_state()
    assert len(commit) == 40 and not dirty
    (tmp_path / "untracked").write_text("")
    assert read_git_state() == (commit, False)
    (tmp_path / "file").write_text("two")
    assert read_git_state() == (commit, True)
    monkeypatch.setenv("PATH", "")
    assert read_git_state() == ("", False)
