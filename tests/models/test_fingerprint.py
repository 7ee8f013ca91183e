"""Fingerprints of models, and resumed runs that refuse other frozen models than they started with."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.fingerprint import model_fingerprint
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.rewards import EnsembleReward, RewardModelScorer, ScaledReward
from tests.helpers.ppo_fakes import PromptData
from tests.helpers.small_runs import quiet_trainer, sgd


def shift_one_weight(folder: Path, auto: Any = AutoModelForCausalLM) -> None:
    model = auto.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    model.save_pretrained(folder)


def test_content_counts_and_modification_times_do_not(llama, tmp_path):
    copy = shutil.copytree(llama, tmp_path / "copy")
    for path in copy.iterdir():
        os.utime(path, (0, 0))
    (copy / "README.md").write_text("not a weight")
    assert model_fingerprint(str(copy), ModelLoadingConfig()) == model_fingerprint(llama, ModelLoadingConfig())
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="beside its weights"):  # transformers would apply the adapter
        model_fingerprint(str(copy), ModelLoadingConfig())
    (copy / "adapter_config.json").unlink()
    shift_one_weight(copy)
    assert model_fingerprint(str(copy), ModelLoadingConfig()) != model_fingerprint(llama, ModelLoadingConfig())


def test_every_reward_model_behind_steps_and_ensembles_is_found():
    parts = [RewardModelScorer("one"), ScaledReward(RewardModelScorer("two"))]
    reward = ScaledReward(EnsembleReward(parts))
    assert [path for part in reward.iter_parts() for path in part.model_paths()] == ["one", "two"]


@pytest.mark.parametrize("role", ["reference policy", "reward model 1"])
def test_resuming_with_another_frozen_model_is_refused(llama, tokenizer, tmp_path, role):
    reference, reward = tmp_path / "reference", tmp_path / "reward"
    shutil.copytree(llama, reference)
    scalar = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    scalar.config.score_shift = 0.0
    scalar.save_pretrained(reward)
    tokenizer.save_pretrained(reward)

    def fit(epochs: int, start: Path | None = None) -> Any:
        settings = PPOConfig(rollout_batch_size=4, micro_batch_size=4, critic_learning_rate=0.1)
        module = PPOModule(
            llama,
            RewardModelScorer(str(reward)),
            SamplingParams(3),
            settings,
            reference=str(reference),
            optimizer=sgd(0.1),
        )
        trainer = quiet_trainer(tmp_path, max_epochs=epochs)
        trainer.fit(module, datamodule=PromptData(), ckpt_path=start)
        return trainer

    fit(1).save_checkpoint(tmp_path / "one.ckpt")
    stored = torch.load(tmp_path / "one.ckpt", weights_only=True)["lit_rlhf"]["fingerprints"]
    assert stored["reference policy"] == model_fingerprint(str(reference), ModelLoadingConfig())
    fit(2, tmp_path / "one.ckpt")
    if role == "reference policy":
        shift_one_weight(reference)
    else:
        shift_one_weight(reward, AutoModelForSequenceClassification)
    folder = reference if role == "reference policy" else reward
    with pytest.raises(UserError, match=f"ckpt_path: the {role} '{folder}' is not the one that this run began with"):
        fit(2, tmp_path / "one.ckpt")
