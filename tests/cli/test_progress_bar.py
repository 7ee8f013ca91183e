"""What a run prints: kept lines, a bar at a terminal, and a summary with paths that exist."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest

from lit_rlhf.commands.support.console import Verbosity, set_verbosity
from lit_rlhf.commands.support.progress_bar import StageProgressBar, format_metric, group_metrics
from tests.helpers.stages import write_stages
from tests.helpers.terminal import record

BAR = "--trainer.enable_progress_bar=true"
EPOCHS = "--trainer.max_epochs=3"
# stage -> a line that is kept after every epoch
KEPT = {
    "sft": r"epoch 3/3  train: loss \d.*  validation: loss \d\S+  \d+\.\d s",
    "reward": r"epoch 3/3  train: loss \S+  validation: loss \S+, accuracy \S+  \d+\.\d s",
    "ppo": r"iteration 3/3  score \S+  KL \S+  length \S+  entropy \S+  validation: score \S+, kl \S+  \S+ s",
}


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0.000"),
        (0.6123, "0.612"),
        (12.345, "12.3"),
        (-1.234, "-1.23"),
        (1234.5, "1234"),
        (0.0058, "0.006"),
        (2.1e-5, "2e-05"),
    ],
)
def test_metrics_have_three_digits(value: float, text: str) -> None:
    assert format_metric(value) == text


def test_metrics_of_one_prefix_stand_together() -> None:
    metrics = {"reward/score": 0.6, "train/loss": 1.0, "validation/loss": 2.0, "validation/kl": 3.0, "loss": 4.0}
    expected = ["score 0.600", "train: loss 1.00", "validation: loss 2.00, kl 3.00", "loss 4.00"]
    assert group_metrics(metrics) == expected


@pytest.mark.parametrize("stage", KEPT)
def test_a_pipe_gets_plain_lines(stage: str, stages: Path, command: Callable[..., Any]) -> None:
    code, stdout, stderr = command("fit", "-c", f"{stage}.yaml", BAR, EPOCHS)
    assert code == 0, stderr
    assert not set("\r\x1b█▏") & set(stdout + stderr)
    kept = [line for line in stdout.splitlines() if re.match("(epoch|iteration) ", line)]
    assert len(kept) == 3 and re.fullmatch(KEPT[stage], kept[-1]), stdout
    done, *rows = stdout.splitlines()[3:]
    assert re.fullmatch(r"done in \S+ s, step \d+", done)
    summary = dict(line.split(None, 1) for line in rows)
    for title in ("model", "metrics", "config", "checkpoints"):
        assert (stages / summary[title]).exists(), summary
    assert (stages / "runs" / stage / "metrics.csv").samefile(stages / summary["metrics"])
    assert f"--model runs/{stage}/model" in summary["next"]
    assert {"sft": "validation/loss", "reward": "accuracy", "ppo": "score"}[stage] in summary["best"]
    assert ("report" in summary, "samples" in summary) == (stage == "reward", stage != "reward")


def test_a_mid_epoch_validation_is_one_line(stages: Path, command: Callable[..., Any]) -> None:
    code, stdout, _ = command("fit", "-c", "sft.yaml", BAR, "--trainer.val_check_interval=1")
    kept = [line.split("  ")[0] for line in stdout.splitlines() if re.match("(epoch|step) ", line)]
    assert code == 0 and kept == ["step 1/3", "step 2/3", "epoch 1/1"]


def test_the_next_command_is_the_recipe_that_names_the_model(stages: Path, command: Callable[..., Any]) -> None:
    text = (stages / "reward.yaml").read_text()
    (stages / "reward.yaml").write_text(re.sub(r"( model: ).*", r"\1runs/sft/model", text))
    _, stdout, _ = command("fit", "-c", "sft.yaml", BAR)
    assert re.search(r"^  next +lit-rlhf fit -c reward.yaml$", stdout, re.MULTILINE), stdout


@pytest.mark.parametrize("stage, columns", [("sft", 120), ("ppo", 80)])
def test_a_terminal_shows_whole_lines_and_a_bar_for_every_phase(
    stage: str, columns: int, llama: str, tmp_path: Path
) -> None:
    write_stages(tmp_path, llama)
    args = ("fit", "-c", f"{stage}.yaml", BAR, EPOCHS)
    seen = record(*args, columns=columns, folder=tmp_path, environment={"TQDM_MININTERVAL": "0"})
    assert seen.code == 0, seen.text
    assert seen.wrapped == []
    kept = [line for line in seen.lines if re.match("(epoch|iteration) ", line)]
    assert len(kept) == 3 and not [line for line in seen.lines if "█" in line or "|" in line], seen.lines
    bars = [frame for frame in seen.frames if "%" in frame]
    assert bars and max(map(len, bars)) <= columns
    if stage == "ppo":
        assert {"generate", "forward"} <= {frame.split(" |")[0].split()[-1] for frame in bars if " |" in frame}
    assert not re.search("GPU available|Epoch|shards", seen.text)


def test_the_bar_of_a_stage_within_another_command_names_it(tmp_path: Path) -> None:
    trainer = L.Trainer(default_root_dir=tmp_path / "ppo-ptx", logger=False, accelerator="cpu", barebones=False)
    for verbosity, name in ((Verbosity.STAGE, "ppo-ptx training"), (Verbosity.NORMAL, "training")):
        with set_verbosity(verbosity):
            bar = StageProgressBar()
            bar.setup(trainer, L.LightningModule(), "fit")
        bar.enable()
        assert bar.init_train_tqdm().desc == name


def test_other_ranks_print_nothing(llama: str, tmp_path: Path) -> None:
    write_stages(tmp_path, llama)
    ranks = ("--trainer.devices=2", "--trainer.strategy=ddp", "--data.micro_batch_size=2")
    seen = record("fit", "-c", "sft.yaml", BAR, *ranks, columns=80, folder=tmp_path)
    assert seen.code == 0, seen.text
    for once in ("epoch 1/1  ", "done in", "12 rows: ", "demonstrations.jsonl: 12 rows\r", "  model "):
        assert seen.text.count(once) == 1, once
    assert "rank: 1" not in seen.text
