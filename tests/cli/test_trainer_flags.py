"""The table of Trainer flags in docs/recipes.md: every flag of this Lightning, and what it says of each holds."""

import csv
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest

from tests.helpers.pages import ROOT
from tests.helpers.stages import contents

ROW = re.compile(r"^\| `(\w+)` \| `([^`]+)` \| (.+) \|$", re.MULTILINE)
SECTION = (ROOT / "docs" / "recipes.md").read_text().split("## Trainer flags")[1].split("## ")[0]
FLAGS = {name: (value, outcome) for name, value, outcome in ROW.findall(SECTION)}


def test_the_table_has_every_flag_of_the_trainer() -> None:
    assert list(FLAGS) == list(inspect.signature(L.Trainer.__init__).parameters)[1:]


def read_losses(folder: Path) -> list[str]:
    """Return the training losses of a run."""
    with open(folder / "metrics.csv") as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize("name", FLAGS)
def test_the_flag_does_what_the_table_says(name: str, stages: Path, command: Callable[..., Any]) -> None:
    value, outcome = FLAGS[name]
    before = contents(stages)
    words = ["--trainer.callbacks=[]"] if name == "enable_checkpointing" else []
    code, _, err = command("fit", "-c", "sft.yaml", *words, f"--trainer.{name}={value}")
    if outcome.startswith("refused: "):
        line = err.splitlines()[-1]
        assert code == 2 and line.startswith("error: trainer") and outcome.removeprefix("refused: ") in line
        assert contents(stages) == before
        return
    assert code == 0, err
    if outcome.startswith("no effect"):
        assert command("fit", "-c", "sft.yaml", "--run_dir=plain")[0] == 0
        assert read_losses(stages / "runs/sft") == read_losses(stages / "plain")
    else:
        assert outcome.startswith("works")
