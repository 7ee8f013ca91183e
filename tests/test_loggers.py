"""Loggers that take numbers alone get all of them and nothing else; ends and definitions of W&B's runs."""

from typing import Any

import lightning as L
import pytest
import wandb
from lightning.pytorch.loggers import Logger

from lit_rlhf.callbacks import LogHistograms, LogSamples, Throughput
from lit_rlhf.generation import SamplingParams
from lit_rlhf.loggers import Histogram, define_metrics, finish_runs, log_histograms, log_image, log_page, log_table
from lit_rlhf.modules import PPOConfig, PPOModule
from tests.callbacks.fake_wandb_logger import FakeWandbLogger
from tests.helpers.ppo_fakes import PromptData, WordShare
from tests.helpers.small_runs import quiet_trainer


class Numbers(Logger):
    """Keeps rows, as a logger for TensorBoard or MLflow would."""

    name, version = "numbers", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append({**metrics, "step": step})

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def fit(llama: str, folder: Any, *loggers: Logger) -> L.Trainer:
    module = PPOModule(
        llama, WordShare(), SamplingParams(4), PPOConfig(rollout_batch_size=8, micro_batch_size=4, ppo_epochs=2)
    )
    callbacks = [Throughput(), LogSamples(1, rows=2), LogHistograms()]
    settings = {"max_epochs": 2, "log_every_n_steps": 1, "callbacks": callbacks, "logger": list(loggers)}
    trainer = quiet_trainer(folder, **settings)
    trainer.fit(module, datamodule=PromptData())
    return trainer


def test_a_logger_of_numbers_gets_every_number_under_the_same_name(llama, tmp_path):
    numbers, wandb_logger = Numbers(), FakeWandbLogger()
    fit(llama, tmp_path, numbers, wandb_logger)
    names = {name for row in numbers.rows for name in row}
    assert {"reward/score", "lr/policy", "grad_norm/critic", "iteration", "episodes", "tokens"} < names
    assert all(isinstance(float(value), float) for row in numbers.rows for value in row.values())
    drawn = {name for row in wandb_logger.rows for name in row} - {"trainer/global_step"}
    assert drawn - names == {"samples", "histogram/scores", "histogram/advantages", "histogram/ratios"}


def test_what_is_logged_is_defined_first_and_once(llama, tmp_path):
    logger = FakeWandbLogger()
    fit(llama, tmp_path, logger)
    defined = logger.experiment.defined
    per_iteration = {name for row in logger.rows if "reward/score" in row for name in row}
    axes = {"iteration", "episodes", "tokens"}
    for name in per_iteration - axes - {"epoch", "trainer/global_step"}:
        assert defined[name]["step_metric"] == "iteration", name
    for name in (*axes, "lr/policy", "lr/critic", "grad_norm/policy", "grad_norm/critic"):
        assert defined[name]["step_metric"] == "trainer/global_step", name
    assert defined["validation/score"]["summary"] == "max,last" and defined["reward/kl"]["summary"] is None


def test_histograms_are_counted_for_loggers_that_draw_them_alone(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_rlhf.callbacks.log_histograms.count_in_bins", lambda _: 1 / 0)
    fit(llama, tmp_path, Numbers())


def test_the_other_loggers_are_passed_over(tmp_path):
    numbers = Numbers()
    (tmp_path / "page.html").write_text("<p>")
    define_metrics([numbers], ["a"])
    log_table([numbers], "t", [{"a": 1}])
    log_histograms([numbers], {"h": Histogram([1.0], [0.0, 1.0])})
    log_image([numbers], "i", None)
    log_page([numbers], "p", tmp_path / "page.html")
    finish_runs([numbers])
    assert numbers.rows == []


@pytest.mark.parametrize("succeeded", [True, False])
def test_a_run_ends_as_the_command_does(succeeded, tmp_path, monkeypatch):
    codes: list[int] = []
    monkeypatch.setattr(wandb, "finish", lambda exit_code: codes.append(exit_code))
    finish_runs([FakeWandbLogger()], succeeded)
    assert codes == [], "no run is open"
    monkeypatch.setattr(wandb, "run", object())
    finish_runs([FakeWandbLogger()], succeeded)
    assert codes == [0 if succeeded else 1]
