"""The quickstart end to end with tiny sizes: every stage by its recipe, a complete report, equal reports for a seed."""

import json
from pathlib import Path

import pytest

from lit_rlhf.commands.support import quickstart_pipeline
from lit_rlhf.synthetic import build, evaluate, rankings

SMALL = {
    "PRETRAINING_DOCUMENTS": 600,
    "PRETRAINING_VALIDATION_DOCUMENTS": 60,
    "DEMONSTRATIONS": 128,
    "DEMONSTRATIONS_VALIDATION": 32,
    "REWARD_PROMPTS": 40,
    "PPO_PROMPTS": 300,
    "EVALUATION_PROMPTS": 40,
}
SHORT = {
    "pretraining": ["--trainer.max_steps=6", "--trainer.val_check_interval=6"],
    "sft": ["--trainer.max_epochs=1"],
    "reward": [],
    "ppo": ["--trainer.max_epochs=2", "--model.ppo.rollout_batch_size=64", "--model.ppo.micro_batch_size=32"],
    "ppo-ptx": ["--trainer.max_epochs=2", "--model.ppo.rollout_batch_size=64", "--model.ppo.micro_batch_size=32"],
}


@pytest.fixture
def small(monkeypatch):
    """Data and stages of a few seconds."""
    for name, size in SMALL.items():
        monkeypatch.setattr(build, name, size)
    monkeypatch.setattr(quickstart_pipeline, "NUM_UNSEEN_RANKINGS", 20)
    monkeypatch.setattr(evaluate, "BEST_OF_PROMPTS", 8)
    build_arguments = quickstart_pipeline.build_fit_arguments
    quiet = ["--trainer.enable_progress_bar=false"]
    monkeypatch.setattr(
        quickstart_pipeline,
        "build_fit_arguments",
        lambda recipe, seed: build_arguments(recipe, seed) + SHORT[recipe.stem] + quiet,
    )


def read_report(folder: Path) -> dict:
    """Read the report without times and memory."""
    report = json.loads((folder / "report.json").read_text())
    for key in ("stages", "seconds_total", "peak_memory_gib"):
        del report[key]
    return report


def test_every_stage_runs_and_the_same_seed_gives_the_same_report(small, tmp_path, capfd):
    assert quickstart_pipeline.run(tmp_path / "one", 3) == 0
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    for model in ("base", "few_shot", "sft", "ppo", "ppo_ptx"):
        for decoding in ("models", "greedy"):
            assert 0 <= report[decoding][model]["win_rate_low"] <= report[decoding][model]["win_rate_high"] <= 1
    assert report["models"]["sft"]["win_rate_low"] <= 0.5 <= report["models"]["sft"]["win_rate_high"]
    assert report["greedy"]["sft"]["win_rate"] == 0.5
    assert report["models"]["sft"]["kl_to_sft"] == pytest.approx(0, abs=1e-4)
    assert report["best_of_n"]["score"] == sorted(report["best_of_n"]["score"]) and len(report["best_of_n"]["kl"]) == 16
    for stage in ("pretraining", "sft", "reward", "ppo", "ppo-ptx"):
        assert report["curves"][stage.replace("-", "_")], stage
        assert (tmp_path / "one" / "recipes" / f"{stage}.yaml").is_file()
    assert "runs/quickstart" not in (tmp_path / "one" / "recipes" / "sft.yaml").read_text()
    page = (tmp_path / "one" / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "PPO-ptx" in page
    assert quickstart_pipeline.run(tmp_path / "two", 3) == 0
    assert read_report(tmp_path / "two") == read_report(tmp_path / "one")
    assert rankings.MIN_COMPLETIONS == 4 and rankings.MAX_COMPLETIONS == 9
