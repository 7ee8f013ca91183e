"""Base of the modules: checks of checkpoints, clearing of gradients, length of schedules, weight decay."""

import math
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import lightning as L
import pytest
import torch

from lit_rlhf.data import ComparisonDataModule, DemonstrationDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.modules import RewardModule, SFTModule
from lit_rlhf.modules.base import split_weight_decay_groups
from lit_rlhf.schedules import ConstantWithWarmup, CosineWithMinLR
from tests.helpers.small_runs import demonstrations, quiet_trainer, rankings, sgd, write_rows


@pytest.fixture
def data(tmp_path: Path) -> DemonstrationDataModule:
    """16 demonstrations, 4 per micro-batch."""
    return DemonstrationDataModule(write_rows(tmp_path / "rows.jsonl", demonstrations(16)), micro_batch_size=4)


@pytest.fixture
def checkpoint(llama: str, data: DemonstrationDataModule, tmp_path: Path) -> str:
    """A checkpoint of SFTModule on the tiny Llama."""
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(SFTModule(llama), datamodule=data)
    trainer.save_checkpoint(tmp_path / "sft.ckpt")
    return str(tmp_path / "sft.ckpt")


def test_a_checkpoint_of_another_module_is_refused_in_one_line(llama, checkpoint, tmp_path):
    comparisons = ComparisonDataModule(write_rows(tmp_path / "rankings.jsonl", rankings(8)), micro_batch_size=4)
    with pytest.raises(UserError) as refusal:
        quiet_trainer(tmp_path, max_epochs=2).fit(RewardModule(llama), datamodule=comparisons, ckpt_path=checkpoint)
    assert str(refusal.value).startswith("ckpt_path: the checkpoint is of SFTModule, this recipe trains RewardModule")
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_of_another_model_is_refused(model_folders, checkpoint, data, tmp_path):
    with pytest.raises(UserError, match=r"the checkpoint's model has model_type llama, .* has gpt2"):
        quiet_trainer(tmp_path, max_epochs=2).fit(
            SFTModule(model_folders["gpt2"]), datamodule=data, ckpt_path=checkpoint
        )


def test_a_checkpoint_is_read_without_unpickling_objects(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    assert content["lit_rlhf"]["module"] == "SFTModule"
    assert content["lit_rlhf"]["prefix"] == "model."


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fused_optimizer_is_clipped_as_any_other(precision, llama, data, tmp_path):
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        module = SFTModule(llama, lambda groups, fused=fused: torch.optim.AdamW(groups, lr=1e-3, eps=1.0, fused=fused))
        trainer = quiet_trainer(tmp_path, max_epochs=1, precision=precision, gradient_clip_val=0.05)
        trainer.fit(module, datamodule=data)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-7, rtol=1e-5)


class RecordGradients(L.Callback):
    """Records after each batch whether there are gradients."""

    def __init__(self) -> None:
        self.has_gradients: list[bool] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.has_gradients.append(any(p.grad is not None for p in pl_module.parameters()))


def test_gradients_are_cleared_right_after_the_step_and_not_before(llama, data, tmp_path):
    recorder = RecordGradients()
    trainer = quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[recorder])
    trainer.fit(SFTModule(llama), datamodule=data)
    assert recorder.has_gradients == [True, False, True, False]


def test_a_fit_that_ended_within_an_epoch_leaves_nothing_to_the_next(llama, data, tmp_path):
    module: Any = SFTModule(llama, sgd(0.1))
    quiet_trainer(tmp_path, max_steps=2, max_epochs=-1).fit(module, datamodule=data)
    module.resumed, module.resumed_at, module.resumed_random_state = {}, "over", {}  # of a resume that failed
    module.step_means.add("train/loss", 1e6, 1.0)
    trainer = quiet_trainer(tmp_path, max_steps=1, max_epochs=-1)
    trainer.fit(module, datamodule=data)
    assert module.epoch_means.sums["train/grad_norm"][1] == 1
    assert float(trainer.callback_metrics["train/loss"]) < 100
    tokens = module.num_tokens
    trainer.fit_loop.epoch_loop.max_steps = 2  # the same Trainer counts on
    trainer.fit(module, datamodule=data)
    assert module.num_tokens > tokens > 0 and module.epoch_means.sums["train/grad_norm"][1] == 2


def test_sums_of_a_run_that_is_over_are_made_on_its_device(llama, data, tmp_path, monkeypatch):
    """The Trainer has moved the module to the CPU then, and NCCL sums on the GPU alone."""
    trainer, module = quiet_trainer(tmp_path, max_steps=1), SFTModule(llama, sgd(0.1))
    trainer.fit(module, datamodule=data)
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("meta"))
    devices = []
    monkeypatch.setattr(trainer.strategy, "reduce", lambda values, **_: devices.append(values.device) or torch.ones(1))
    module.sum_over_ranks(torch.ones(1))
    assert devices == [torch.device("meta")]


