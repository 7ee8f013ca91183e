"""The quickstart end to end with tiny sizes: every stage by its recipe, a complete report, equal reports for a seed."""

import json
import re
from pathlib import Path

import pytest

from lit_rlhf.commands.recipes import find_recipe
from lit_rlhf.commands.support.quickstart_pipeline import Scale, run
from lit_rlhf.synthetic import rankings
from lit_rlhf.synthetic.build import SyntheticDataSizes

SHORT_PPO = ("--trainer.max_epochs=2", "--model.ppo.rollout_batch_size=64", "--model.ppo.micro_batch_size=32")
SMALL = Scale(
    "small",
    SyntheticDataSizes(
        pretraining_documents=600,
        pretraining_validation_documents=60,
        demonstrations=128,
        demonstrations_validation=32,
        reward_prompts=40,
        ppo_prompts=300,
        evaluation_prompts=40,
    ),
    num_unseen_rankings=20,
    best_of_prompts=8,
    arguments={
        "pretraining": ("--trainer.max_steps=6", "--trainer.val_check_interval=6"),
        "sft": ("--trainer.max_epochs=1",),
        "ppo": SHORT_PPO,
        "ppo-ptx": SHORT_PPO,
    },
)
OVERLAY = str(find_recipe("logger/csv"))
LINES = {
    "data": "600 texts, 128 demonstrations, 300 prompts",
    "pretraining": r"validation/loss \d\.\d{3}",
    "sft": r"validation/loss \d\.\d{3}",
    "ranking": r"40 rankings of \d+ responses",
    "reward": r"validation/accuracy 0\.\d{3}",
    "ppo": r"score -?\d\.\d{3}, KL -?\d\.\d{3}",
    "ppo-ptx": r"score -?\d\.\d{3}, KL -?\d\.\d{3}",
    "evaluation": r"win rate over SFT: PPO 0\.\d{3}, PPO-ptx 0\.\d{3}",
}


def read_report(folder: Path) -> dict:
    """Read the report without times and memory."""
    report = json.loads((folder / "report.json").read_text())
    for key in ("stages", "seconds_total", "peak_memory_gib"):
        del report[key]
    return report


def test_every_stage_runs_and_the_same_seed_gives_the_same_report(tmp_path, capsys):
    assert run(tmp_path / "one", 3, [OVERLAY], SMALL) == 0
    head, *lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert head == f"InstructGPT's procedure in a synthetic world, seed 3, in {tmp_path / 'one'}."
    for line, (stage, headline) in zip(lines, LINES.items(), strict=True):  # one per stage
        assert re.fullmatch(rf"{stage} +\d+\.\d s  {headline}", line), line
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
    assert run(tmp_path / "two", 3, [OVERLAY], SMALL) == 0
    assert read_report(tmp_path / "two") == read_report(tmp_path / "one")
    assert rankings.MIN_COMPLETIONS == 4 and rankings.MAX_COMPLETIONS == 9
