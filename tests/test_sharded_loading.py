"""Under FSDP2 rank zero alone loads weights, and after sharding every rank has those that one process loads."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_rlhf.strategies
from lit_rlhf.data import ComparisonDataModule, DemonstrationDataModule
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.modules import PPOConfig, PPOModule, RewardModule, SFTModule
from lit_rlhf.rewards import FunctionReward
from lit_rlhf.strategies import FSDP2Strategy, transformer_blocks
from tests.helpers.ppo_fakes import PromptData
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import demonstrations, full_weights, quiet_trainer, rankings, sgd, write_rows

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("llama", {}),
    "tied weights": ("gpt2", {}),
    "tied weights, scaled embedding": ("gemma", {}),
    "another dtype": ("llama", {"loading": ModelLoadingConfig(dtype="bfloat16")}),
    "an embedding that grows": ("llama", {"loading": ModelLoadingConfig(pad_token="<|pad|>")}),
    "adapters": ("llama", {"adapter": LoRA(rank=2)}),
    "reward": ("llama", {}),
    "ppo": ("llama", {}),
}


def materialized_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that are not on the meta device."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)


class RecordLoaded(L.Callback):
    """Record the gathered weights and buffers when loading is done."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record them, including those of a reference policy."""
        module: Any = pl_module
        models = [pl_module, *getattr(module, "frozen", {}).values()]
        self.weights = [weight for model in models for weight in full_weights(model)]
        self.buffers = {name: buffer.clone() for model in models for name, buffer in model.named_buffers()}
        model = module.exported_model
        embeddings, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
        self.tied = lm_head is not None and embeddings.weight is lm_head.weight


def build_module(case: str, model: str, folder: Path) -> tuple[L.LightningModule, L.LightningDataModule]:
    settings = CASES[case][1]
    if case == "ppo":
        reward = FunctionReward(function="math.fsum")
        return PPOModule(
            model, reward, SamplingParams(4), PPOConfig(rollout_batch_size=4, micro_batch_size=1)
        ), PromptData()
    if case == "reward":
        return RewardModule(model), ComparisonDataModule(
            write_rows(folder / "rows.jsonl", rankings(4)), micro_batch_size=1
        )
    rows = write_rows(folder / "rows.jsonl", demonstrations(4))
    return SFTModule(model, sgd(0.1), **settings), DemonstrationDataModule(rows, micro_batch_size=1)


def load(case: str, model: str, folder: Path, **settings: Any) -> tuple[list[Tensor], dict[str, Tensor], bool]:
    loaded = RecordLoaded()
    module, data = build_module(case, model, folder)
    quiet_trainer(folder, max_steps=0, callbacks=[loaded], **settings).fit(module, datamodule=data)
    return loaded.weights, loaded.buffers, loaded.tied


def without_padding(model: str, folder: Path) -> str:
    """Copy a model folder, with a tokenizer without padding token."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_gets_what_one_process_loads(case, model_folders, tmp_path, monkeypatch):
    model = model_folders[CASES[case][0]]
    if "grows" in case:
        model = without_padding(model, tmp_path / "unpadded")
    bytes_at_sharding: list[int] = []

    def counted(model: nn.Module) -> list[nn.Module]:
        bytes_at_sharding.append(materialized_bytes(model))
        return transformer_blocks(model)

    def on_rank() -> Any:
        return load(case, model, tmp_path, devices=2, strategy=FSDP2Strategy()), bytes_at_sharding

    weights, buffers, tied = load(case, model, tmp_path)
    monkeypatch.setattr(lit_rlhf.strategies, "transformer_blocks", counted)
    ranks = on_ranks(on_rank, tmp_path)
    for (own_weights, own_buffers, own_tied), _ in ranks:
        assert len(own_weights) == len(weights)
        assert all(torch.equal(own, full) and own.dtype == full.dtype for own, full in zip(own_weights, weights))
        assert own_buffers.keys() == buffers.keys()
        assert all(torch.equal(own_buffers[name], buffers[name]) for name in buffers)
        assert own_tied == tied == ("tied" in case)
    full_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    assert sum(ranks[0][1]) == full_bytes
    assert ranks[1][1] == [0] * len(ranks[0][1]), "a rank other than zero held a full model"
    assert len(ranks[1][1]) == (3 if case == "ppo" else 1)


def test_a_model_with_indivisible_sizes_is_sharded_completely(llama, tmp_path):
    """Three ranks: the shards are padded, and the last ones may be empty."""
    expected = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    ranks = on_ranks(lambda: load("sft", llama, tmp_path, devices=3, strategy=FSDP2Strategy())[0], tmp_path, 3)
    for weights in ranks:
        assert sum(weight.numel() for weight in weights) == sum(weight.numel() for weight in expected.values())
        assert all(torch.equal(weight, full) for weight, full in zip(weights, expected.values()))
