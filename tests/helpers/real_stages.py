"""Run the stages of docs/real-data.md: shipped recipes on real files."""

import csv
from contextlib import chdir
from pathlib import Path
from typing import NamedTuple

from lit_rlhf.cli import main

CPU = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
Metrics = list[dict[str, float]]


class Stage(NamedTuple):
    """A finished run: its folder, and the rows of its `metrics.csv`."""

    folder: Path
    metrics: Metrics

    def column(self, name: str) -> list[float]:
        """Return every logged value of a metric, in order."""
        return [row[name] for row in self.metrics if name in row]

    @property
    def model(self) -> str:
        """The folder that the callback ExportModel wrote."""
        return str(self.folder / "model")

    @property
    def checkpoint(self) -> str:
        """The last checkpoint."""
        return str(self.folder / "checkpoints" / "last.ckpt")


def run_stage(project: Path, folder: str, *args: str) -> Stage:
    """Run a command in the project's folder; `folder` is where its recipe logs to."""
    with chdir(project):
        assert main([*args, *CPU]) == 0
    with open(project / folder / "metrics.csv") as file:
        metrics = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return Stage(project / folder, metrics)


def log_to(folder: str) -> list[str]:
    """Return the overrides that make a run write to `folder`."""
    return [f"--run_dir={folder}"]
