"""A 4-bit base with adapters (QLoRA): trained, checkpointed without its base, resumed, exported in full precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, LlamaConfig

from lit_rlhf.callbacks import ExportModel
from lit_rlhf.data import ComparisonDataModule, DemonstrationDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.export import export_checkpoint
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.modules import PPOConfig, PPOModule, RewardModule, SFTModule
from lit_rlhf.rewards import Reward, RewardModelScorer
from tests.helpers.ppo_fakes import PromptData
from tests.helpers.small_runs import demonstrations, quiet_trainer, rankings, write_rows

IDS = torch.tensor([[5, 6, 7, 8, 1]])
SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
LLAMA = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
WIDE = {
    "llama": LlamaConfig(**LLAMA, **SPECIAL, num_attention_heads=4, max_position_embeddings=64),
    "gpt2": GPT2Config(vocab_size=32, n_embd=64, n_layer=2, n_head=4, n_positions=64, **SPECIAL),
}
QLORA = {"adapter": LoRA(rank=4), "loading": ModelLoadingConfig(quantization="nf4")}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, str]:
    """Write models of hidden size 64, the smallest that 4-bit layers support on a CPU."""
    folders = {}
    for name, config in WIDE.items():
        torch.manual_seed(0)
        folders[name] = str(tmp_path_factory.mktemp(f"wide-{name}"))
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


class WordCount(Reward):
    """Score a response by its number of words."""

    def score(self, episodes: Any) -> torch.Tensor:
        """Count words."""
        return torch.tensor([float(len(response.split())) for response in episodes.responses])


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def build_stage(kind: str, model: str, folder: Path) -> tuple[Any, Any]:
    """Build a module on a 4-bit base, and its data."""
    if kind == "sft":
        rows = write_rows(folder / "rows.jsonl", demonstrations(16))
        return SFTModule(model, adam, **QLORA), DemonstrationDataModule(rows, micro_batch_size=4)
    if kind == "reward":
        rows = write_rows(folder / "rows.jsonl", rankings(8))
        return RewardModule(model, adam, **QLORA), ComparisonDataModule(rows, micro_batch_size=2)
    settings = PPOConfig(rollout_batch_size=16, micro_batch_size=4, critic_learning_rate=1e-2)
    return PPOModule(model, WordCount(), SamplingParams(5), settings, optimizer=adam, **QLORA), PromptData()


@pytest.mark.parametrize(("kind", "shape"), [("sft", "llama"), ("sft", "gpt2"), ("reward", "llama"), ("ppo", "llama")])
def test_the_exported_model_matches_the_adapters_on_the_4_bit_base(kind, shape, wide, tmp_path):
    module, data = build_stage(kind, wide[shape], tmp_path)
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[ExportModel(), checkpoint], enable_checkpointing=True)
    trainer.fit(module, datamodule=data)
    layers = {type(layer).__name__ for layer in module.exported_model.modules()}
    assert "Linear4bit" in layers
    trained = module.exported_model.eval()(input_ids=IDS).logits
    export_checkpoint(tmp_path / "last.ckpt", tmp_path / "by-command")
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    base = auto.from_pretrained(wide[shape]).eval()(input_ids=IDS).logits
    assert (trained - base).abs().max() > 0.02
    for folder in ("model", "by-command"):
        plain = auto.from_pretrained(tmp_path / folder).eval()
        assert "Linear4bit" not in {type(layer).__name__ for layer in plain.modules()}
        # bitsandbytes computes 4-bit layers in bfloat16 in some CPU kernels
        torch.testing.assert_close(plain(input_ids=IDS).logits, trained, atol=0.02, rtol=0.02)


def test_a_checkpoint_holds_trainable_weights_alone_and_resumes_exactly(wide, tmp_path):
    module, data = build_stage("sft", wide["llama"], tmp_path)
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    quiet_trainer(tmp_path, max_epochs=2, callbacks=[checkpoint], enable_checkpointing=True).fit(
        module, datamodule=data
    )
    content = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert content["state_dict"].keys() == trainable and all("lora_" in name for name in trainable)
    resumed, data = build_stage("sft", wide["llama"], tmp_path)
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(resumed, datamodule=data, ckpt_path=tmp_path / "step=2.ckpt")
    for (name, expected), (_, actual) in zip(module.named_parameters(), resumed.named_parameters()):
        assert torch.equal(actual, expected), name
    del content["state_dict"][min(trainable)]
    with pytest.raises(UserError, match="lacks the weight"):
        resumed.on_load_checkpoint(content)


def test_unsupported_settings_are_refused(llama, wide, tmp_path):
    with pytest.raises(UserError, match=r"set model\.adapter"):
        SFTModule(llama, loading=ModelLoadingConfig(quantization="nf4"))
    rows = write_rows(tmp_path / "rows.jsonl", demonstrations(16))
    with pytest.raises(UserError, match="multiples of 64, this model has hidden_size 32"):
        quiet_trainer(tmp_path).fit(
            SFTModule(llama, **QLORA), datamodule=DemonstrationDataModule(rows, micro_batch_size=4)
        )


def test_a_reward_model_in_4_bits_scores_like_the_same_in_float32(wide, tokenizer, tmp_path):
    """The reward model of `llama-3b-qlora/ppo`."""
    torch.manual_seed(0)
    scalar = LlamaConfig(**WIDE["llama"].to_diff_dict() | {"num_labels": 1, "score_shift": 0.0, "score_scale": 1.0})
    AutoModelForSequenceClassification.from_config(scalar).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scores = []
    for quantization in (None, "nf4"):
        reward = RewardModelScorer(str(tmp_path), loading=ModelLoadingConfig(quantization=quantization))
        reward.prepare(tokenizer, torch.device("cpu"))
        layers = {type(layer).__name__ for layer in reward.model.modules()}
        assert ("Linear4bit" in layers) == (quantization == "nf4")
        scores.append(reward.model.score(IDS, torch.ones_like(IDS)))
    torch.testing.assert_close(*scores, atol=0.1, rtol=0.1)
    assert not torch.equal(*scores)
