"""A user's folder with tiny data, in which the commands of the documentation pages run in seconds."""

import csv
import json
import sys
from pathlib import Path

import pytest

from tests.helpers.pages import ROOT, commands, named_blocks

EXTENDING = ROOT / "docs" / "extending.md"

# between a recipe and the user's overlay: the tiny model, a few rows, two epochs
SHRINK = """
model: {init_args: {model: MODEL}}
data: {init_args: {path: data.jsonl}}
trainer: {accelerator: cpu, max_epochs: 2, enable_progress_bar: false, log_every_n_steps: 1}
"""
SHRINK_SFT = """
data: {init_args: {micro_batch_size: 4, validation_fraction: 0.0}}
trainer: {callbacks: [{class_path: lit_rlhf.callbacks.ExportModel}]}
"""
SHRINK_PPO = """
model:
  init_args:
    reward: {class_path: lit_rlhf.rewards.FunctionReward, init_args: {function: words.count}}
    sampling: {max_new_tokens: 6}
    ppo: {rollout_batch_size: 8, micro_batch_size: 4}
trainer: {callbacks: [{class_path: lit_rlhf.callbacks.LogSamples, init_args: {every_n_epochs: 1, rows: 16}}]}
"""
COUNT_WORDS = "def count(prompts, responses, rows):\n    return [len(r.split()) for r in responses]\n"
DEMONSTRATIONS = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i} w{i % 5}"} for i in range(16)]
TICKETS = [
    {"status": status, "subject": f"w{i}", "body": "w1 w2", "reply": f"w{i} w3"}
    for i, status in enumerate(["solved", "open", "solved", "solved"] * 4)
]


def enter_user_project(folder: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder the working directory, with every named block of docs/extending.md and a few rows of data.

    Its Python files can be imported, anew in every test. Returns the folder.
    """
    python, overlays = named_blocks(EXTENDING, "python"), named_blocks(EXTENDING, "yaml")
    shrink = {
        "shrink.yaml": SHRINK.replace("MODEL", model),
        "shrink-sft.yaml": SHRINK_SFT,
        "shrink-ppo.yaml": SHRINK_PPO,
    }
    for name, text in (python | overlays | shrink | {"words.py": COUNT_WORDS}).items():
        (folder / name).write_text(text)
    for name, rows in (("data.jsonl", DEMONSTRATIONS), ("tickets.jsonl", TICKETS)):
        write_jsonl(folder / name, rows)
    for name in (*python, "words.py"):
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    return folder


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def shrunk_command(overlay: str) -> list[str]:
    """Return the page's `fit` command for an overlay, with the tiny model and data between recipe and overlay."""
    words = next(line for line in commands(EXTENDING) if f"-c {overlay}" in line).split()[1:]
    recipe = words[words.index("-c") + 1]
    assert words[:2] == ["fit", "-c"] and recipe.startswith("small/")
    return [*words[:3], "-c", "shrink.yaml", "-c", f"shrink-{recipe.removeprefix('small/')}.yaml", *words[3:]]


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's `metrics.csv`."""
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    """Return every logged value of a metric, in order."""
    return [float(row[name]) for row in rows if row[name]]
