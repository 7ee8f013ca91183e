"""Rewards in PPO: the examples of docs/rewards.md, metrics and states on one rank and two."""

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_rlhf.cli import main
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.rewards import ClippedReward, EnsembleReward, NormalizedReward, Reward
from lit_rlhf.rollout.experience import Episodes
from tests.helpers.pages import DOCS, named_blocks
from tests.helpers.ppo_fakes import PromptData
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import quiet_trainer

PAGE = next(page for page in DOCS if page.name == "rewards.md")


class HighWords(Reward):
    """Scores the number of words above w13, times a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def score(self, episodes: Episodes) -> torch.Tensor:
        return torch.tensor(
            [self.factor * sum(int(w[1:]) > 13 for w in r.split() if w[0] == "w") for r in episodes.responses]
        )


class KeepMetrics(L.Callback):
    """Keeps the metrics of every iteration."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs.append(
            {n: float(v) for n, v in trainer.callback_metrics.items() if not n.startswith(("time/", "update/"))}
        )


def make_module(model: str) -> PPOModule:
    reward = ClippedReward(NormalizedReward(EnsembleReward([HighWords(1.0), HighWords(3.0)])), -1.0, 1.0)
    return PPOModule(
        model, reward, SamplingParams(max_new_tokens=6), PPOConfig(rollout_batch_size=16, micro_batch_size=4)
    )


def run(model: str, folder: Path, **settings: Any) -> list[dict[str, float]]:
    metrics = KeepMetrics()
    trainer = quiet_trainer(folder, max_epochs=2, callbacks=[metrics], **settings)
    trainer.fit(make_module(model), datamodule=PromptData())
    if trainer.is_global_zero:
        trainer.save_checkpoint(folder / "run.ckpt")
    return metrics.epochs


def test_metrics_and_state_are_those_of_all_ranks(llama, tmp_path):
    single = run(llama, tmp_path)
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["reward"]
    assert state["reward"]["moments"][0] == 32
    assert single[0]["reward/ensemble_std"] > 0 and 0 < single[0]["reward/clip_fraction"] < 1
    # a minibatch of 4 on one rank and on two: the same run
    for rank in on_ranks(lambda: run_on_two_ranks(llama, tmp_path), tmp_path):
        for epoch, expected in zip(rank, single):
            assert epoch == pytest.approx(expected, abs=2e-5, rel=1e-4)


def run_on_two_ranks(model: str, folder: Path) -> list[dict[str, float]]:
    metrics = KeepMetrics()
    module = make_module(model)
    module.ppo.micro_batch_size = 2
    trainer = quiet_trainer(folder, max_epochs=2, callbacks=[metrics], devices=2, strategy="ddp")
    trainer.fit(module, datamodule=PromptData())
    return metrics.epochs


def test_the_moments_are_restored_from_a_checkpoint(llama, tmp_path):
    run(llama, tmp_path)
    resumed = make_module(llama)
    trainer = quiet_trainer(tmp_path, max_epochs=3)
    trainer.fit(resumed, datamodule=PromptData(), ckpt_path=str(tmp_path / "run.ckpt"))
    assert resumed.reward.state_dict()["reward"]["moments"][0] == 48


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with the files that the page shows."""
    files = named_blocks(PAGE, "python") | named_blocks(PAGE, "yaml")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": f"w{i}", "target": "w3"}) + "\n" for i in range(9))
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    return tmp_path


@pytest.mark.parametrize("overlay", named_blocks(PAGE, "yaml"))
def test_the_recipes_of_the_page_parse(overlay: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "small/ppo", "-c", overlay, "--print_config"]) == 0, capsys.readouterr().err


def test_the_functions_of_the_page_score_a_run(project: Path, llama: str) -> None:
    settings = ["accelerator=cpu", "max_epochs=1", "enable_progress_bar=false"]
    sizes = ["sampling.max_new_tokens=6", "ppo.rollout_batch_size=8", "ppo.micro_batch_size=4", f"model={llama}"]
    arguments = [f"--trainer.{each}" for each in settings] + [f"--model.{each}" for each in sizes]
    assert main(["fit", "-c", "small/ppo", "-c", "my_scores.yaml", "--data.path=data.jsonl", *arguments]) == 0
    samples = [json.loads(line) for line in (project / "runs/small/ppo/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    for sample in samples:
        words = sample["response"].split()
        expected = -0.1 * len(words) + 2.0 * ("w3" in words) + 0.1 * len(set(words))
        assert sample["score"] == pytest.approx(expected, abs=1e-5)
    header = (project / "runs/small/ppo/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"reward/short", "reward/target", "reward/variety"} <= set(header)
