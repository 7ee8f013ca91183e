"""The average equals the recurrence over the weights after every step, also resumed, sharded, validated, exported."""

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lit_rlhf.callbacks import EMA, ExportModel
from lit_rlhf.cli import main
from lit_rlhf.data import ComparisonDataModule, DemonstrationDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.export import export_checkpoint
from lit_rlhf.models.loading_config import LoRA
from lit_rlhf.modules import PPOConfig, PPOModule, RewardModule, SFTModule
from lit_rlhf.rewards.base import Reward
from lit_rlhf.strategies import FSDP2Strategy
from tests.helpers.ppo_fakes import PromptData
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import demonstrations, full_weights, quiet_trainer, rankings, sgd, write_rows


class RecordWeights(L.Callback):
    """Store the weights after every optimizer step and in every validation."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.validated: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append(copy_trainable(pl_module))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.validated.append(copy_trainable(pl_module))

    def compute_average(self, decay: float) -> dict[str, torch.Tensor]:
        """Return the recurrence in float64."""
        average = dict(self.steps[0])
        for weights in self.steps[1:]:
            average = {name: decay * average[name] + (1 - decay) * weights[name] for name in average}
        return average


class WordCount(Reward):
    """Scores the number of words."""

    def score(self, episodes: Any) -> torch.Tensor:
        return torch.tensor([float(len(response.split())) for response in episodes.responses])


def copy_trainable(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().double().clone() for name, p in module.named_parameters() if p.requires_grad}


def build_sft(model: str, folder: Path) -> tuple[Any, Any]:
    rows = write_rows(folder / "rows.jsonl", demonstrations(24))
    return SFTModule(model, sgd(0.3)), DemonstrationDataModule(rows, micro_batch_size=4, validation_fraction=0.2)


def build_ppo(model: str, folder: Path, adapter: LoRA | None = None) -> tuple[Any, Any]:
    settings = PPOConfig(rollout_batch_size=8, micro_batch_size=2, critic_learning_rate=0.05)
    return PPOModule(model, WordCount(), SamplingParams(4), settings, optimizer=sgd(0.5), adapter=adapter), PromptData()


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name].double(), value.double(), atol=1e-6, rtol=1e-6, msg=name)


def test_the_average_is_validated_exported_and_left_in_the_module(llama, tmp_path):
    module, data = build_sft(llama, tmp_path)
    recorded = RecordWeights()
    kept = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    # before EMA, which copies the average to the module in its own hook
    late = ModelCheckpoint(tmp_path / "late", every_n_train_steps=5, save_last=True)  # again at the end
    callbacks = [ExportModel(), recorded, EMA(0.7), kept, late]
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module, datamodule=data)
    average = recorded.compute_average(0.7)
    assert len(recorded.steps) == 8
    assert max(float((average[name] - recorded.steps[-1][name]).abs().max()) for name in average) > 1e-3
    for weights in (recorded.validated[-1], copy_trainable(module)):
        assert_close(average, weights)
    last = tmp_path / "kept" / "step=8.ckpt"
    for path in (last, tmp_path / "late" / "last.ckpt"):
        content = torch.load(path, weights_only=True)
        assert content["global_step"] == content["average"]["updates"] == 8
        assert_close(average, content["average"]["weights"])
        assert_close(recorded.steps[-1], {name: content["state_dict"][name] for name in recorded.steps[-1]})
    for words, folder, expected in (
        ([], "plain", average),
        (["--weights=average"], "average", average),
        (["--weights=current"], "current", recorded.steps[-1]),
        (None, "model", average),
    ):
        if words is not None:
            assert main(["export", str(last), str(tmp_path / folder), *words]) == 0
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(exported[name.removeprefix("model.")].double(), value, atol=1e-6, rtol=1e-6)
    module, data = build_sft(llama, tmp_path)
    quiet_trainer(tmp_path, callbacks=[EMA(0.7)]).validate(module, data, ckpt_path=last, verbose=False)
    assert_close(average, copy_trainable(module))


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_a_resumed_run_is_equal_to_the_last_bit(llama, tmp_path, adapter):
    def run(name: str, start: Path | None = None) -> tuple[dict[str, torch.Tensor], Any]:
        module, data = build_ppo(llama, tmp_path, adapter)
        kept = ModelCheckpoint(tmp_path / name, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        callback = EMA(0.9)
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[callback, kept], enable_checkpointing=True)
        trainer.fit(module, datamodule=data, ckpt_path=start)
        return copy_trainable(module), callback

    uninterrupted, callback = run("uninterrupted")
    assert len(callback.get_average()) == len(uninterrupted) < (200 if adapter is None else 60)
    for step in (3, 4):
        resumed, _ = run(f"from-{step}", tmp_path / "uninterrupted" / f"step={step}.ckpt")
        assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_sharded_weights_have_the_average_of_one_process(llama, tmp_path):
    def run(start: Path | None = None, **settings: Any) -> list[torch.Tensor]:
        module, data = build_ppo(llama, tmp_path)
        module.ppo.micro_batch_size = 4 // settings.get("devices", 1)
        # an optimizer with state: Lightning cannot resume one without state under FSDP2
        module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.5)
        kept = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer = quiet_trainer(
            tmp_path, max_epochs=1, callbacks=[EMA(0.7), kept], enable_checkpointing=True, **settings
        )
        trainer.fit(module, datamodule=data, ckpt_path=start)
        return full_weights(module)

    one = run()
    shutil.rmtree(tmp_path / "kept")

    def two() -> list[list[torch.Tensor]]:
        sharded = run(devices=2, strategy=FSDP2Strategy())
        return [sharded, run(tmp_path / "kept" / "step=1.ckpt", devices=2, strategy=FSDP2Strategy())]

    for runs in on_ranks(two, tmp_path):
        for weights in runs:
            for mine, theirs in zip(one, weights):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


class RecordLosses(L.Callback):
    """Store the training loss of every step and the loss of every validation, each over all ranks."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["validation/loss"]))


