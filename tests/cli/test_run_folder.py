"""One setting, `run_dir`, is the folder of everything that a run writes; no run destroys another."""

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_rlhf.checkpoints import read_metadata
from lit_rlhf.cli import main
from lit_rlhf.commands.support.locks import locked_folder
from lit_rlhf.commands.support.log_filters import restored_log_filters
from lit_rlhf.commands.support.run_folder import RUN_FILES
from lit_rlhf.errors import UserError
from lit_rlhf.paths import written_whole
from tests.helpers.small_runs import write_rows
from tests.helpers.stages import STAGES, contents, write_stages


@pytest.mark.parametrize("stage", STAGES)
def test_all_that_a_run_writes_is_in_its_folder(stage: str, stages: Path, command: Callable[..., Any]) -> None:
    before = contents(stages)
    assert command("fit", "-c", f"{stage}.yaml", "--run_dir=elsewhere/run")[0] == 0
    written = contents(stages).keys() - before.keys()
    assert written and all(name.startswith("elsewhere/run/") for name in written), written
    names = {Path(name).parts[2] for name in written}
    assert {"metrics.csv", "config.yaml", "checkpoints", "model"} <= names <= set(RUN_FILES)


LOGGERS = {
    "none": "false",
    "csv": "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: .}}",
    "csv elsewhere": "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs}}",
    "wandb": "{class_path: lightning.pytorch.loggers.WandbLogger, init_args: {offline: true}}",
    "both": "[{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs}},"
    " {class_path: lightning.pytorch.loggers.WandbLogger, init_args: {offline: true, save_dir: w}}]",
}


