"""RewardModelReport: the numbers of the full validation set, on one rank or two, as metrics, tables and page."""

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
from tests.callbacks.fake_wandb_logger import FakeWandbLogger
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import quiet_trainer, rankings, write_rows


@pytest.fixture
def data(tmp_path) -> Any:
    paths = [write_rows(tmp_path / f"{name}.jsonl", rankings(19, seed=seed)) for seed, name in enumerate("ab")]
    return lambda micro_batch_size=4: ComparisonDataModule(
        paths[0], validation_path=paths[1], micro_batch_size=micro_batch_size
    )


def test_a_run_logs_tables_and_writes_the_page(llama, data, tmp_path):
    csv_logger, logger = CSVLogger(tmp_path, name="", version=""), FakeWandbLogger()
    quality = RewardModelReport(thanks="w5 w6", refusal="w7")
    module = RewardModule(llama, lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[quality], logger=[csv_logger, logger])
    trainer.fit(module, datamodule=data())
    report = json.loads((tmp_path / "reward_quality.json").read_text())
    assert (report["rankings"], report["step"]) == (19, 8)
    assert [row["step"] for row in report["history"]] == [4, 8]
    metrics = trainer.callback_metrics
    assert report["accuracy"]["value"] == pytest.approx(float(metrics["validation/accuracy"]), abs=1e-6)
    assert report["calibration_error"] == pytest.approx(float(metrics["validation/ece"]), abs=1e-5)
    with open(tmp_path / "metrics.csv") as file:
        last = [row for row in csv.DictReader(file) if row["reward_model/pairwise_nll"]][-1]
    assert float(last["reward_model/pairwise_nll"]) == pytest.approx(report["log_loss"], abs=1e-5)
    for row in report["degenerate"]:
        assert float(last[PROBES[row["kind"]]]) == pytest.approx(row["outscores"], abs=1e-5)
    tables = {name: value for row in logger.rows for name, value in row.items() if name.startswith("reward_model_r")}
    tables.pop("reward_model_report/page")
    kinds = ("by_size", "by_margin", "by_length", "degenerate")
    assert tables.keys() == {f"reward_model_report/{kind}" for kind in kinds}
    by_size = tables["reward_model_report/by_size"]
    assert [dict(zip(by_size.columns, row)) for row in by_size.data] == report["by_size"]
    assert logger.images["reward_model_report/reliability"][0].ndim == 3
    assert sum("reward_model_report/page" in row for row in logger.rows) == 2
    assert "Quality of a reward model" in (tmp_path / "reward_quality.html").read_text()


def validate(llama: str, data: Any, folder: Any, micro_batch_size: int, **settings: Any) -> dict[str, Any]:
    trainer = quiet_trainer(folder, callbacks=[RewardModelReport(probes=8)], **settings)
    trainer.validate(RewardModule(llama), datamodule=data(micro_batch_size), verbose=False)
    return read_report(folder)


def read_report(folder: Any) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "reward_quality.json").read_text())
    return report


def test_the_report_does_not_depend_on_ranks_or_micro_batches(llama, data, tmp_path):
    """19 rankings over two ranks: one of them fills its last batch with a ranking without pairs."""
    expected = validate(llama, data, tmp_path, 19)
    assert expected["rankings"] == 19 and {row["prompts"] for row in expected["degenerate"]} <= set(range(1, 9))

    def on_a_rank() -> None:
        trainer = quiet_trainer(tmp_path, callbacks=[RewardModelReport(probes=8)], devices=2, strategy="ddp")
        trainer.validate(RewardModule(llama), datamodule=data(1), verbose=False)

    halved = validate(llama, data, tmp_path, 2)
    (tmp_path / "reward_quality.json").unlink()
    on_ranks(on_a_rank, tmp_path)  # rank zero writes
    for report in (halved, read_report(tmp_path)):
        for name in ("rankings", "completions", "pairs", "ties"):
            assert report[name] == expected[name]
        for name in ("log_loss", "calibration_error"):
            assert report[name] == pytest.approx(expected[name], abs=1e-4)
        for row, expected_row in zip(report["degenerate"], expected["degenerate"], strict=True):
            assert row["kind"] == expected_row["kind"] and row["gap"] == pytest.approx(expected_row["gap"], abs=1e-4)


def test_a_resumed_run_keeps_its_history():
    quality = RewardModelReport()
    quality.history = [{"step": 4, "accuracy": 0.5}]
    resumed = RewardModelReport()
    resumed.load_state_dict(quality.state_dict())
    assert resumed.history == quality.history
