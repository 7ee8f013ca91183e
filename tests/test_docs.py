"""docs/: links resolve, code it names exists, metrics are those that are logged, and what it shows runs."""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, commands, named_blocks
from ranks import on_ranks
from transformers import AutoModelForCausalLM

from lit_rlhf.cli import main

EXTENDING = ROOT / "docs" / "extending.md"

# between a recipe and the user's overlay: the tiny model, a few rows, two epochs
SHRINK = """
model: {init_args: {model: MODEL}}
data: {init_args: {path: data.jsonl}}
trainer: {accelerator: cpu, max_epochs: 2, enable_progress_bar: false, log_every_n_steps: 1}
"""
SHRINK_SFT = "data: {init_args: {micro_batch: 4, validation_fraction: 0.0}}\ntrainer: {callbacks: [{class_path: lit_rlhf.callbacks.ExportModel}]}"
SHRINK_PPO = """
model:
  init_args:
    reward: {class_path: lit_rlhf.rewards.PythonReward, init_args: {function: words.count}}
    sampling: {response_length: 6}
    ppo: {rollout_batch: 8, micro_batch: 4}
trainer: {callbacks: [{class_path: lit_rlhf.callbacks.SampleTable, init_args: {every_n_epochs: 1, rows: 16}}]}
"""
DEMONSTRATIONS = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i} w{i % 5}"} for i in range(16)]
TICKETS = [
    {"status": status, "subject": f"w{i}", "body": "w1 w2", "reply": f"w{i} w3"}
    for i, status in enumerate(["solved", "open", "solved", "solved"] * 4)
]

