"""fit, validate and test with a user's own modules."""

import os
from pathlib import Path

import pytest
import torch
import yaml

from lit_rlhf.commands.support import wandb_login
from lit_rlhf.commands.support.config_locations import ConfigLocations
from lit_rlhf.errors import UserError

CHECKPOINTS = (
    "--trainer.enable_checkpointing=true",
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.dirpath=kept",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.callbacks.save_last=true",
)


def test_a_users_modules_run_from_yaml_alone(project: Path, command) -> None:
    (project / "count.yaml").write_text("trainer: {callbacks+: [{class_path: toys.CountSteps, init_args: {path: n}}]}")
    (project / "more.yaml").write_text("trainer: {callbacks+: [{class_path: toys.CountSteps, init_args: {path: m}}]}")
    code, _, _ = command("fit", "-c", "recipe.yaml", "-c", "count.yaml", "-c", "more.yaml", "--trainer.max_steps=3")
    assert code == 0
    assert (project / "n").read_text() == (project / "m").read_text() == "step\n" * 3  # += appends


def test_validate_and_test_run(project: Path, command) -> None:
    assert command("fit", "-c", "recipe.yaml", *CHECKPOINTS)[0] == 0
    for name in ("validate", "test"):
        code, stdout, _ = command(name, "-c", "recipe.yaml", *CHECKPOINTS)
        assert code == 0
        assert "validation/loss" in stdout


def test_the_saved_configuration_runs_again(project: Path, command) -> None:
    code, _, _ = command("fit", "-c", "recipe.yaml", "--model.hidden=5", "--run_dir=out")
    assert code == 0
    saved = yaml.safe_load((project / "out" / "config.yaml").read_text())
    assert saved["run_dir"] == "out" and not saved["overwrite"]
    assert saved["model"]["init_args"]["hidden"] == 5
    assert saved["seed_everything"] == 0
    (project / "out" / "config.yaml").rename(project / "again.yaml")
    assert command("fit", "-c", "again.yaml")[0] == 0
    again = yaml.safe_load((project / "out" / "config.yaml").read_text())
    assert {**again, "config": None} == {**saved, "config": None}


def test_print_config_prints_it_and_ends(project: Path, command) -> None:
    code, stdout, stderr = command("fit", "-c", "recipe.yaml", "--model.fault=ours", "--print_config")
    assert (code, stderr) == (0, "")
    assert yaml.safe_load(stdout)["model"]["init_args"]["fault"] == "ours"


def test_help_ends_with_0(command) -> None:
    for option, expected in (("--help", "--trainer.KEY=VALUE"), ("--help-all", "--trainer.max_steps")):
        code, stdout, _ = command("fit", option)
        assert code == 0
        assert expected in stdout


def test_it_resumes_from_the_last_checkpoint(project: Path, command) -> None:
    assert command("fit", "-c", "recipe.yaml", *CHECKPOINTS)[0] == 0
    args = ("fit", "-c", "recipe.yaml", *CHECKPOINTS, "--trainer.max_steps=6", "--ckpt_path=last")
    (project / "count.yaml").write_text("trainer: {callbacks+: [{class_path: toys.CountSteps, init_args: {path: n}}]}")
    assert command(*args, "-c", "count.yaml")[0] == 0
    assert torch.load(project / "kept" / "last.ckpt", weights_only=True)["global_step"] == 6
    assert (project / "n").read_text().count("step") == 2


def test_last_without_a_checkpoint_starts_from_the_beginning_and_says_so(project: Path, command) -> None:
    args = ("-c", "recipe.yaml", *CHECKPOINTS, "--ckpt_path=last")
    code, _, stderr = command("validate", *args)
    assert code == 2
    assert stderr.splitlines()[-1].startswith("error: ckpt_path=last: there is no checkpoint in ")
    code, _, stderr = command("fit", *args)
    assert code == 0
    assert f"ckpt_path=last: no checkpoint in {project / 'kept'} yet; starting from the beginning\n" in stderr


def test_last_is_never_a_damaged_checkpoint(project: Path, command) -> None:
    args = ("fit", "-c", "recipe.yaml", *CHECKPOINTS, "--ckpt_path=last")
    assert command(*args)[0] == 0
    files = sorted((project / "kept").iterdir())
    assert [path.name for path in files] == ["epoch=0-step=4.ckpt", "last.ckpt"]
    files[1].write_bytes(files[1].read_bytes()[:-100])
    code, _, stderr = command(*args, "--trainer.max_steps=5")
    assert code == 0
    assert f"ckpt_path=last: skipped: {files[1]} is no readable checkpoint" in stderr
    assert f"ckpt_path=last: {files[0]}, step 4\n" in stderr
    for path in (project / "kept").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    code, _, stderr = command(*args)
    assert code == 2
    assert "can be resumed" in stderr.splitlines()[-1] and str(project / "kept") in stderr.splitlines()[-1]