def build_reward(model: str, folder: Path) -> tuple[Any, Any]:
    rows = write_rows(folder / "rows.jsonl", rankings(24))
    return RewardModule(model, sgd(0.3)), ComparisonDataModule(rows, micro_batch_size=4, validation_fraction=0.2)


@pytest.mark.parametrize("sanity_steps", [0, 2], ids=["validation", "sanity check too"])
@pytest.mark.parametrize("build", [build_sft, build_reward], ids=["sft", "reward"])
def test_sharded_runs_that_validate_have_the_losses_and_the_average_of_one_process(
    build, sanity_steps, llama, tmp_path
):
    """A pass without gradients leaves weights gathered, which the average must neither start with nor be lost in."""

    def run(**settings: Any) -> tuple[list[float], list[torch.Tensor]]:
        module, data = build(llama, tmp_path)
        data.micro_batch_size //= settings.get("devices", 1)
        losses = RecordLosses()
        intervals = {"max_epochs": 2, "num_sanity_val_steps": sanity_steps, "val_check_interval": 2}
        trainer = quiet_trainer(tmp_path, callbacks=[EMA(0.7), losses], **intervals, **settings)
        trainer.fit(module, datamodule=data)
        return losses.losses, full_weights(module)

    expected_losses, expected = run()
    assert len(expected_losses) >= 12 and abs(expected_losses[0] - expected_losses[-1]) > 0.02
    for world_size in (1, 2):
        sharded = partial(run, devices=world_size, strategy=FSDP2Strategy())
        for losses, weights in on_ranks(sharded, tmp_path, world_size):
            assert losses == pytest.approx(expected_losses, abs=1e-5)
            for mine, theirs in zip(weights, expected, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_invalid_settings_are_refused(llama, tmp_path):
    with pytest.raises(UserError, match="decay must be at least 0 and below 1"):
        EMA(1.0)
    module, data = build_sft(llama, tmp_path)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    assert main(["export", str(tmp_path / "plain.ckpt"), str(tmp_path / "model"), "--weights=average"]) == 2


def test_a_tied_weight_is_exported_as_its_average(model_folders, tmp_path):
    """A state dict has the embedding a second time, as the output layer."""
    kept = ModelCheckpoint(tmp_path, filename="last")
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[EMA(0.7), kept], enable_checkpointing=True)
    data = DemonstrationDataModule(demonstrations(12), micro_batch_size=4)
    trainer.fit(SFTModule(model_folders["gpt2"], sgd(0.3)), datamodule=data)
    content, name = torch.load(tmp_path / "last.ckpt", weights_only=True), "model.transformer.wte.weight"
    average = content["average"]["weights"][name]
    assert not torch.equal(average, content["state_dict"][name])
    export_checkpoint(tmp_path / "last.ckpt", tmp_path / "average", "average")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "average")
    assert torch.equal(exported.get_input_embeddings().weight, average)
    assert torch.equal(exported.get_output_embeddings().weight, average)


def test_the_average_of_half_precision_weights_moves_by_less_than_they_can(tmp_path):
    """From 1 to 1.25 at a decay of 0.992: in bfloat16, steps of 0.002 at 1 are rounded away."""
    trainer, module = SimpleNamespace(global_step=0), torch.nn.Linear(2, 2, bias=False).bfloat16()
    torch.nn.init.ones_(module.weight)
    callback: Any = EMA(0.992)
    callback.on_train_start(trainer, module)
    for trainer.global_step in range(1, 102):
        callback.on_train_batch_end(trainer, module, None, None, 0)
        torch.nn.init.constant_(module.weight, 1.25)
    average = callback.get_average()["weight"].detach().clone()
    torch.testing.assert_close(average, torch.full((2, 2), 1.25 - 0.25 * 0.992**100))
    callback.on_validation_start(trainer, module)
    assert torch.equal(module.weight, average.bfloat16())
    callback.on_validation_end(trainer, module)
    assert bool((module.weight == 1.25).all()) and torch.equal(callback.get_average()["weight"], average)


def test_a_callback_that_averaged_before_begins_anew(llama, tmp_path):
    def data() -> DemonstrationDataModule:
        rows = demonstrations(12)
        return DemonstrationDataModule(rows, validation_path=rows[:4], micro_batch_size=4)

    module, callback = SFTModule(llama, sgd(0.3)), EMA(0.7)
    kept = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[callback, kept], enable_checkpointing=True)
    trainer.fit(module, data())
    first, second = (tmp_path / f"step={step}.ckpt" for step in (2, 3))
    weights = [torch.load(path, weights_only=True)["average"]["weights"] for path in (first, second)]
    assert_close(weights[1], copy_trainable(module))
    trainer.validate(module, data(), ckpt_path=first, verbose=False)
    assert_close(weights[0], copy_trainable(module))
    loader = DataLoader(demonstrations(4), batch_size=4, collate_fn=list)
    trainer.test(module, loader, ckpt_path=second, verbose=False)
    assert_close(weights[1], copy_trainable(module))
    prompts = DataLoader([{"prompt": "w1 w2"}], batch_size=1, collate_fn=list)
    trainer.predict(module, prompts, ckpt_path=first)
    assert_close(weights[0], copy_trainable(module))
    quiet_trainer(tmp_path, max_epochs=1, max_steps=2, callbacks=[callback]).fit(SFTModule(llama, sgd(0.3)), data())
    assert callback.get_average() and int(callback._average_model.n_averaged) == 2