@pytest.mark.parametrize("kind", LOGGERS)
def test_every_logger_follows_the_folder(
    kind: str, stages: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    before = contents(stages)
    code, _, err = command("fit", "-c", "sft.yaml", "--run_dir=one", f"--trainer.logger={LOGGERS[kind]}")
    assert code == 0
    written = {Path(name).parts for name in contents(stages).keys() - before.keys()}
    assert {parts[0] for parts in written} == {"one"}
    names = {parts[1] for parts in written}
    assert {"config.yaml", "checkpoints", "model"} <= names
    assert ("metrics.csv" in names) == (kind in ("csv", "csv elsewhere", "both"))
    assert ("trainer.logger.save_dir: logs is not used" in err) == (kind in ("csv elsewhere", "both"))
    if kind in ("wandb", "both"):
        import wandb

        wandb.finish()
        assert "wandb" in names


# every one fails only after the recipe is parsed: while data, model, callbacks or the training loader are set up
FAILING = {
    "missing data": ("sft", ["--data.path=nowhere.jsonl"]),
    "missing validation data": ("sft", ["--data.validation_path=nowhere.jsonl"]),
    "missing model": ("sft", ["--model.model=nowhere"]),
    "fewer rows than a minibatch": ("sft", ["--data.micro_batch_size=50"]),
    "missing prompts of a callback": ("sft", ["--trainer.callbacks.GenerateOnValidation.path=nowhere.jsonl"]),
    "missing text of the mix": (
        "ppo",
        ["--trainer.callbacks+=lit_rlhf.callbacks.PretrainingMix", "--trainer.callbacks.path=nowhere.jsonl"],
    ),
    "sizes that do not divide": ("ppo", ["--model.ppo.rollout_batch_size=10"]),
    "an epoch that ends within a minibatch": (
        "sft",
        ["--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=1", "--data.micro_batch_size=2"],
    ),
    "a monitor without validation": (
        "sft",
        ["--trainer.callbacks.ModelCheckpoint.monitor=validation/loss", "--data.validation_path=null"],
    ),
}


@pytest.fixture(scope="module")
def trained_runs(tmp_path_factory: pytest.TempPathFactory, llama: str) -> dict[str, Path]:
    """The folder `runs` after SFT and after PPO."""
    folders = {}
    for stage in ("sft", "ppo"):
        folder = tmp_path_factory.mktemp(stage)
        write_stages(folder, llama)
        with contextlib.chdir(folder), restored_log_filters():
            assert main(["fit", "-c", f"{stage}.yaml"]) == 0
        folders[stage] = folder / "runs"
    return folders


@pytest.mark.parametrize("kind", FAILING)
def test_a_start_that_fails_destroys_and_writes_nothing(
    kind: str, stages: Path, trained_runs: dict[str, Path], command: Callable[..., Any]
) -> None:
    stage, words = FAILING[kind]
    before = contents(stages)
    code, _, err = command("fit", "-c", f"{stage}.yaml", *words)
    assert code == 2 and err.splitlines()[-1].startswith("error: ")
    assert contents(stages) == before
    shutil.copytree(trained_runs[stage], stages / "runs", dirs_exist_ok=True)
    trained = contents(stages)
    for more in ((), ("--overwrite",), ("--ckpt_path=last", "--trainer.max_epochs=2")):
        assert command("fit", "-c", f"{stage}.yaml", *words, *more)[0] == 2, more
        assert contents(stages) == trained, more


@pytest.mark.parametrize("name", ["metrics.csv", "config.yaml", "checkpoints/a.ckpt", "model/config.json"])
def test_a_folder_that_holds_a_run_is_refused(name: str, stages: Path, command: Callable[..., Any]) -> None:
    held = stages / "runs" / "sft" / name
    held.parent.mkdir(parents=True)
    held.write_text("mine")
    code, _, err = command("fit", "-c", "sft.yaml")
    assert code == 2 and f"run_dir: runs/sft holds a run already ({Path(name).parts[0]})" in err
    assert all(hint in err for hint in ("--overwrite", "--run_dir", "--ckpt_path=last"))
    assert held.read_text() == "mine"


FAULTS = """
import lightning.pytorch as L
import torch

from lit_rlhf.errors import UserError

FAULTS = {"user": UserError("wrong"), "bug": torch.OutOfMemoryError("full")}


class FailOnce(L.Callback):
    def __init__(self, fault: str):
        self.fault = fault

    def on_before_backward(self, *args):
        if self.fault != "none":
            raise FAULTS[self.fault]
"""


@pytest.mark.parametrize("fault", ["user", "bug"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_fails_in_its_first_batch_does_not_block_a_second_try(
    stage: str, fault: str, stages: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (stages / "faults.py").write_text(FAULTS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "faults", raising=False)
    words = ("fit", "-c", f"{stage}.yaml", "--trainer.callbacks+=faults.FailOnce")
    before = contents(stages)
    with contextlib.suppress(RuntimeError):
        assert command(*words, f"--trainer.callbacks.fault={fault}")[0] == 2
    assert contents(stages) == before
    code, _, err = command(*words, "--trainer.callbacks.fault=none")
    assert code == 0, err
    assert yaml.safe_load((stages / "runs" / stage / "config.yaml").read_text())["trainer"]["max_epochs"] == 1


def test_other_files_do_not_make_a_run(stages: Path, command: Callable[..., Any]) -> None:
    folder = stages / "runs" / "sft"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert command("fit", "-c", "sft.yaml")[0] == 0
    assert (folder / "notes.txt").read_text() == "mine"


def test_overwrite_replaces_the_run_and_nothing_else(stages: Path, command: Callable[..., Any]) -> None:
    folder = stages / "runs" / "ppo"
    assert command("fit", "-c", "ppo.yaml", "--trainer.max_epochs=2")[0] == 0
    assert command("validate", "-c", "ppo.yaml")[0] == 0
    (folder / "notes.txt").write_text("mine")
    assert command("fit", "-c", "ppo.yaml", "--run_dir=fresh")[0] == 0
    assert command("fit", "-c", "ppo.yaml", "--overwrite")[0] == 0
    replaced, fresh = contents(folder), contents(stages / "fresh")
    assert replaced.pop("notes.txt") == b"mine"
    assert replaced.keys() == fresh.keys()  # no checkpoint, report or sample of the earlier run is left
    for name in ("samples.jsonl", "model/model.safetensors"):
        assert replaced[name] == fresh[name]
    assert yaml.safe_load(replaced["config.yaml"])["overwrite"] is False


def test_overwrite_does_not_delete_what_the_run_reads(
    stages: Path, trained_runs: dict[str, Path], command: Callable[..., Any]
) -> None:
    shutil.copytree(trained_runs["sft"], stages / "runs")
    before = contents(stages)
    code, _, err = command("fit", "-c", "sft.yaml", "--model.model=runs/sft/model", "--overwrite")
    assert code == 2 and "--overwrite would delete runs/sft/model, which model.model reads" in err
    code, _, err = command("fit", "-c", "sft.yaml", "--ckpt_path=last", "--overwrite")
    assert code == 2 and "--overwrite and ckpt_path exclude each other" in err
    assert contents(stages) == before


@pytest.mark.parametrize("directory", ["model", "../../policy"])
def test_an_export_does_not_replace_what_the_run_reads(
    directory: str, stages: Path, llama: str, command: Callable[..., Any]
) -> None:
    words = ("fit", "-c", "sft.yaml")
    setting = "--trainer.callbacks.ExportModel.directory"
    assert command(*words, f"{setting}=elsewhere")[0] == 0
    target = Path(shutil.copytree(llama, (stages / "runs" / "sft" / directory).resolve()))
    before, more = contents(stages), (f"--model.model={target}", "--trainer.max_epochs=2")
    for resumed in (("--ckpt_path=last",), ("--run_dir=runs/sft/../sft", "--ckpt_path=last")):
        code, _, err = command(*words, f"{setting}={directory}", *more, *resumed)
        assert code == 2 and f"ExportModel would replace {target}, which model.model reads" in err
        assert contents(stages) == before


def test_overwrite_needs_a_folder_of_the_run(stages: Path, command: Callable[..., Any]) -> None:
    (stages / "config.yaml").write_text("mine")
    code, _, err = command("fit", "-c", "sft.yaml", "--run_dir=null", "--overwrite")
    assert code == 2 and "--overwrite needs a --run_dir" in err
    assert (stages / "config.yaml").read_text() == "mine"


def test_another_runs_checkpoint_does_not_open_the_folder(
    stages: Path, trained_runs: dict[str, Path], command: Callable[..., Any]
) -> None:
    shutil.copytree(trained_runs["sft"], stages / "runs")
    assert command("fit", "-c", "sft.yaml", "--run_dir=other")[0] == 0
    before = contents(stages)
    other = "--ckpt_path=other/checkpoints/last.ckpt"
    code, _, err = command("fit", "-c", "sft.yaml", other, "--trainer.max_epochs=2")
    assert code == 2 and "holds a run already" in err and contents(stages) == before
    shutil.copy(stages / "runs/sft/checkpoints/last.ckpt", "copied.ckpt")  # of the run, by its id
    assert command("fit", "-c", "sft.yaml", "--ckpt_path=copied.ckpt", "--trainer.max_epochs=2")[0] == 0
    last = read_metadata(stages / "runs/sft/checkpoints/last.ckpt")
    assert last is not None and last["epoch"] == 1


def test_last_starts_over_where_no_checkpoint_was_written(stages: Path, command: Callable[..., Any]) -> None:
    folder = stages / "runs" / "sft"
    folder.mkdir(parents=True)
    for name in ("metrics.csv", "samples.jsonl", "config.yaml"):  # as a run that was killed in its first epoch left
        (folder / name).write_text("step\n0\n")
    code, _, err = command("fit", "-c", "sft.yaml", "--ckpt_path=last")
    assert code == 0 and "starting from the beginning" in err
    assert "train/loss" in (folder / "metrics.csv").read_text() and not (folder / "samples.jsonl").exists()
    shutil.rmtree(folder / "checkpoints")  # a finished run without checkpoints is no broken one
    before = contents(stages)
    assert command("fit", "-c", "sft.yaml", "--ckpt_path=last")[0] == 2
    assert contents(stages) == before


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_writes_nothing(
    stage: str, stages: Path, command: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any
) -> None:
    temporary = tmp_path_factory.mktemp("tmp")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    before = contents(stages)
    dry = ("fit", "-c", f"{stage}.yaml", "--trainer.fast_dev_run=true")
    code, _, err = command(*dry, "--trainer.callbacks.ExportModel.directory=../outside")
    assert code == 0 and "fast_dev_run: a dry run" in err
    assert contents(stages) == before and not (stages / "runs").exists()
    assert command("fit", "-c", f"{stage}.yaml")[0] == 0
    trained = contents(stages)
    for more in ((), ("--overwrite",)):
        assert command(*dry, *more)[0] == 0
        assert contents(stages) == trained
    assert not list(temporary.rglob("*.jsonl")) and not list(temporary.glob("lit-rlhf-*"))


@pytest.mark.parametrize(
    ("words", "folder", "said"),
    [
        (["--trainer.default_root_dir=x"], "x", "--trainer.default_root_dir is run_dir here"),
        (["--trainer.default_root_dir", "x"], "x", "--trainer.default_root_dir is run_dir here"),
        (["-c", "old.yaml", "--run_dir=null"], "old", ""),
        (["-c", "old.yaml", "--run_dir=x"], "x", "trainer.default_root_dir: old is not used"),
        (["-c", "old.yaml", "--trainer.default_root_dir=old"], "old", ""),
    ],
)
def test_lightnings_setting_of_the_folder_is_this_one(
    words: list[str], folder: str, said: str, stages: Path, command: Callable[..., Any]
) -> None:
    (stages / "old.yaml").write_text("trainer: {default_root_dir: old}")
    before = contents(stages)
    code, _, err = command("fit", "-c", "sft.yaml", *words)
    assert code == 0 and said in err
    assert {Path(name).parts[0] for name in contents(stages).keys() - before.keys()} == {folder}
    config = yaml.safe_load((stages / folder / "config.yaml").read_text())
    assert config["run_dir"] == folder and config["trainer"]["default_root_dir"] is None


def test_two_folders_are_refused(stages: Path, command: Callable[..., Any]) -> None:
    (stages / "old.yaml").write_text("trainer: {default_root_dir: old}")
    code, _, err = command("fit", "-c", "sft.yaml", "-c", "old.yaml")
    assert code == 2 and "old is another folder than run_dir, runs/sft; set run_dir alone" in err


def printed_metrics(stdout: str) -> dict[str, float]:
    """Return the metrics, one per line."""
    return {name: float(value) for name, value in (line.split() for line in stdout.splitlines() if "/" in line)}


@pytest.mark.parametrize("stage", STAGES)
def test_validate_takes_what_was_trained_and_leaves_the_run_alone(
    stage: str, stages: Path, command: Callable[..., Any]
) -> None:
    fit = ("fit", "-c", f"{stage}.yaml", "--model.optimizer.lr=0.05", "--trainer.max_epochs=3")
    assert command(*fit)[0] == 0
    folder = stages / "runs" / stage
    run, metric = (
        contents(folder),
        {"reward": "validation/accuracy", "ppo": "validation/kl"}.get(stage, "validation/loss"),
    )
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    trained = [float(row[rows[0].index(metric)]) for row in rows[1:] if row[rows[0].index(metric)]][-1]

    def validate(*words: str) -> tuple[float, str]:
        code, out, err = command("validate", "-c", f"{stage}.yaml", *words)
        assert code == 0, err
        return printed_metrics(out)[metric], err

    value, err = validate()
    last = max((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert f"validate: {last.parent}" in err and value == pytest.approx(trained, rel=1e-4)
    assert validate(f"--ckpt_path={last}")[0] == value
    now = contents(folder)
    assert {name: now[name] for name in run} == run
    assert {Path(name).parts[0] for name in now.keys() - run.keys()} == {"validate-1", "validate-2"}
    if stage == "reward":
        assert (folder / "validate-1" / "reward_quality.html").is_file()
    shutil.rmtree(folder / "checkpoints")  # then the exported model
    value, err = validate()
    assert f"validate: runs/{stage}/model" in err and value == pytest.approx(trained, rel=1e-4)
    shutil.rmtree(folder / "model")
    code, _, err = command("validate", "-c", f"{stage}.yaml")
    assert code == 2 and f"validate: runs/{stage} holds neither a checkpoint nor a model" in err


def test_validate_without_rows_and_test_without_a_loader_are_refused(stages: Path, command: Callable[..., Any]) -> None:
    assert command("fit", "-c", "reward.yaml", "--data.validation_path=null")[0] == 0
    before = contents(stages)
    code, _, err = command("validate", "-c", "reward.yaml", "--data.validation_path=null")
    assert code == 2 and "validate: there are no rows for it" in err
    code, _, err = command("test", "-c", "reward.yaml")
    assert code == 2 and err.splitlines()[-1] == (
        "error: test: ComparisonDataModule has no test_dataloader; use lit-rlhf validate, or lit-rlhf evaluate"
    )
    assert contents(stages) == before
    assert command("fit", "-c", "ppo.yaml")[0] == 0
    code, _, err = command("test", "-c", "ppo.yaml")
    assert code == 2 and "error: test: PromptDataModule has no test_dataloader; use lit-rlhf validate" in err


def test_samples_of_rollouts_and_of_validations_are_apart(stages: Path, command: Callable[..., Any]) -> None:
    write_rows(stages / "other.jsonl", [{"prompt": "w9 w9 w9"}] * 4)
    words = ["--data.validation_path=other.jsonl", "--trainer.max_epochs=2"]
    overlay = (
        "trainer: {callbacks+: [{class_path: lit_rlhf.callbacks.GenerateOnValidation, init_args: {path: other.jsonl}}]}"
    )
    (stages / "generate.yaml").write_text(overlay)
    every = ["--trainer.callbacks.LogSamples.every_n_epochs=1", "--trainer.callbacks.LogSamples.rows=8"]
    assert command("fit", "-c", "ppo.yaml", "-c", "generate.yaml", *words, *every)[0] == 0
    files = [stages / "runs/ppo" / name for name in ("samples.jsonl", "validation_samples.jsonl")]
    rollouts, validations = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert len(rollouts) == 16 and all(row["prompt"] != "w9 w9 w9" for row in rollouts)
    assert validations and all(row["prompt"] == "w9 w9 w9" for row in validations)
    assert torch.tensor([row["step"] for row in rollouts]).unique().tolist() == [2, 4]


def test_a_folder_that_another_run_writes_to_is_refused(project: Path, command: Callable[..., Any]) -> None:
    with locked_folder(project / "run", "run_dir"):
        for words in ((), ("--overwrite",), ("--ckpt_path=last",)):
            code, _, err = command("fit", "-c", "recipe.yaml", "--run_dir=run", *words)
            assert code == 2 and "run_dir: another run is writing to run; wait for its end" in err
        assert not any((project / "run").iterdir())
    assert not (project / "run").exists(), "nothing was written"
    assert command("fit", "-c", "recipe.yaml", "--run_dir=run")[0] == 0
    assert command("fit", "-c", "recipe.yaml", "--run_dir=run", "--overwrite")[0] == 0, "the lock is free again"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("before")
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "config.yaml") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"config.yaml": b"before"}


def test_a_file_is_no_folder_to_lock(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with (
        pytest.raises(UserError, match=r"--out: .*run is a file; name a folder"),
        locked_folder(tmp_path / "run", "--out"),
    ):
        pass
