"""Two gloo ranks are one process, under DDP and FSDP2: losses, metrics, weights, checkpoints, exports."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf.callbacks import PretrainingMix
from lit_rlhf.cli import main
from lit_rlhf.data import ComparisonDataModule, DemonstrationDataModule
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.modules import PPOConfig, PPOModule, RewardModule, SFTModule
from lit_rlhf.strategies import FSDP2Strategy, is_sharded
from tests.helpers.ppo_fakes import CountOf, PromptData
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import (
    assert_same_weights,
    demonstrations,
    quiet_trainer,
    rankings,
    whole_weights,
    write_rows,
)

STEPS, SAVED = 5, 3
# the minibatch is 12 in all; on two ranks and in the run that goes on alone it is cut alike
ONE, TWO, ALONE, SPLIT = (12, 1, 1), (3, 2, 2), (6, 2, 1), (6, 2, 2)  # two ranks that split tensors count as one


class Losses(L.Callback):
    """The loss of every micro-batch, as Lightning divides it, and the step that it belongs to."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        self.seen.append((trainer.global_step, float(loss.detach())))


def momentum(rate: float) -> Any:
    """Gradient descent with a state to resume."""
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def stage_of(kind: str, model: str, folder: Path, micro_batch_size: int) -> tuple[Any, Any, list[Any]]:
    if kind == "sft":
        rows = write_rows(folder / "rows.jsonl", demonstrations(36))
        return (
            SFTModule(model, momentum(0.1)),
            DemonstrationDataModule(rows, rows, micro_batch_size=micro_batch_size),
            [],
        )
    if kind == "reward":
        rows = write_rows(folder / "rows.jsonl", rankings(36))
        return (
            RewardModule(model, momentum(0.1)),
            ComparisonDataModule(rows, rows, micro_batch_size=micro_batch_size),
            [],
        )
    settings = PPOConfig(
        rollout_batch_size=24, micro_batch_size=micro_batch_size, ppo_epochs=2, critic_learning_rate=0.05
    )
    text = write_rows(folder / "text.jsonl", [{"text": " ".join(f"w{(i * 7) % 28}" for i in range(400))}])
    mix = [PretrainingMix(text, 0.5, micro_batch_size, seq_len=8)] if kind == "ppo_ptx" else []
    return PPOModule(model, CountOf(), SamplingParams(8), settings, optimizer=momentum(0.05)), PromptData(), mix


def train(kind: str, model: str, folder: Path, cut: Any, start: Any = None, **settings: Any) -> dict[str, Any]:
    """Run five steps, or from a checkpoint to the fifth; return the losses of steps, metrics and whole weights."""
    micro_batch_size, accumulate, devices = cut
    module, data, callbacks = stage_of(kind, model, folder, micro_batch_size)
    losses = Losses()
    kept = ModelCheckpoint(folder, filename="saved", every_n_train_steps=SAVED, save_on_exception=False)
    trainer = quiet_trainer(
        folder,
        max_steps=STEPS,
        max_epochs=-1,
        devices=devices,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        callbacks=[losses, *callbacks, *([] if start or not settings.pop("save", True) else [kept])],
        enable_checkpointing=start is None,
        num_sanity_val_steps=0,
        val_check_interval=accumulate,  # after every step, the fifth among them
        **settings,
    )
    trainer.fit(module, datamodule=data, ckpt_path=start)
    assert trainer.global_step == STEPS
    curve = [sum(loss for step, loss in losses.seen if step == each) for each in range(SAVED if start else 0, STEPS)]
    of_the_cut = ("time/", "update/padding_fraction")
    metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if not n.startswith(of_the_cut)}
    weights = whole_weights(module)
    return {"curve": curve, "metrics": metrics, "weights": weights, "sharded": is_sharded(module)}


def assert_same(ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    curves = torch.tensor([rank["curve"] for rank in ranks], dtype=torch.float64)
    expected = torch.tensor(one["curve"][-curves.shape[1] :], dtype=torch.float64)
    torch.testing.assert_close(curves.mean(0), expected, atol=1e-5, rtol=1e-5)
    for rank in ranks:
        assert_same_weights(rank["weights"], one["weights"])
        assert rank["metrics"].keys() == one["metrics"].keys()
        for name, value in rank["metrics"].items():
            assert value == pytest.approx(one["metrics"][name], abs=1e-5, rel=1e-5), name


def strategy_of(name: str) -> Any:
    if name == "ddp":
        return "ddp"
    split = 2 if name == "tensors" else 1
    return FSDP2Strategy(save_distributed_checkpoint=name == "shards", tensor_parallel_size=split)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "shards", "tensors"])
@pytest.mark.parametrize("kind", ["sft", "reward", "ppo", "ppo_ptx"])
def test_two_ranks_train_save_and_resume_as_one_process(kind, name, llama, tmp_path):
    saved = tmp_path / "saved.ckpt"
    cut = SPLIT if name == "tensors" else TWO

    def both() -> tuple[Any, Any]:
        whole = train(kind, llama, tmp_path, cut, strategy=strategy_of(name))
        return whole, train(kind, llama, tmp_path, cut, saved, strategy=strategy_of(name))

    one = train(kind, llama, tmp_path, ONE, save=False)
    ranks = on_ranks(both, tmp_path)
    for run in (0, 1):  # unbroken, resumed
        assert_same([rank[run] for rank in ranks], one)
        assert ranks[0][run]["sharded"] == (name != "ddp")
    assert saved.is_dir() == (name == "shards")
    if name == "shards":
        alone = on_ranks(lambda: train(kind, llama, tmp_path, ALONE, saved, strategy=strategy_of(name)), tmp_path, 1)
    else:
        alone = [train(kind, llama, tmp_path, ALONE, saved)]
    assert_same(alone, one)
    assert_exports(kind, llama, saved, tmp_path)


def assert_exports(kind: str, model: str, saved: Path, folder: Path) -> None:
    """The exported folder holds the weights of the step at which the checkpoint was written."""
    assert main(["export", str(saved), str(folder / "model")]) == 0
    assert not json.loads((folder / "model" / "config.json").read_text())["architectures"][0].startswith("FSDP")
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    exported = auto.from_pretrained(folder / "model").state_dict()
    module, data, callbacks = stage_of(kind, model, folder, ONE[0])
    quiet_trainer(
        folder, max_steps=SAVED, max_epochs=-1, gradient_clip_val=0.5, callbacks=callbacks, limit_val_batches=0
    ).fit(module, datamodule=data)
    for name, weight in module.exported.state_dict().items():
        torch.testing.assert_close(exported[name], weight, atol=1e-5, rtol=1e-5, msg=name)