def test_a_checkpoint_of_another_module_is_refused(project: Path, command) -> None:
    command("fit", "-c", "recipe.yaml", *CHECKPOINTS)
    code, _, stderr = command("fit", "-c", "recipe.yaml", "--model=toys.OtherModule", "--ckpt_path=kept/last.ckpt")
    assert (code, stderr) == (
        2,
        "error: ckpt_path: kept/last.ckpt is a checkpoint of toys.ToyModule, and this run is of toys.OtherModule\n",
    )


def test_a_checkpoint_of_other_sizes_is_refused(project: Path, command) -> None:
    command("fit", "-c", "recipe.yaml", *CHECKPOINTS)
    args = ("fit", "-c", "recipe.yaml", *CHECKPOINTS, "--model.hidden=7", "--ckpt_path=kept/last.ckpt")
    code, _, stderr = command(*args)
    assert code == 2
    assert "kept/last.ckpt does not fit toys.ToyModule as this recipe builds it: size mismatch for net." in stderr


def test_a_file_that_is_no_checkpoint_is_refused(project: Path, command) -> None:
    (project / "text.ckpt").write_text("no checkpoint")
    torch.save({"weights": 1}, project / "other.ckpt")
    for name in ("text.ckpt", "other.ckpt"):
        code, _, stderr = command("fit", "-c", "recipe.yaml", f"--ckpt_path={name}")
        assert code == 2, name
        assert stderr.startswith(f"error: ckpt_path: {name} is no "), stderr


def test_an_interrupt_names_the_last_checkpoint_and_how_to_resume(project: Path, command) -> None:
    code, _, stderr = command("fit", "-c", "recipe.yaml", "--model.fault=interrupt", *CHECKPOINTS)
    assert code == 130
    line = stderr.splitlines()[-1]
    last = str(project / "kept" / "last.ckpt")
    assert line.startswith(
        f"interrupted after step 2; the last checkpoint is {last}; resume: lit-rlhf fit -c recipe.yaml"
    )
    assert line.endswith(f"--ckpt_path={last}")


def test_an_interrupt_without_a_checkpoint_says_so(project: Path, command) -> None:
    code, _, stderr = command("fit", "-c", "recipe.yaml", "--model.fault=interrupt")
    assert code == 130
    assert stderr.splitlines()[-1] == "interrupted after step 2; no checkpoint was written"


def test_an_existing_file_wins_over_a_recipe(project: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = project / "shipped.yaml"
    shipped.write_text("model: {init_args: {hidden: 9}}")
    monkeypatch.setattr("lit_rlhf.commands.recipes.shipped_recipes", lambda: {"precision/nine": shipped})
    for name in ("precision/nine", "precision/nine.yaml"):
        _, stdout, _ = command("fit", "-c", "recipe.yaml", "-c", name, "--print_config")
        assert yaml.safe_load(stdout)["model"]["init_args"]["hidden"] == 9
    (project / "precision").mkdir()
    (project / "precision" / "nine.yaml").write_text("model: {init_args: {hidden: 8}}")
    _, stdout, _ = command("fit", "-c", "recipe.yaml", "-c", "precision/nine.yaml", "--print_config")
    assert yaml.safe_load(stdout)["model"]["init_args"]["hidden"] == 8


def test_wandb_is_prepared_only_where_it_is_used(project: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(environ: object, setting: str, logger: object) -> None:
        assert environ is os.environ and setting == "trainer.logger"
        raise UserError("prepared")

    monkeypatch.setattr(wandb_login, "prepare_wandb", stop)
    assert command("fit", "-c", "recipe.yaml")[0] == 0
    logger = "--trainer.logger=lightning.pytorch.loggers.WandbLogger"
    assert command("fit", "-c", "recipe.yaml", logger)[::2] == (2, "error: prepared\n")
    (project / "two.yaml").write_text(
        "trainer: {logger: [{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: .}}, "
        "{class_path: lightning.pytorch.loggers.WandbLogger}]}"
    )
    assert command("fit", "-c", "recipe.yaml", "-c", "two.yaml")[::2] == (2, "error: prepared\n")


def test_config_locations_finds_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model:\n  hidden: 1\ntrainer:\n  callbacks+:\n  - class_path: x.Y\n")
    locations = ConfigLocations([path], ["--data.rows", "3", "--model.kind=z"])
    assert locations.locate_setting("hidden") == f" [{path}:2]"
    assert locations.locate_setting("callbacks") == f" [{path}:4]"
    assert locations.locate_setting("rows") == locations.locate_setting("kind", "z") == " [command line]"
    assert locations.locate_value("x.Y") == f" [{path}:5]"
    assert locations.locate_setting("absent") == locations.locate_value("absent") == ""
