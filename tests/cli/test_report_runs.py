"""Results of evaluations, sweeps, labelers and the quickstart in W&B's files, where they are asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_rlhf.cli import main
from lit_rlhf.commands.support.quickstart_pipeline import log_quickstart
from lit_rlhf.commands.support.report_runs import read_loggers
from lit_rlhf.commands.support.sweep_recipes import name_wandb_runs
from lit_rlhf.commands.sweep import log_sweep
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.reports.sweeps import RunResult, Sweep
from tests.helpers.small_runs import write_rows
from tests.helpers.wandb_files import WandbFiles

CSV = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "."}}
WANDB = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "mine"}}


def table(files: WandbFiles, name: str) -> list[dict[str, Any]]:
    (row,) = (row for row in files.rows if name in row)
    return files.table(row[name])


def page(files: WandbFiles, name: str) -> str:
    (row,) = (row for row in files.rows if name in row)
    return (files.folder / "files" / row[name]["path"]).read_text()


@pytest.fixture
def evaluation(tmp_path: Path, llama: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with recipe.yaml of an evaluation."""
    monkeypatch.chdir(tmp_path)
    rows = [{"sent_more": f"w{n} w1", "sent_less": f"w{n} w2"} for n in range(3)]
    suite = {
        "class_path": "lit_rlhf.evaluation.CrowSPairs",
        "init_args": {"path": write_rows(tmp_path / "p.jsonl", rows)},
    }
    recipe = {"models": {"m": {"path": llama}}, "baseline": "m", "suites": {"bias": suite}, "out": "runs/one/evaluate"}
    (tmp_path / "recipe.yaml").write_text("# Bias of a model.\n" + yaml.safe_dump(recipe))
    return tmp_path


@pytest.mark.usefixtures("wandb_offline")
def test_an_evaluation_takes_the_overlay_of_a_logger(evaluation: Path) -> None:
    assert main(["evaluate", "-c", "recipe.yaml", "-c", "logger/wandb-offline", "--progress=false"]) == 0
    out = evaluation / "runs/one/evaluate"
    files, report = WandbFiles(out), json.loads((out / "report.json").read_text())
    run = files.run
    assert (run.run_group, run.job_type, run.display_name, run.notes) == (
        "one",
        "evaluate",
        "one-evaluate",
        "Bias of a model.",
    )
    assert set(run.tags) == {"m", "logger/wandb-offline"}
    assert files.config["baseline"] == "m" and files.config["models"]["m"]["fingerprint"]
    assert files.config["suites"]["bias"]["class_path"] == "lit_rlhf.evaluation.CrowSPairs"
    metrics = report["suites"]["bias"]["metrics"]
    value = metrics["basic"]["models"]["m"]["value"]
    assert any(row.get("bias/m/basic") == value for row in files.rows)
    assert {row["metric"] for row in table(files, "bias/metrics")} == metrics.keys()
    assert len(table(files, "bias/samples")) == len(report["suites"]["bias"]["samples"])
    assert page(files, "report") == (out / "report.html").read_text()
    assert "bias/m/basic" in (out / "metrics.csv").read_text()
    assert not (evaluation / "wandb").exists()


def test_an_evaluation_can_log_nowhere(evaluation: Path) -> None:
    (evaluation / "logger.yaml").write_text(yaml.safe_dump({"logger": [CSV, WANDB]}))
    assert main(["evaluate", "-c", "recipe.yaml", "-c", "logger.yaml", "-c", "logger/off", "--progress=false"]) == 0
    written = {path.name for path in (evaluation / "runs/one/evaluate").iterdir()}
    assert "report.html" in written and not written & {"wandb", "metrics.csv"}


@pytest.mark.usefixtures("wandb_offline")
def test_a_sweep_logs_its_table_and_page(tmp_path: Path) -> None:
    runs = [
        RunResult({"model.kl": 1}, 0, 2.0, {"reward/score": 0.5}),
        RunResult({"model.kl": "auto"}, 0, 1.0, {}, "broken"),
    ]
    sweep = Sweep("t", {"model.kl": [1, "auto"]}, runs, ["reward/score"], note="lit-rlhf sweep")
    out = tmp_path / "kl"
    out.mkdir()
    (out / "sweep.html").write_text("<p>page</p>")
    log_sweep(sweep, [CSV, WANDB], out)
    files = WandbFiles(out)
    assert (files.run.project, files.run.run_group, files.run.job_type) == ("mine", "kl", "sweep")
    assert files.config["over"] == {"model.kl": [1, "auto"]}
    first, second = table(files, "sweep/runs")
    assert first == {"model.kl": 1, "seed": 0, "seconds": 2.0, "error": "", "reward/score": 0.5}
    assert second["error"] == "broken" and second["reward/score"] is None
    assert page(files, "sweep/page") == "<p>page</p>"
    assert not (out / "metrics.csv").exists()


def test_the_runs_of_a_sweep_have_its_group_and_their_name() -> None:
    mine = {"class_path": "x.WandbLogger", "init_args": {"name": "mine"}, "dict_kwargs": {"group": "ours"}}
    config = {"trainer": {"logger": [CSV, WANDB, mine]}}
    first, second, third = name_wandb_runs(config, "kl", "kl=1,seed=0")["trainer"]["logger"]
    assert first == CSV and third == mine
    assert second["init_args"]["name"] == "kl=1,seed=0" and second["dict_kwargs"] == {"group": "kl"}


@pytest.mark.usefixtures("wandb_offline")
def test_agreement_of_labelers_is_logged_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("krippendorff")
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"p{n}", "completions": ["x", "y"], "ranks": [0, 1], "labeler": name}
        for n in range(2)
        for name in ("ann", "bob")
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert main(["labelers", "agreement", path]) == 0
    assert not (tmp_path / "wandb").exists()
    assert main(["labelers", "agreement", path, "-c", "logger/wandb"]) == 0
    found = table(WandbFiles(tmp_path), "labelers/agreement")
    assert [row["labeler"] for row in found] == ["ann", "bob", "all pairs"]
    assert found[-1]["share"] == 1.0 and found[-1]["comparisons"] == 2


@pytest.mark.usefixtures("wandb_offline")
def test_the_quickstart_logs_its_comparison(tmp_path: Path) -> None:
    models = {"sft": {"win_rate": 0.5, "kl_to_sft": 0.0}, "ppo": {"win_rate": 0.6}}
    (tmp_path / "report.html").write_text("<p>report</p>")
    log_quickstart({"models": models, "seed": 3, "versions": {"python": "3"}}, tmp_path, [WANDB])
    files = WandbFiles(tmp_path / "evaluation")
    assert (files.run.run_group, files.run.job_type) == (tmp_path.name, "evaluation")
    assert files.config["seed"] == 3
    assert table(files, "quickstart/models") == [
        {"model": "sft", "win_rate": 0.5, "kl_to_sft": 0.0},
        {"model": "ppo", "win_rate": 0.6, "kl_to_sft": None},
    ]
    assert page(files, "quickstart/report") == "<p>report</p>"


def test_the_last_recipe_with_a_logger_decides(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text("trainer: {max_epochs: 1}\n")
    assert read_loggers(["quickstart/ppo", "logger/off", str(tmp_path / "plain.yaml")]) is False
    assert len(read_loggers(["quickstart/ppo", "precision/bf16-true"])) == 2
    assert read_loggers([]) is None
    with pytest.raises(UserError, match="logger/of"):
        read_loggers(["logger/of"])
