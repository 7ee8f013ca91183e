"""The three stages on real data with the shipped recipes; metrics are asserted with a margin."""

import io
from contextlib import chdir, redirect_stdout
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.cli import main
from tests.helpers.real_stages import Stage, log_to, run_stage

TEXTS = ["### Instruction:\nName a color.\n\n### Response:\n", "Once upon a time", "The dog was happy. It ran home."]


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, in which the recipes write `runs/small`."""
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="session")
def untrained(project: Path, stories: str, real_data: Path) -> Stage:
    data = f"--data.path={real_data}/demonstrations/small_instructions.json"
    start = [f"--model.model={stories}", *log_to("runs/untrained"), "--trainer.max_epochs=1"]
    rate = "--model.optimizer.lr=0"  # the weights stay as they were
    return run_stage(project, "runs/untrained", "fit", "-c", "small/sft", data, rate, *start)


@pytest.fixture(scope="session")
def sft(project: Path, stories: str, real_data: Path) -> Stage:
    data = f"--data.path={real_data}/demonstrations/small_instructions.json"
    # the recipe's rate is for a larger model
    model = [f"--model.model={stories}", "--model.optimizer.lr=3e-3", "--trainer.max_epochs=2"]
    return run_stage(project, "runs/small/sft", "fit", "-c", "small/sft", data, *model)


@pytest.fixture(scope="session")
def reward(project: Path, sft: Stage, real_data: Path) -> Stage:
    data = f"--data.path={real_data}/preferences/polite_rude.json"
    return run_stage(project, "runs/small/reward", "fit", "-c", "small/reward", data)


@pytest.fixture(scope="session")
def kwise(project: Path, sft: Stage, real_data: Path) -> Stage:
    data = f"--data.path={real_data}/preferences/oasst_kwise.jsonl.gz"
    truncate = ["--data.overlong_prompts=truncate", "--data.max_prompt_length=128", "--data.max_completion_length=128"]
    return run_stage(project, "runs/kwise", "fit", "-c", "small/reward", data, *truncate, *log_to("runs/kwise"))


@pytest.fixture(scope="session")
def ppo(project: Path, reward: Stage, real_data: Path) -> Stage:
    data = f"--data.path={real_data}/prompts/prompt_lottery_en_250_text.jsonl"
    template = ["--data.template=instruction"]
    half = ["--model.ppo.rollout_batch_size=64"]  # the recipe's 128 take two minutes
    return run_stage(project, "runs/small/ppo", "fit", "-c", "small/ppo", data, *template, *half)


def compute_logits(folder: str, texts: list[str]) -> Tensor:
    """Return the last logits of each text in plain transformers: next-token logits, or a reward model's score."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scalar = "SequenceClassification" in (Path(folder) / "config.json").read_text()
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            output = model(torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], 1)).logits
        rows.append(output[0] if scalar else output[0, -2])
    return torch.stack(rows)


def checkpoint_weights(checkpoint: str, prefix: str) -> dict[str, Tensor]:
    """Return the weights of the exported model in a Lightning checkpoint."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def export_last_checkpoint(stage: Stage) -> str:
    """Run `lit-rlhf export` on the last checkpoint; return the folder."""
    folder = str(stage.folder / "exported")
    assert main(["export", stage.checkpoint, folder]) == 0
    return folder


def test_sft_lowers_the_validation_loss_by_more_than_a_third(untrained: Stage, sft: Stage) -> None:
    before, after = untrained.column("validation/loss")[0], sft.column("validation/loss")[-1]
    assert 4.0 < before < 6.0
    assert after < 0.6 * before


def test_the_reward_model_distinguishes_polite_from_rude(reward: Stage) -> None:
    """0.80 of 112 unseen pairs, and 0.84 to 0.88 with other initial weights; a standard error is 0.04."""
    assert reward.column("validation/accuracy")[-1] >= 0.75


def test_the_reward_model_learns_from_rankings_of_many_completions(kwise: Stage) -> None:
    """164 rankings of long answers teach 260,032 parameters little: the loss falls, and the ranking is not reversed."""
    start, end = kwise.column("train/loss")[:5], kwise.column("train/loss")[-5:]
    assert fmean(end) < fmean(start)
    assert kwise.column("validation/accuracy")[-1] > 0.4


def test_ppo_raises_the_score(ppo: Stage) -> None:
    """0.46 to 0.56 of the responses' standard deviation, with a standard error of 0.09."""
    scores, deviation = ppo.column("reward/score"), ppo.column("reward/score_std")[0]
    assert fmean(scores[-5:]) > fmean(scores[:3]) + 0.25 * deviation
    assert fmean(ppo.column("reward/kl")[-3:]) < 10


@pytest.mark.parametrize(("stage", "prefix"), [("sft", "model."), ("reward", "model.model."), ("ppo", "policy.")])
def test_an_export_contains_the_weights_of_the_checkpoint(
    stage: str, prefix: str, request: pytest.FixtureRequest
) -> None:
    trained: Stage = request.getfixturevalue(stage)
    folder = export_last_checkpoint(trained)
    weights = checkpoint_weights(trained.checkpoint, prefix)
    auto = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    state = auto.from_pretrained(folder).state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], state[name]) for name in weights)
    for written in (folder, trained.model):  # by the command, and by the callback ExportModel
        out = compute_logits(written, TEXTS)
        assert torch.isfinite(out).all() and out.std() > 0.1


def test_generate_prints_a_response(project: Path, sft: Stage) -> None:
    text = io.StringIO()
    with chdir(project), redirect_stdout(text):
        assert main(["generate", "--model", sft.model, "--prompt", TEXTS[0], "--max-new-tokens", "24"]) == 0
    assert text.getvalue().strip()
    assert "###" not in text.getvalue()
