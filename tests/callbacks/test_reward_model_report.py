"""RewardModelReport: the numbers of the whole validation set, on one rank or two, in the log, the tables and the page."""

import csv
import json
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_rlhf.callbacks import RewardModelReport
from lit_rlhf.callbacks.reward_model_report import PROBES
from lit_rlhf.data import ComparisonDataModule
from lit_rlhf.modules import RewardModule
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import quiet_trainer, rankings, write_rows


class TableLogger(CSVLogger):
    """A logger that takes tables and images, as WandbLogger does."""

    def __init__(self, folder: Any) -> None:
        super().__init__(folder, name="", version="")
        self.tables: dict[str, Any] = {}
        self.images: dict[str, Any] = {}

    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        self.tables[key] = (columns, data)

    def log_image(self, key: str, images: list[Any]) -> None:
        self.images[key] = images


@pytest.fixture
def data(tmp_path) -> Any:
    paths = [write_rows(tmp_path / f"{name}.jsonl", rankings(19, seed=seed)) for seed, name in enumerate("ab")]
    return lambda micro_batch_size=4: ComparisonDataModule(
        paths[0], validation_path=paths[1], micro_batch_size=micro_batch_size
    )


def test_a_run_logs_tables_and_writes_the_page(llama, data, tmp_path):
    logger = TableLogger(tmp_path)
    quality = RewardModelReport(thanks="w5 w6", refusal="w7")
    module = RewardModule(llama, lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[quality], logger=logger)
    trainer.fit(module, datamodule=data())
    report = json.loads((tmp_path / "reward_quality.json").read_text())
    assert (report["rankings"], report["step"]) == (19, 8)
    assert [row["step"] for row in report["history"]] == [4, 8]
    figures = trainer.callback_metrics
    assert report["accuracy"]["value"] == pytest.approx(float(figures["validation/accuracy"]), abs=1e-6)
    assert report["calibration_error"] == pytest.approx(float(figures["validation/ece"]), abs=1e-5)
    with open(tmp_path / "metrics.csv") as file:
        last = [row for row in csv.DictReader(file) if row["reward_model/pairwise_nll"]][-1]
    assert float(last["reward_model/pairwise_nll"]) == pytest.approx(report["log_loss"], abs=1e-5)
    for row in report["degenerate"]:
        assert float(last[PROBES[row["kind"]]]) == pytest.approx(row["outscores"], abs=1e-5)
    assert {name.split(".")[1] for name in logger.tables} == {"by_size", "by_margin", "by_length", "degenerate"}
    columns, rows = logger.tables["reward_quality.by_size"]
    assert [dict(zip(columns, row)) for row in rows] == report["by_size"]
    assert logger.images["reward_quality.reliability"][0].ndim == 3
    assert "Quality of a reward model" in (tmp_path / "reward_quality.html").read_text()


def validated(llama: str, data: Any, folder: Any, micro_batch_size: int, **settings: Any) -> dict[str, Any]:
    trainer = quiet_trainer(folder, callbacks=[RewardModelReport(probes=8)], **settings)
    trainer.validate(RewardModule(llama), datamodule=data(micro_batch_size), verbose=False)
    return written(folder)


def written(folder: Any) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "reward_quality.json").read_text())
    return report


def test_the_figures_do_not_depend_on_ranks_or_micro_batches(llama, data, tmp_path):
    """19 rankings over two ranks: one of them fills its last batch with a ranking that does not count."""
    whole = validated(llama, data, tmp_path, 19)
    assert whole["rankings"] == 19 and {row["prompts"] for row in whole["degenerate"]} <= set(range(1, 9))

    def on_a_rank() -> None:
        trainer = quiet_trainer(tmp_path, callbacks=[RewardModelReport(probes=8)], devices=2, strategy="ddp")
        trainer.validate(RewardModule(llama), datamodule=data(1), verbose=False)

    halves = validated(llama, data, tmp_path, 2)
    (tmp_path / "reward_quality.json").unlink()
    on_ranks(on_a_rank, tmp_path)  # rank zero writes
    for report in (halves, written(tmp_path)):
        for name in ("rankings", "completions", "pairs", "ties"):
            assert report[name] == whole[name]
        for name in ("log_loss", "calibration_error"):
            assert report[name] == pytest.approx(whole[name], abs=1e-4)
        for mine, theirs in zip(report["degenerate"], whole["degenerate"], strict=True):
            assert mine["kind"] == theirs["kind"] and mine["gap"] == pytest.approx(theirs["gap"], abs=1e-4)


def test_a_resumed_run_keeps_its_course():
    quality = RewardModelReport()
    quality.history = [{"step": 4, "accuracy": 0.5}]
    again = RewardModelReport()
    again.load_state_dict(quality.state_dict())
    assert again.history == quality.history
