"""Two gloo ranks equal one process, under DDP and FSDP2: losses, metrics, weights, checkpoints, exports."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf.callbacks import PretrainingMix
from lit_rlhf.checkpoints import read_metadata
from lit_rlhf.cli import main
from lit_rlhf.data import ComparisonDataModule, DemonstrationDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.modules import PPOConfig, PPOModule, RewardModule, SFTModule
from lit_rlhf.strategies import FSDP2Strategy, is_sharded
from tests.helpers.ppo_fakes import PromptData, WordShare
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import (
    assert_same_weights,
    demonstrations,
    full_weights,
    quiet_trainer,
    rankings,
    write_rows,
)

STEPS, SAVED = 5, 3
# micro_batch_size, accumulate_grad_batches, ranks: a minibatch has 12 rows in every case
ONE_PROCESS, TWO_RANKS = (12, 1, 1), (3, 2, 2)
ONE_OF_TWO = (4, 3, 1)  # one process that resumes the run of two ranks, in other micro-batches
TENSOR_PARALLEL = (6, 2, 2)  # two ranks that split tensors hold the same rows


class RecordLosses(L.Callback):
    """Records the loss of every micro-batch, as Lightning divides it, with its step."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float]] = []

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        self.losses.append((trainer.global_step, float(loss.detach())))


def sgd_with_momentum(rate: float) -> Any:
    """Return an optimizer factory; the optimizer has a state to resume."""
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def make_stage(stage: str, model: str, folder: Path, micro_batch_size: int) -> tuple[Any, Any, list[Any]]:
    if stage == "sft":
        rows = write_rows(folder / "rows.jsonl", demonstrations(36))
        return (
            SFTModule(model, sgd_with_momentum(0.1)),
            DemonstrationDataModule(rows, rows, micro_batch_size=micro_batch_size),
            [],
        )
    if stage == "reward":
        rows = write_rows(folder / "rows.jsonl", rankings(36))
        return (
            RewardModule(model, sgd_with_momentum(0.1)),
            ComparisonDataModule(rows, rows, micro_batch_size=micro_batch_size),
            [],
        )
    settings = PPOConfig(
        rollout_batch_size=24, micro_batch_size=micro_batch_size, ppo_epochs=2, critic_learning_rate=0.05
    )
    text = write_rows(folder / "text.jsonl", [{"text": " ".join(f"w{(i * 7) % 28}" for i in range(400))}])
    mix = [PretrainingMix(text, 0.5, micro_batch_size, seq_len=8)] if stage == "ppo_ptx" else []
    return (
        PPOModule(model, WordShare(), SamplingParams(8), settings, optimizer=sgd_with_momentum(0.05)),
        PromptData(),
        mix,
    )


def train(
    stage: str, model: str, folder: Path, batches: tuple[int, int, int], start: Any = None, **settings: Any
) -> dict[str, Any]:
    """Run five steps, or from a checkpoint to the fifth; return the loss of every step, metrics and full weights."""
    micro_batch_size, accumulate, devices = batches
    module, data, callbacks = make_stage(stage, model, folder, micro_batch_size)
    recorder = RecordLosses()
    checkpoints = ModelCheckpoint(folder, filename="saved", every_n_train_steps=SAVED, save_on_exception=False)
    trainer = quiet_trainer(
        folder,
        max_steps=STEPS,
        max_epochs=-1,
        devices=devices,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        callbacks=[recorder, *callbacks, *([] if start or not settings.pop("save", True) else [checkpoints])],
        enable_checkpointing=start is None,
        num_sanity_val_steps=0,
        val_check_interval=accumulate,  # after every step, the fifth among them
        **settings,
    )
    trainer.fit(module, datamodule=data, ckpt_path=start)
    assert trainer.global_step == STEPS
    step_losses = [
        sum(loss for step, loss in recorder.losses if step == each) for each in range(SAVED if start else 0, STEPS)
    ]
    depends_on_batches = ("time/", "update/padding_fraction")
    metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if not n.startswith(depends_on_batches)}
    weights = full_weights(module)
    return {"losses": step_losses, "metrics": metrics, "weights": weights, "sharded": is_sharded(module)}