Fit = Callable[..., list[dict[str, str]]]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: str) -> Path:
    """A user's folder with every file that docs/extending.md shows, beside a few rows of data."""
    files = named_blocks(EXTENDING, "python") | named_blocks(EXTENDING, "yaml")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "words.py").write_text("def count(prompts, responses, rows):\n    return [len(r.split()) for r in responses]\n")
    (tmp_path / "shrink.yaml").write_text(SHRINK.replace("MODEL", llama))
    (tmp_path / "shrink-sft.yaml").write_text(SHRINK_SFT)
    (tmp_path / "shrink-ppo.yaml").write_text(SHRINK_PPO)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))
    (tmp_path / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TICKETS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for name in [*files, "words.py"]:
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    return tmp_path


def shrunk(overlay: str) -> list[str]:
    """Return the page's command for an overlay, with the tiny model and data put between recipe and overlay."""
    words = next(line for line in commands(EXTENDING) if f"-c {overlay}" in line).split()[1:]
    recipe = words[words.index("-c") + 1]
    assert words[:2] == ["fit", "-c"] and recipe.startswith("small/")
    return [*words[:3], "-c", "shrink.yaml", "-c", f"shrink-{recipe.removeprefix('small/')}.yaml", *words[3:]]


def logged(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row[name]]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[Any]]:
    """Record what a function of a stranger's class returns, without changing its signature."""

    def watch(owner: Any, name: str) -> list[Any]:
        calls: list[Any] = []
        original = getattr(owner, name)

        @wraps(original)
        def record(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            calls.append(result)
            return result

        monkeypatch.setattr(owner, name, record)
        return calls

    return watch


def test_a_strangers_optimizer_and_scheduler(project: Path, llama: str) -> None:
    assert main([*shrunk("my_optimizer.yaml"), "--model.scheduler.init_args.steps=1", "--trainer.max_steps=2"]) == 0
    before = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    after = AutoModelForCausalLM.from_pretrained(project / "runs/small/sft/model").state_dict()
    moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
    # two sign steps, of 1e-4 and of half of it: they add up, cancel in part, or found no gradient
    allowed = torch.tensor([0.0, 0.5e-4, 1e-4, 1.5e-4])
    assert ((moved[:, None] - allowed).abs().amin(1) < 1e-6).all()
    assert moved.max() > 1.49e-4


def test_a_strangers_kl_controller(project: Path) -> None:
    assert main(shrunk("my_kl.yaml")) == 0
    coefficients = column(logged(project / "runs/small/ppo"), "reward/kl_coefficient")
    assert coefficients == pytest.approx([0.05, 0.05 / 1.1], rel=1e-6)  # the KL of a fresh policy is 0: below the band


def test_a_strangers_generator(project: Path, watched) -> None:
    import my_generator

    assert main(shrunk("my_kl.yaml")) == 0
    built_in = column(logged(project / "runs/small/ppo"), "reward/score")
    shutil.rmtree(project / "runs")
    rollouts = watched(my_generator.PlainGenerator, "generate")
    assert main(shrunk("my_generator.yaml")) == 0
    assert len(rollouts) == 2
    assert column(logged(project / "runs/small/ppo"), "reward/score") == built_in  # same noise, same responses


def test_a_strangers_reward_function_and_source(project: Path) -> None:
    assert main(shrunk("my_rewards.yaml")) == 0
    samples = [json.loads(line) for line in (project / "runs/small/ppo/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16
    for sample in samples:
        words = sample["response"].split()
        variety = len(set(words)) / len(words) if len(words) >= 3 else 0.0
        assert sample["score"] == pytest.approx(-abs(len(words) - 5) / 5 + 0.5 * variety, abs=1e-6)


def test_a_strangers_data_format(project: Path, watched, capsys: pytest.CaptureFixture[str]) -> None:
    import my_format

    command = shrunk("my_format.yaml")
    assert main([*command, "--data.format=auto"]) == 2  # no format has these columns
    rows = watched(my_format, "from_tickets")
    assert main(command) == 0
    assert [row is None for row in rows] == [False, True, False, False] * 4


def test_a_strangers_callback(project: Path) -> None:
    assert main([*shrunk("my_callback.yaml"), "--trainer.callbacks.limit=-1"]) == 0
    assert len(column(logged(project / "runs/small/ppo"), "reward/kl")) == 1  # stopped behind the first of two
    assert (project / "runs/small/ppo/samples.jsonl").is_file()  # and the recipe's callbacks are still there


def test_a_strangers_logger(project: Path) -> None:
    assert main(shrunk("my_logger.yaml")) == 0
    rows = [json.loads(line) for line in (project / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward/score"] for row in rows if "reward/score" in row] == pytest.approx(
        column(logged(project / "runs/mine"), "reward/score")
    )


def test_a_strangers_strategy_on_two_ranks(project: Path) -> None:
    def rank() -> tuple[int, timedelta]:
        import my_strategy

        made = []
        setup = my_strategy.PatientDDP.setup_environment

        def setup_environment(self: Any) -> None:
            made.append(self._timeout)
            setup(self)

        my_strategy.PatientDDP.setup_environment = setup_environment
        return main([*shrunk("my_strategy.yaml"), "--trainer.max_steps=2"]), made[0]

    assert on_ranks(rank, project) == [(0, timedelta(minutes=90))] * 2


def test_all_of_a_strangers_parts_at_once_from_one_file(project: Path, watched) -> None:
    python = named_blocks(EXTENDING, "python")
    parts = ("my_kl", "my_generator", "my_rewards", "my_callback", "my_logger")
    (project / "mine.py").write_text("\n".join(python[f"{name}.py"] for name in (*parts, "my_optimizer")))
    words = []
    for name in (*parts, "my_optimizer"):
        overlay = project / f"{name}.yaml"
        overlay.write_text(overlay.read_text().replace(f"{name}.", "mine."))
        words += ["-c", overlay.name]
    import mine

    rollouts = watched(mine.PlainGenerator, "generate")
    assert main([*shrunk("my_kl.yaml"), *words]) == 0
    assert len(rollouts) == 2
    rows = logged(project / "runs/mine")
    assert column(rows, "reward/kl_coefficient") == pytest.approx([0.05, 0.05 / 1.1], rel=1e-6)
    assert max(column(rows, "reward/score")) <= 0.5
    assert (project / "metrics.jsonl").is_file()


def test_a_class_that_misses_the_protocol_is_told_so(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "wrong.py").write_text("class Kl:\n    def __init__(self):\n        pass\n")
    assert main([*shrunk("my_kl.yaml")[:-2], "--model.kl=wrong.Kl"]) == 2
    assert capsys.readouterr().err == (
        "error: model.kl: 'Kl' is no KLController: it needs its methods, with the same parameters and type hints "
        "[command line]\n"
    )
