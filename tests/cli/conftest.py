"""A user's project: modules in a file of the working directory, named from YAML alone."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_rlhf.cli import main
from tests.helpers.stages import write_stages

TOYS = """
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch.utils.data import DataLoader, TensorDataset

from lit_rlhf.errors import UserError
from lit_rlhf.rewards import Reward


@dataclass
class Clipping:
    low: float = 0.2
    high: float = 0.2


class Controller:
    def __init__(self, target: float = 6.0):
        if target < 0:
            raise UserError(f"target must be 0 or more, got {target}")
        self.target = target


class ToyModule(L.LightningModule):
    def __init__(
        self,
        hidden: int = 4,
        kind: Literal["linear", "cubic"] = "linear",
        clipping: Clipping = Clipping(),
        controller: Controller | None = None,
        optimizer: OptimizerCallable = torch.optim.SGD,
        fault: str = "",
    ):
        super().__init__()
        self.save_hyperparameters(ignore=["controller", "clipping"])
        self.net = torch.nn.Linear(4, hidden)
        self.optimizer = optimizer
        self.fault = fault

    def configure_optimizers(self):
        return self.optimizer(self.parameters())

    def training_step(self, batch, batch_idx):
        if self.fault == "user":
            raise UserError("prompts.jsonl, line 3: not JSON;\\n fix the row")
        if self.fault == "ours":
            raise RuntimeError("a bug")
        if self.fault == "interrupt" and batch_idx == 2:
            raise KeyboardInterrupt
        if self.fault == "nan":
            return self.net(batch[0]).mean() * float("nan")
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("validation/loss", self.net(batch[0]).square().mean())

    test_step = validation_step


class OtherModule(ToyModule):
    pass


class ToyData(L.LightningDataModule):
    def __init__(self, rows: int = 8, path: str = "here"):
        super().__init__()
        self.rows = rows

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(self.rows, 4)), batch_size=2)

    val_dataloader = test_dataloader = train_dataloader


class NeedsPath(ToyData):
    def __init__(self, path: str):
        super().__init__()


class NoScore(Reward):
    pass


class CountSteps(L.Callback):
    def __init__(self, path: str):
        self.path = path

    def on_train_batch_end(self, *args):
        with open(self.path, "a") as lines:
            lines.write("step\\n")
"""

RECIPE = """# A toy.
trainer:
  accelerator: cpu
  max_steps: 4
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
model:
  class_path: toys.ToyModule
  init_args:
    hidden: 3
data:
  class_path: toys.ToyData
"""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user, with toys.py and recipe.yaml."""
    (tmp_path / "toys.py").write_text(TOYS)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "toys", raising=False)
    return tmp_path


@pytest.fixture
def stages(tmp_path: Path, llama: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user, with sft.yaml, reward.yaml and ppo.yaml."""
    write_stages(tmp_path, llama)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(args))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