class RecordRates(L.Callback):
    """Records the learning rate of every optimizer step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def run_schedule(llama: str, data: Any, folder: Path, scheduler: Any, **settings: Any) -> tuple[list[float], L.Trainer]:
    recorder = RecordRates()
    trainer = quiet_trainer(folder, callbacks=[recorder], **settings)
    trainer.fit(SFTModule(llama, sgd(0.5), scheduler), datamodule=data)
    return recorder.rates, trainer


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 12), (2, 6)])
def test_the_cosine_gets_its_length_from_the_trainer_and_ends_at_a_tenth(accumulate, steps, llama, data, tmp_path):
    settings = {"max_epochs": 3, "accumulate_grad_batches": accumulate}
    used, trainer = run_schedule(llama, data, tmp_path, lambda o: CosineWithMinLR(o, min_lr_ratio=0.1), **settings)
    expected = [0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2) for step in range(steps)]
    assert used == pytest.approx(expected, rel=1e-9)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05, rel=1e-9)


def test_the_cosine_can_have_a_warmup(llama, data, tmp_path):
    used, _ = run_schedule(llama, data, tmp_path, lambda o: CosineWithMinLR(o, 0.0, warmup_steps=4), max_steps=8)
    cosine = [0.25 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert used == pytest.approx([0.125, 0.25, 0.375, 0.5, *cosine], rel=1e-9)


def test_the_warmup_starts_at_a_tenth_and_ends_at_the_full_rate(llama, data, tmp_path):
    used, _ = run_schedule(llama, data, tmp_path, lambda o: ConstantWithWarmup(o, warmup_iterations=1), max_epochs=2)
    assert used == pytest.approx([0.05, 0.1625, 0.275, 0.3875, 0.5, 0.5, 0.5, 0.5], rel=1e-9)


def test_an_extended_run_follows_the_longer_schedule(llama, data, tmp_path):
    def cosine(optimizer: Any) -> CosineWithMinLR:
        return CosineWithMinLR(optimizer, min_lr_ratio=0.0)

    _, trainer = run_schedule(llama, data, tmp_path, cosine, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "short.ckpt")
    recorder = RecordRates()
    longer = quiet_trainer(tmp_path, callbacks=[recorder], max_epochs=2)
    longer.fit(SFTModule(llama, sgd(0.5), cosine), datamodule=data, ckpt_path=str(tmp_path / "short.ckpt"))
    expected = [0.25 * (1 + math.cos(math.pi * step / 8)) for step in (4, 5, 6, 7)]
    assert recorder.rates == pytest.approx(expected, rel=1e-9)


class StopAfter(L.Callback):
    """Ends training after some steps, as a time limit does."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.steps


def test_a_run_without_a_limit_of_steps_has_a_warmup_and_no_cosine(llama, data, tmp_path):
    with pytest.raises(UserError, match=r"CosineWithMinLR needs the length of the run.*set trainer\.max_steps"):
        trainer = quiet_trainer(tmp_path, max_epochs=-1, callbacks=[StopAfter(1)])
        trainer.fit(SFTModule(llama, sgd(0.5), CosineWithMinLR), datamodule=data)
    recorder = RecordRates()
    module = SFTModule(llama, sgd(0.5), lambda o: ConstantWithWarmup(o, warmup_iterations=1))
    quiet_trainer(tmp_path, max_epochs=-1, callbacks=[recorder, StopAfter(3)]).fit(module, datamodule=data)
    assert recorder.rates == pytest.approx([0.05, 0.1625, 0.275], rel=1e-9)  # of an epoch of 4 steps


def test_a_trainer_that_is_fitted_again_decays_over_what_is_left(llama, data, tmp_path):
    recorder, module = RecordRates(), SFTModule(llama, sgd(0.5), lambda o: CosineWithMinLR(o, 0.0))
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[recorder])
    trainer.fit(module, datamodule=data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule=data)
    assert recorder.rates == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 4)) for step in range(4)] * 2)


def test_biases_and_norms_do_not_decay(model_folders, data, tmp_path):
    module = SFTModule(model_folders["gpt2"], lambda p: torch.optim.AdamW(p, lr=0.0, weight_decay=0.1))
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=data)
    matrices, vectors = trainer.optimizers[0].param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in matrices["params"]} == {2} and {p.ndim for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(module.parameters()))
    assert split_weight_decay_groups([{"params": [torch.ones(2, 2)], "lr": 1.0}]) == [{"params": ANY, "lr": 1.0}]
