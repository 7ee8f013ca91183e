"""Runs with an adapter: checkpoints of adapters and heads alone, resumed exactly on the base that they began with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf.callbacks import EMA, ExportModel
from lit_rlhf.checkpoint_files import read_checkpoint
from lit_rlhf.cli import main
from lit_rlhf.data import ComparisonDataModule, DemonstrationDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.export import export_checkpoint
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.modules import PPOConfig, PPOModule, RewardModule, SFTModule
from lit_rlhf.modules.critics import SeparateCritic
from lit_rlhf.rewards import FunctionReward
from lit_rlhf.strategies import FSDP2Strategy
from tests.helpers.ppo_fakes import PromptData
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import demonstrations, quiet_trainer, rankings, write_rows

IDS = torch.tensor([[5, 6, 7, 8, 1]])
STAGES = ("sft", "reward", "ppo")


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def make_stage(kind: str, model: str, folder: Path) -> tuple[Any, Any]:
    """Return a module with an adapter, and data of 4 optimizer steps per epoch."""
    settings: dict[str, Any] = {"optimizer": adam, "adapter": LoRA(rank=2)}
    if kind == "sft":
        rows = write_rows(folder / "rows.jsonl", demonstrations(16))
        return SFTModule(model, **settings), DemonstrationDataModule(rows, micro_batch_size=4)
    if kind == "reward":
        rows = write_rows(folder / "rows.jsonl", rankings(8))
        return RewardModule(model, **settings), ComparisonDataModule(rows, micro_batch_size=2)
    ppo = PPOConfig(rollout_batch_size=16, micro_batch_size=4, critic_learning_rate=1e-2)
    reward = FunctionReward("tests.modules.test_adapter_checkpoints.num_words")
    return PPOModule(model, reward, SamplingParams(5), ppo, **settings), PromptData()


def num_words(prompts: list[str], responses: list[str], rows: list[Any]) -> list[float]:
    return [float(len(response.split())) for response in responses]


def fit(kind: str, model: str, folder: Path, start: Path | None = None, **settings: Any) -> Any:
    """Train two epochs, with a checkpoint at every step and an export of the adapter."""
    module, data = make_stage(kind, model, folder.parent)
    callbacks = [
        *settings.pop("callbacks", []),
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1),
        ExportModel("adapter", format="peft"),
    ]
    trainer = quiet_trainer(folder, max_epochs=2, callbacks=callbacks, enable_checkpointing=True, **settings)
    torch.rand(7 if start is None else 11)
    trainer.fit(module, datamodule=data, ckpt_path=start)
    return module


def named_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    named = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in named.items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def with_base(checkpoint: Path, module: Any, target: Path) -> Path:
    """Write a checkpoint as it was when it held the base."""
    content = torch.load(checkpoint, weights_only=True)
    about = content["lit_rlhf"]
    del about["base"], about["fingerprints"]["base"]
    about["fingerprints"].pop("critic base", None)
    content["state_dict"] = {**module.state_dict(), **content["state_dict"]}
    torch.save(content, target)
    return target


@pytest.mark.parametrize("kind", STAGES)
def test_a_checkpoint_holds_adapters_and_heads_and_resumes_exactly(kind, llama, tmp_path):
    module = fit(kind, llama, tmp_path / "run")
    expected, start = named_weights(module), tmp_path / "run" / "step=3.ckpt"
    names = torch.load(start, weights_only=True)["state_dict"].keys()
    assert all(".lora_" in name or name.endswith(".score.weight") for name in names)
    assert any(name.endswith(".score.weight") for name in names) == (kind != "sft")
    assert_equal(named_weights(fit(kind, llama, tmp_path / "resumed", start)), expected)
    old = with_base(start, module, tmp_path / "old.ckpt")
    assert_equal(named_weights(fit(kind, llama, tmp_path / "from-old", old)), expected)


def test_another_base_is_refused_in_one_line(llama, tmp_path):
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    fit("sft", str(base), tmp_path / "run")
    checkpoint = tmp_path / "run" / "step=3.ckpt"
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1.0
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"ckpt_path: the base '{base}' is not the one that this run began with"):
        fit("sft", str(base), tmp_path / "resumed", checkpoint)
    with pytest.raises(UserError, match=rf"an adapter on '{base}', which is not the one of its training any more"):
        export_checkpoint(checkpoint, tmp_path / "merged")
    shutil.rmtree(base)
    with pytest.raises(UserError, match="there is no folder"):
        export_checkpoint(checkpoint, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_frozen_critic_must_be_the_one_of_the_run(llama, model_folders, tmp_path):
    critic = Path(shutil.copytree(llama, tmp_path / "critic"))

    def run(folder: str, start: Path | None = None) -> None:
        module, data = make_stage("ppo", llama, tmp_path)
        module.critic = SeparateCritic(str(critic))
        trainer = quiet_trainer(tmp_path / folder, max_epochs=2 if start else 1)
        trainer.fit(module, datamodule=data, ckpt_path=start)
        trainer.save_checkpoint(tmp_path / folder / "last.ckpt")

    run("run")
    run("resumed", tmp_path / "run" / "last.ckpt")
    weights = load_file(critic / "model.safetensors")
    weights["model.norm.weight"][0] += 1.0
    save_file(weights, critic / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"the critic base '.*critic' is not the one that this run began with"):
        run("again", tmp_path / "run" / "last.ckpt")


@pytest.mark.parametrize("kind", STAGES)
def test_both_formats_are_the_trained_model(kind, llama, tmp_path):
    module = fit(kind, llama, tmp_path / "run")
    trained = module.exported_model.eval()(input_ids=IDS).logits
    last = tmp_path / "run" / "step=8.ckpt"
    assert main(["export", str(last), str(tmp_path / "peft"), "--format=peft"]) == 0
    assert main(["export", str(last), str(tmp_path / "merged")]) == 0
    scalar = kind == "reward"
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    for folder in (tmp_path / "run" / "adapter", tmp_path / "peft"):
        plain = PeftModel.from_pretrained(auto.from_pretrained(llama, **({"num_labels": 1} if scalar else {})), folder)
        torch.testing.assert_close(plain.eval()(input_ids=IDS).logits, trained, atol=1e-6, rtol=1e-6)
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(input_ids=IDS).logits, trained, atol=2e-5, rtol=2e-5)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config == json.loads((tmp_path / "peft" / "adapter_config.json").read_text())


def test_the_average_is_exported_as_an_adapter(llama, tmp_path):
    fit("sft", llama, tmp_path / "run", callbacks=[EMA(0.5)])
    last = tmp_path / "run" / "step=8.ckpt"
    export_checkpoint(last, tmp_path / "average", "average", format="peft")
    export_checkpoint(last, tmp_path / "current", "current", format="peft")
    read = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("average", "current")}
    exported = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(exported[name], weight) for name, weight in read["average"].items())
    assert any(not torch.equal(exported[name], weight) for name, weight in read["current"].items())


def test_a_run_without_an_adapter_has_none_to_write(llama, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", demonstrations(4))
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[ExportModel(format="peft")])
    with pytest.raises(UserError, match=r"format is 'peft', but model.adapter is null"):
        trainer.fit(SFTModule(llama), datamodule=DemonstrationDataModule(rows, micro_batch_size=4))
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(SFTModule(llama), datamodule=DemonstrationDataModule(rows, micro_batch_size=4))
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    with pytest.raises(UserError, match=r"full.ckpt' holds full weights; export it in the format 'merged'"):
        export_checkpoint(tmp_path / "full.ckpt", tmp_path / "out", format="peft")


@pytest.mark.parametrize("way", ["ddp", "fsdp", "shards"])
def test_two_ranks_save_and_resume_adapters_alone(way, llama, tmp_path):
    def run(folder: str, start: Path | None = None) -> dict[str, Tensor]:
        strategy = "ddp" if way == "ddp" else FSDP2Strategy(save_distributed_checkpoint=way == "shards")
        return named_weights(fit("reward", llama, tmp_path / folder, start, devices=2, strategy=strategy))

    def both() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return run("run"), run("resumed", tmp_path / "run" / "step=3.ckpt")

    for uninterrupted, resumed in on_ranks(both, tmp_path):
        assert_equal(resumed, uninterrupted)
    start = tmp_path / "run" / "step=3.ckpt"
    assert start.is_dir() == (way == "shards")
    names = read_checkpoint(start)["state_dict"].keys()
    assert names and all(".lora_" in name or name.endswith("score.weight") for name in names)
    base = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    plain = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    export_checkpoint(tmp_path / "run" / "step=4.ckpt", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=2e-5, rtol=2e-5)


def test_a_checkpoint_that_lacks_a_trained_weight_is_refused_with_sharded_weights(llama, tmp_path):
    fit("sft", llama, tmp_path / "run")
    content = torch.load(tmp_path / "run" / "step=3.ckpt", weights_only=True)
    del content["state_dict"][min(content["state_dict"])]
    torch.save(content, tmp_path / "less.ckpt")

    def resume() -> str:
        try:
            fit("sft", llama, tmp_path / "again", tmp_path / "less.ckpt", devices=2, strategy=FSDP2Strategy())
        except UserError as refusal:
            return str(refusal)
        return "resumed"

    assert all("lacks the weight" in message for message in on_ranks(resume, tmp_path))


def test_ppo_takes_adapters_in_every_role(llama, tokenizer, tmp_path):
    """Policy, reference, reward model and critic, as it takes the merged models."""
    from lit_rlhf.rewards import RewardModelScorer

    sft, reward = fit("sft", llama, tmp_path / "sft"), fit("reward", llama, tmp_path / "reward")
    for name, module in (("sft", sft), ("reward", reward)):
        export_checkpoint(tmp_path / name / "step=8.ckpt", tmp_path / name / "merged")
        assert (tmp_path / name / "adapter" / "adapter_model.safetensors").is_file() and module is not None

    def score(kind: str) -> dict[str, float]:
        scorer = RewardModelScorer(str(tmp_path / "reward" / kind), require_centered=False)
        ppo = PPOConfig(rollout_batch_size=16, micro_batch_size=4, critic_learning_rate=1e-2)
        policy = str(tmp_path / "sft" / kind)
        module = PPOModule(policy, scorer, SamplingParams(5), ppo, optimizer=adam, loading=ModelLoadingConfig())
        trainer = quiet_trainer(tmp_path / "ppo", max_epochs=1)
        trainer.fit(module, datamodule=PromptData())
        return {name: float(value) for name, value in trainer.callback_metrics.items() if "time/" not in name}

    assert score("adapter") == pytest.approx(score("merged"), abs=1e-4, rel=1e-3)
