"""Mean 0 and standard deviation 1 (Ziegler et al.) on given rows or on samples of a policy."""

import csv
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_rlhf.callbacks import CenterScores, ExportModel, StandardizeScores
from lit_rlhf.data import ComparisonDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model
from lit_rlhf.modules import RewardModule
from tests.helpers.small_runs import demonstrations, quiet_trainer, rankings, sgd, write_rows


def fit(llama: str, folder: Any, *callbacks: Any, **settings: Any) -> RewardModule:
    data = ComparisonDataModule(write_rows(folder / "rankings.jsonl", rankings(16)), micro_batch_size=4)
    module = RewardModule(llama, sgd(0.1))
    trainer = quiet_trainer(folder, max_epochs=1, callbacks=[*callbacks, ExportModel()], **settings)
    trainer.fit(module, datamodule=data)
    return module


def compute_scores(model: Any, rows: list[list[int]]) -> list[float]:
    """Return the scores, one row at a time."""
    ids = [torch.tensor([row]) for row in rows]
    return [float(model.eval().score(each, torch.ones_like(each)).detach()) for each in ids]


def assert_standard(model: Any, rows: list[list[int]]) -> None:
    values = compute_scores(model, rows)
    assert fmean(values) == pytest.approx(0, abs=1e-4)
    assert pstdev(values) == pytest.approx(1, abs=1e-4)


def test_on_given_rows(llama, tokenizer, tmp_path):
    rows = demonstrations(30)
    given = StandardizeScores(write_rows(tmp_path / "rows.jsonl", rows))
    logger = CSVLogger(tmp_path, name="", version="")
    module = fit(llama, tmp_path, given, logger=logger)
    ids = [[*tokenizer.encode(row["prompt"]), *tokenizer.encode(row["completion"]), 1] for row in rows]
    assert_standard(module.model, ids)
    exported = load_scalar_model(str(tmp_path / "model"), tokenizer, ModelLoadingConfig())
    assert exported.is_centered and float(exported.scale) != 1
    assert_standard(exported, ids)
    with open(tmp_path / "metrics.csv") as file:
        logged = [row for row in csv.DictReader(file) if row["centering/shift"]]
    for name in ("shift", "scale"):
        assert float(logged[-1][f"centering/{name}"]) == pytest.approx(float(getattr(exported, name)))


def test_on_samples_of_a_policy(llama, tokenizer, tmp_path):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(10)])
    callback = StandardizeScores(prompts, policy=llama, samples=24, max_new_tokens=6)
    module = fit(llama, tmp_path, callback)
    assert_standard(module.model, callback.rows)
    assert len(callback.rows) == 24
    starts = {tuple(tokenizer.encode(f"w{i} w{i + 1}")) for i in range(10)}
    assert {tuple(row[:2]) for row in callback.rows} == starts, "every prompt has a response"
    assert all(3 <= len(row) <= 8 and 1 not in row[:-1] for row in callback.rows), "a response ends at its end token"
    again = StandardizeScores(prompts, policy=llama, samples=24, max_new_tokens=6)
    fit(llama, tmp_path, again)
    assert again.rows == callback.rows


def test_two_centering_callbacks_are_refused(llama, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", demonstrations(4))
    with pytest.raises(UserError, match="one way"):
        fit(llama, tmp_path, CenterScores(path), StandardizeScores(path))


def test_half_precision_does_not_round_the_constants(llama, tokenizer):
    model = load_scalar_model(llama, tokenizer, ModelLoadingConfig())
    model.center(1.23456789, 0.98765432)
    model.to(torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert float(model.shift) == pytest.approx(1.23456789, abs=1e-7)
    assert float(model.scale) == pytest.approx(0.98765432, abs=1e-7)
