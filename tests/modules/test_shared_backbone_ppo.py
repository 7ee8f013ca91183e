"""PPO with four models on one frozen base: memory, results, checkpoints and exports."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from lit_rlhf.callbacks import ExportModel
from lit_rlhf.data import ComparisonDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.export import export_checkpoint
from lit_rlhf.models.loading_config import LoRA
from lit_rlhf.modules import PPOConfig, PPOModule, RewardModule
from lit_rlhf.modules.critics import LoRACritic, SeparateCritic
from lit_rlhf.rewards import LoRARewardModel, RewardModelScorer
from lit_rlhf.strategies import FSDP2Strategy
from tests.helpers.ppo_fakes import PromptData
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import quiet_trainer, rankings, sgd, write_rows

LORA = LoRA(rank=2)
IDS = torch.tensor([[5, 6, 7, 8, 1]])


@pytest.fixture(scope="module")
def reward(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a reward model trained with LoRA."""
    folder = tmp_path_factory.mktemp("reward")
    data = ComparisonDataModule(write_rows(folder / "rows.jsonl", rankings(8)), micro_batch_size=4)
    module = RewardModule(llama, lambda p: torch.optim.Adam(p, lr=1e-2), adapter=LORA)
    trainer = quiet_trainer(folder, max_epochs=2)
    trainer.fit(module, datamodule=data)
    module.model.center(0.25, 2.0)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def make_module(model: str, checkpoint: Path, micro_batch_size: int = 4, **settings: Any) -> PPOModule:
    sizes = PPOConfig(rollout_batch_size=16, micro_batch_size=micro_batch_size, critic_learning_rate=2e-3)
    reward = LoRARewardModel(str(checkpoint))
    return PPOModule(
        model, reward, SamplingParams(5), sizes, critic=LoRACritic(), optimizer=sgd(0.1), adapter=LORA, **settings
    )


def weight_bytes(*models: Any) -> dict[int, int]:
    """Map the address of each weight to its size in bytes."""
    weights = [weight for model in models for weight in (*model.parameters(), *model.buffers())]
    return {weight.data_ptr(): weight.numel() * weight.element_size() for weight in weights}


def test_four_models_are_one_base_three_adapters_and_two_heads(llama, reward, tmp_path):
    module = make_module(llama, reward)
    quiet_trainer(tmp_path, max_epochs=1).fit(module, datamodule=PromptData())
    assert module.frozen == {}, "the reference is the frozen base"
    total = sum(weight_bytes(module, module.reward.head).values())
    plain = AutoModelForCausalLM.from_pretrained(llama)
    base, width = sum(weight_bytes(plain).values()), plain.config.hidden_size
    layers = [layer for layer in plain.model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    adapter = sum(4 * LORA.rank * (layer.in_features + layer.out_features) for layer in layers)
    metrics = sum(metric.element_size() * metric.numel() for metric in module.buffers() if metric.dim() == 0)
    assert total - metrics <= base + 3 * adapter + 2 * 4 * width + 64
    assert total < 1.6 * base and adapter > 0


def test_scores_and_values_equal_those_of_separate_models(llama, reward, tmp_path):
    """The exported reward model, and a separate critic initialized from it, give the same numbers."""
    export_checkpoint(reward, tmp_path / "reward")
    metrics = []
    scorer = RewardModelScorer(str(tmp_path / "reward"))
    sizes = PPOConfig(rollout_batch_size=16, micro_batch_size=4, critic_learning_rate=0.05)
    separate = PPOModule(
        llama, scorer, SamplingParams(5), sizes, critic=SeparateCritic(), optimizer=sgd(0.1), adapter=LORA
    )
    for module in (make_module(llama, reward), separate):
        trainer = quiet_trainer(tmp_path, max_epochs=1)
        trainer.fit(module, datamodule=PromptData())
        metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert abs(metrics[0]["value/explained_variance"]) > 0.01
    for name in ("reward/score", "reward/score_std", "reward/kl", "value/explained_variance"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], abs=1e-5), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_the_weights_of_one_process(strategy, llama, reward, tmp_path):
    def run(micro_batch_size: int, **settings: Any) -> dict[str, torch.Tensor]:
        module = make_module(llama, reward, micro_batch_size)
        if settings.get("strategy") == "fsdp":
            settings["strategy"] = FSDP2Strategy()
        quiet_trainer(tmp_path, max_epochs=1, **settings).fit(module, datamodule=PromptData())
        named = [(name, p.detach()) for name, p in module.named_parameters() if p.requires_grad]
        return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in named}

    expected = run(8)
    assert {name.rsplit(".", 2)[-2] for name in expected} == {"default", "critic", "score"}
    for weights in on_ranks(lambda: run(2, devices=2, strategy=strategy, accumulate_grad_batches=2), tmp_path):
        assert weights.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_resumes_and_an_export_contains_the_policy_alone(llama, reward, tmp_path):
    uninterrupted = make_module(llama, reward)
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    settings = {"max_epochs": 2, "callbacks": [checkpoints, ExportModel()], "enable_checkpointing": True}
    quiet_trainer(tmp_path, **settings).fit(uninterrupted, datamodule=PromptData())
    resumed = make_module(llama, reward)
    quiet_trainer(tmp_path / "again", max_epochs=2).fit(
        resumed, datamodule=PromptData(), ckpt_path=tmp_path / "step=3.ckpt"
    )
    for (name, one), (_, other) in zip(uninterrupted.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    export_checkpoint(tmp_path / "step=6.ckpt", tmp_path / "by-command")
    policy = uninterrupted.policy.eval()(input_ids=IDS).logits
    for folder in ("model", "by-command"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        if folder == "model":
            torch.testing.assert_close(plain(input_ids=IDS).logits, policy, atol=1e-5, rtol=1e-5)
        assert not [name for name in plain.state_dict() if "lora" in name]


def test_a_resumed_run_refuses_another_reward_checkpoint(llama, reward, tmp_path):
    """Otherwise the adapter would be that of the run's checkpoint and the head that of the changed file."""
    own = tmp_path / "reward.ckpt"
    own.write_bytes(reward.read_bytes())
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(make_module(llama, own), datamodule=PromptData())
    trainer.save_checkpoint(tmp_path / "ppo.ckpt")
    content = torch.load(own, weights_only=True)
    content["state_dict"]["model.model.score.weight"] += 1.0
    torch.save(content, own)
    again = quiet_trainer(tmp_path, max_epochs=2)
    with pytest.raises(UserError, match="reward"):
        again.fit(make_module(llama, own), datamodule=PromptData(), ckpt_path=tmp_path / "ppo.ckpt")


def test_a_lora_critic_needs_an_adapter_and_a_separate_one_a_folder(llama, reward, tmp_path):
    module = make_module(llama, reward)
    module.adapter = None
    with pytest.raises(UserError, match=r"set model\.adapter as well"):
        quiet_trainer(tmp_path, max_epochs=1).fit(module, datamodule=PromptData())
    sizes = PPOConfig(rollout_batch_size=16, micro_batch_size=4)
    module = PPOModule(llama, LoRARewardModel(str(reward)), SamplingParams(5), sizes, adapter=LORA)
    with pytest.raises(UserError, match="a separate critic starts from a folder"):
        quiet_trainer(tmp_path, max_epochs=1).fit(module, datamodule=PromptData())
