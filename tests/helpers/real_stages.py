"""The stages of docs/real-data.md: shipped recipes on real files, each run once for all tests."""

import csv
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import NamedTuple

from lit_rlhf.cli import main

CPU = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
Metrics = list[dict[str, float]]


class Stage(NamedTuple):
    """A finished run: its folder under the project, and what it logged."""

    folder: Path
    metrics: Metrics

    def column(self, name: str) -> list[float]:
        """Every logged value of a metric, in order."""
        return [row[name] for row in self.metrics if name in row]

    @property
    def model(self) -> str:
        """What the callback ExportModel wrote."""
        return str(self.folder / "model")

    @property
    def checkpoint(self) -> str:
        """What the callback ModelCheckpoint wrote last."""
        return str(self.folder / "checkpoints" / "last.ckpt")


def run(project: Path, folder: str, *args: str) -> Stage:
    """Run the command in the project's folder, as its user would; `folder` is where its recipe logs to."""
    with chdir(project):
        assert main([*args, *CPU]) == 0
    with open(project / folder / "metrics.csv") as file:
        metrics = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return Stage(project / folder, metrics)


def elsewhere(folder: str) -> list[str]:
    """Overrides that send a run to a folder of its own."""
    return [f"--trainer.default_root_dir={folder}", f"--trainer.logger.init_args.save_dir={folder}"]


RunStage = Callable[..., Stage]
