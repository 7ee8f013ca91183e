"""GenerateOnValidation: the score equals that of responses sampled one by one; a checkpoint is selected by it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf.callbacks import GenerateOnValidation
from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.errors import UserError
from lit_rlhf.generation import HuggingFaceGenerator
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.modules import SFTModule
from lit_rlhf.rewards import LoRARewardModel, Reward, ScaledReward
from lit_rlhf.rollout.experience import Episodes
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import demonstrations, quiet_trainer, sgd, write_rows

LENGTH = 6


class CountW3(Reward):
    """Scores the number of words, plus the fraction of w3."""

    def score(self, episodes: Episodes) -> torch.Tensor:
        return torch.tensor([float(r.split().count("w3")) / LENGTH + len(r.split()) for r in episodes.responses])


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """16 demonstrations."""
    return write_rows(tmp_path / "rows.jsonl", demonstrations(16))


def validate(model: str, rows: str, folder: Path, batch_size: int, **settings: Any) -> float:
    callback = GenerateOnValidation(rows, CountW3(), SamplingParams(LENGTH), limit=11, batch_size=batch_size)
    trainer = quiet_trainer(folder, callbacks=[callback], **settings)
    data = DemonstrationDataModule(rows, validation_path=rows, micro_batch_size=4)
    return trainer.validate(SFTModule(model), datamodule=data, verbose=False)[0]["validation/reward_score"]


def test_the_score_is_that_of_responses_sampled_one_by_one_for_any_batch_size_and_ranks(
    llama, tokenizer, rows, tmp_path
):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    scores = []
    noise = sampling_uniforms(11, LENGTH, 0, 3)
    for index, row in enumerate(demonstrations(16)[:11]):
        ids = torch.tensor([tokenizer.encode(row["prompt"])])
        prompts = PromptBatch(ids, torch.ones_like(ids), [row], torch.tensor([index]))
        rollout = HuggingFaceGenerator().generate(model, prompts, SamplingParams(LENGTH), noise[index : index + 1])
        words = tokenizer.decode(rollout.response_ids[0], skip_special_tokens=True).split()
        scores.append(words.count("w3") / LENGTH + len(words))
    expected = sum(scores) / len(scores)
    assert len(set(scores)) > 3
    for batch_size in (1, 4, 100):
        assert validate(llama, rows, tmp_path, batch_size) == pytest.approx(expected, rel=1e-6)
    both = on_ranks(lambda: validate(llama, rows, tmp_path, 4, devices=2, strategy="ddp"), tmp_path)
    assert both == pytest.approx([expected] * 2, rel=1e-6)


class Decreasing(Reward):
    """Scores that decrease from one validation to the next, whatever the response."""

    calls = 0

    def score(self, episodes: Episodes) -> torch.Tensor:
        self.calls += 1
        return torch.full((len(episodes.responses),), -float(self.calls))


def test_a_checkpoint_is_selected_by_it_and_samples_are_written(llama, rows, tmp_path):
    callback = GenerateOnValidation(rows, Decreasing(), SamplingParams(LENGTH), limit=4, rows=3)
    best = ModelCheckpoint(tmp_path / "best", monitor="validation/reward_score", mode="max", filename="{step}")
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[callback, best], enable_checkpointing=True)
    trainer.fit(
        SFTModule(llama, sgd(0.1)), datamodule=DemonstrationDataModule(rows, validation_path=rows, micro_batch_size=8)
    )
    assert Path(best.best_model_path).name == "step=2.ckpt"  # of steps 2, 4 and 6
    assert float(best.best_model_score) == -1.0
    written = [json.loads(line) for line in (tmp_path / "validation_samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written] == [2] * 3 + [4] * 3 + [6] * 3
    assert written[0].keys() == {"step", "prompt", "reference", "response", "score"}
    assert [row["reference"] for row in written[:3]] == [row["completion"] for row in demonstrations(3)]


def test_without_a_reward_there_are_samples_and_no_metric(llama, rows, tmp_path):
    callback = GenerateOnValidation(rows, sampling=SamplingParams(LENGTH), rows=2)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[callback])
    trainer.fit(
        SFTModule(llama, sgd(0.1)), datamodule=DemonstrationDataModule(rows, validation_path=rows, micro_batch_size=8)
    )
    assert "validation/reward_score" not in trainer.callback_metrics
    written = [json.loads(line) for line in (tmp_path / "validation_samples.jsonl").read_text().splitlines()]
    assert [row.keys() for row in written] == [{"step", "prompt", "reference", "response"}] * 2


def test_without_a_path_the_prompts_are_those_of_the_validation_rows(llama, rows, tmp_path):
    callback = GenerateOnValidation(sampling=SamplingParams(LENGTH), rows=16)
    data = DemonstrationDataModule(rows, validation_fraction=0.4, micro_batch_size=4)
    quiet_trainer(tmp_path, callbacks=[callback]).validate(SFTModule(llama), datamodule=data, verbose=False)
    lines = [json.loads(line) for line in (tmp_path / "validation_samples.jsonl").read_text().splitlines()]
    written = [line["prompt"] for line in lines]
    references = {row["prompt"]: row["completion"] for row in demonstrations(16)}
    assert all(line["reference"].strip() == references[line["prompt"]] for line in lines)
    assert 0 < len(written) == len(set(written)) < 16
    held_out = [" ".join(data.tokenizer.decode(row.input_ids).split()) for row in data.validation_rows]
    for prompt in written:
        assert prompt in {row["prompt"] for row in demonstrations(16)}
        assert any(row.startswith(prompt) for row in held_out)
    data = DemonstrationDataModule(rows, micro_batch_size=4)
    with pytest.raises(UserError, match=r"no validation demonstrations .* set its path, or data\.validation_path"):
        quiet_trainer(tmp_path, callbacks=[GenerateOnValidation()]).fit(SFTModule(llama), datamodule=data)


def test_responses_that_do_not_fit_are_refused_before_a_model_is_loaded(llama, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_rlhf.modules.sft.load_causal_lm", lambda *_: pytest.fail("the model was loaded"))
    callback = GenerateOnValidation(rows, sampling=SamplingParams(125), rows=16)
    data = DemonstrationDataModule(rows, validation_path=rows, micro_batch_size=8)
    with pytest.raises(UserError, match=r"GenerateOnValidation: the longest prompt .* 131 tokens"):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[callback]).fit(SFTModule(llama), datamodule=data)
    with pytest.raises(UserError, match="limit must be at least 1"):
        GenerateOnValidation(rows, limit=0)


def test_a_reward_that_needs_the_policy_of_ppo_is_refused(tmp_path):
    reward = LoRARewardModel(tmp_path / "reward.ckpt")
    for given in (reward, ScaledReward(reward, 2.0)):
        with pytest.raises(UserError, match="LoRARewardModel attaches its adapter to PPO's policy"):
            GenerateOnValidation(reward=given)
