"""A recipe and the same run in ten lines of Python, with objects for its paths, give the same weights, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pandas
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.cli import main
from lit_rlhf.data import ComparisonDataModule, DemonstrationDataModule, PromptDataModule
from lit_rlhf.generation import SamplingParams
from lit_rlhf.modules import PPOConfig, PPOModule, RewardModule, SFTModule
from tests.helpers.small_runs import QUIET, demonstrations, rankings
from tests.helpers.stages import write_stages


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def count_words(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[int]:
    return [len(response.split()) for response in responses]


def train_sft(llama: str) -> Any:
    L.seed_everything(0)
    model = AutoModelForCausalLM.from_pretrained(llama)
    module = SFTModule(model, adamw, tokenizer=AutoTokenizer.from_pretrained(llama))
    data = DemonstrationDataModule(datasets.Dataset.from_list(demonstrations(12)), micro_batch_size=4)
    L.Trainer(accelerator="cpu", devices=1, max_epochs=1, **QUIET).fit(module, data)
    assert module.model is model  # trained in place
    return model


def train_reward_model(llama: str) -> Any:
    L.seed_everything(0)
    model = AutoModelForCausalLM.from_pretrained(llama)
    module = RewardModule(model, adamw)  # its tokenizer is in the folder that it was loaded from
    data = ComparisonDataModule(rankings(12), micro_batch_size=4)
    L.Trainer(accelerator="cpu", devices=1, max_epochs=1, **QUIET).fit(module, data)
    return module.model.model


def train_ppo(llama: str) -> Any:
    L.seed_everything(0)
    module = PPOModule(
        AutoModelForCausalLM.from_pretrained(llama),
        count_words,
        SamplingParams(max_new_tokens=4),
        PPOConfig(rollout_batch_size=8, micro_batch_size=4),
        optimizer=adamw,
    )
    data = PromptDataModule(pandas.DataFrame(demonstrations(12)))
    L.Trainer(accelerator="cpu", devices=1, max_epochs=1, **QUIET).fit(module, data)
    return module.policy


STAGES: dict[str, Callable[[str], Any]] = {"sft": train_sft, "reward": train_reward_model, "ppo": train_ppo}


@pytest.mark.parametrize("stage", STAGES)
def test_ten_lines_of_python_are_the_recipe(
    stage: str, tmp_path: Path, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_stages(tmp_path, llama)
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "-c", f"{stage}.yaml"]) == 0
    auto = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    expected = auto.from_pretrained(f"runs/{stage}/model").state_dict()
    weights = STAGES[stage](llama).state_dict()
    start = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    assert weights.keys() == expected.keys()
    assert any(not torch.equal(weights[name], start[name]) for name in weights.keys() & start.keys())
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