def assert_same(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    losses = torch.tensor([rank["losses"] for rank in ranks], dtype=torch.float64)
    expected_losses = torch.tensor(expected["losses"][-losses.shape[1] :], dtype=torch.float64)
    torch.testing.assert_close(losses.mean(0), expected_losses, atol=1e-5, rtol=1e-5)
    for rank in ranks:
        assert_same_weights(rank["weights"], expected["weights"])
        assert rank["metrics"].keys() == expected["metrics"].keys()
        for name, value in rank["metrics"].items():
            assert value == pytest.approx(expected["metrics"][name], abs=1e-5, rel=1e-5), name


def make_strategy(name: str) -> Any:
    if name == "ddp":
        return "ddp"
    split = 2 if name == "tensor_parallel" else 1
    return FSDP2Strategy(save_distributed_checkpoint=name == "fsdp2_sharded_checkpoint", tensor_parallel_size=split)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2_sharded_checkpoint", "tensor_parallel"])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "ppo_ptx"])
def test_two_ranks_train_save_and_resume_as_one_process(stage, name, llama, tmp_path):
    saved = tmp_path / "saved.ckpt"
    batches = TENSOR_PARALLEL if name == "tensor_parallel" else TWO_RANKS

    def run_both() -> tuple[Any, Any]:
        uninterrupted = train(stage, llama, tmp_path, batches, strategy=make_strategy(name))
        return uninterrupted, train(stage, llama, tmp_path, batches, saved, strategy=make_strategy(name))

    expected = train(stage, llama, tmp_path, ONE_PROCESS, save=False)
    ranks = on_ranks(run_both, tmp_path)
    for run in (0, 1):  # uninterrupted, resumed
        assert_same([rank[run] for rank in ranks], expected)
        assert ranks[0][run]["sharded"] == (name != "ddp")
    assert saved.is_dir() == (name == "fsdp2_sharded_checkpoint")
    if name == "fsdp2_sharded_checkpoint":
        resumed = on_ranks(
            lambda: train(stage, llama, tmp_path, ONE_OF_TWO, saved, strategy=make_strategy(name)), tmp_path, 1
        )
    else:
        resumed = [train(stage, llama, tmp_path, ONE_OF_TWO, saved)]
    assert_same(resumed, expected)
    assert_exports(stage, llama, saved, tmp_path)


def assert_exports(stage: str, model: str, saved: Path, folder: Path) -> None:
    """Assert that the exported folder holds the weights of the step of the checkpoint."""
    assert main(["export", str(saved), str(folder / "model")]) == 0
    assert not json.loads((folder / "model" / "config.json").read_text())["architectures"][0].startswith("FSDP")
    auto = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    exported = auto.from_pretrained(folder / "model").state_dict()
    module, data, callbacks = make_stage(stage, model, folder, ONE_PROCESS[0])
    quiet_trainer(
        folder, max_steps=SAVED, max_epochs=-1, gradient_clip_val=0.5, callbacks=callbacks, limit_val_batches=0
    ).fit(module, datamodule=data)
    for name, weight in module.exported_model.state_dict().items():
        torch.testing.assert_close(exported[name], weight, atol=1e-5, rtol=1e-5, msg=name)


def resume_with_decay(model: str, folder: Path, start: Path | None, devices: int, decay: float, **settings: Any) -> Any:
    """Train an SFT run with AdamW to its third step, or resume it there; return the weights."""
    rows = write_rows(folder / "rows.jsonl", demonstrations(36))
    rate = 1e-3 if start is None else 1e-2
    module = SFTModule(model, lambda groups: torch.optim.AdamW(groups, lr=rate, weight_decay=decay))
    save = ModelCheckpoint(folder, filename="saved", every_n_train_steps=SAVED, save_on_exception=False)
    trainer = quiet_trainer(
        folder, max_steps=STEPS if start else SAVED, max_epochs=-1, devices=devices, enable_checkpointing=start is None,
        callbacks=[] if start else [save], **settings,
    )  # fmt: skip
    data = DemonstrationDataModule(rows, micro_batch_size=6 // devices)
    trainer.fit(module, datamodule=data, ckpt_path=start)
    return full_weights(module)


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.5), (0.5, 0.0)])
def test_sharded_runs_take_the_optimizer_settings_of_the_recipe(before, after, llama, tmp_path):
    def run_both() -> Any:
        saved = tmp_path / "saved.ckpt"
        resume_with_decay(llama, tmp_path, None, 2, before, strategy=make_strategy("fsdp2"))
        return resume_with_decay(llama, tmp_path, saved, 2, after, strategy=make_strategy("fsdp2"))

    sharded = on_ranks(run_both, tmp_path)
    expected = resume_with_decay(llama, tmp_path, tmp_path / "saved.ckpt", 1, after)
    for weights in sharded:
        assert_same_weights(weights, expected)


def test_weight_decay_of_shards_cannot_be_switched_on(llama, tmp_path):
    strategy = "fsdp2_sharded_checkpoint"
    on_ranks(lambda: resume_with_decay(llama, tmp_path, None, 2, 0.0, strategy=make_strategy(strategy)), tmp_path)
    content = read_metadata(tmp_path / "saved.ckpt")  # `lit-rlhf fit` checks it before any rank loads
    assert content is not None
    for decay, is_refused in ((0.0, False), (0.5, True)):
        module = SFTModule(llama, lambda groups, decay=decay: torch.optim.AdamW(groups, lr=1e-3, weight_decay=decay))
        with pytest.raises(UserError, match="but not switched on or off") if is_refused else nullcontext():
            module.check_resumable(content)
