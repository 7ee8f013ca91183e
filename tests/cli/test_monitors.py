"""A `monitor` that the run will not log is refused before training."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_rlhf.commands.support.monitors import LOGGED_BY
from tests.helpers.pages import ROOT
from tests.helpers.stages import contents

STOPPING = "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping"


def test_the_metrics_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))
    assert {metric for metrics in LOGGED_BY.values() for metric in metrics} == documented


@pytest.mark.parametrize(
    ("stage", "metric", "hint"),
    [
        ("sft", "validation/los", "(did you mean 'validation/loss'?)"),
        ("sft", "val_loss", ""),
        ("sft", "validation/accuracy", "; RewardModule logs it"),
        ("sft", "validation/pretraining_loss", "; PretrainingValidation logs it"),
        ("reward", "validation/acuracy", "(did you mean 'validation/accuracy'?)"),
        ("reward", "train/losss", "(did you mean 'train/loss'?)"),
    ],
)
@pytest.mark.parametrize("kind", ["EarlyStopping", "ModelCheckpoint"])
def test_a_typo_is_refused_before_anything_is_written(
    kind: str,
    stage: str,
    metric: str,
    hint: str,
    stages: Path,
    command: Callable[..., Any],
) -> None:
    words = [STOPPING] if kind == "EarlyStopping" else []
    before = contents(stages)
    key = "--trainer.callbacks.monitor" if words else "--trainer.callbacks.ModelCheckpoint.monitor"
    code, _, err = command("fit", "-c", f"{stage}.yaml", *words, f"{key}={metric}")
    said = f"error: trainer.callbacks: {kind} monitors {metric!r}, which this run does not log"
    assert code == 2 and said in err and hint in err and contents(stages) == before


@pytest.mark.parametrize(
    ("stage", "metric"),
    [("sft", "validation/loss"), ("sft", "train/loss"), ("reward", "validation/accuracy"), ("sft", "step")],
)
def test_a_metric_that_is_logged_runs(
    stage: str,
    metric: str,
    stages: Path,
    command: Callable[..., Any],
) -> None:
    checkpoint = f"--trainer.callbacks.ModelCheckpoint.monitor={metric}"
    stopping = [] if metric == "step" else [STOPPING, f"--trainer.callbacks.monitor={metric}"]
    code, _, err = command("fit", "-c", f"{stage}.yaml", *stopping, checkpoint)
    assert code == 0, err


def test_a_users_metric_is_found_missing_in_one_line(stages: Path, command: Callable[..., Any]) -> None:
    (stages / "own_callback.py").write_text("import lightning as L\n\n\nclass Mine(L.Callback):\n    pass\n")
    words = ["--trainer.callbacks+=own_callback.Mine", STOPPING, "--trainer.callbacks.monitor=my/metric"]
    code, _, err = command("fit", "-c", "sft.yaml", *words)
    assert code == 2 and "Early stopping conditioned on metric `my/metric`" in err.splitlines()[-1]


@pytest.mark.parametrize("name", ["LearningRateFinder", "BatchSizeFinder"])
def test_tuners_are_refused(name: str, stages: Path, command: Callable[..., Any]) -> None:
    before = contents(stages)
    code, _, err = command("fit", "-c", "sft.yaml", f"--trainer.callbacks+=lightning.pytorch.callbacks.{name}")
    assert code == 2 and "LearningRateFinder and BatchSizeFinder tune an attribute" in err
    assert contents(stages) == before


def test_recipes_monitor_what_is_logged() -> None:
    logged = {metric for metrics in LOGGED_BY.values() for metric in metrics} | {"step", "epoch"}
    for path in (ROOT / "recipes").rglob("*.yaml"):
        for callback in (yaml.safe_load(path.read_text()).get("trainer") or {}).get("callbacks") or []:
            assert (callback.get("init_args") or {}).get("monitor", "step") in logged, path
