"""The LightningCLI behind `fit`, `validate` and `test`; an error in a recipe is one line."""

import os
import shlex
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from lit_rlhf.commands.support.compatibility import check_compatibility, get_class_name
from lit_rlhf.commands.support.config_locations import ConfigLocations
from lit_rlhf.commands.support.parse_errors import explain_parse_error
from lit_rlhf.commands.support.preflight import check_checkpoint, check_writable, first_mismatch
from lit_rlhf.commands.support.secrets import without_secrets
from lit_rlhf.commands.support.wandb_login import prepare_wandb
from lit_rlhf.errors import UserError

INTERRUPTED = 130


class SaveRecipe(SaveConfigCallback):
    """Writes the full configuration, without credentials, to config.yaml and to a Weights & Biases logger."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write once, on rank zero."""
        folder = trainer.log_dir  # a collective call: on every rank
        if self.already_saved or folder is None:
            return
        self.already_saved = True
        if not trainer.is_global_zero:
            return
        # a default that is a live object prints a warning here and is written as its repr
        config = without_secrets(yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml")))
        target = Path(folder) / self.config_filename
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams({"config": config})


class RecipeCLI(LightningCLI):
    """Runs one subcommand with any LightningModule and LightningDataModule named by `class_path`.

    Like Lightning's own, the constructor does everything; `exit_code` is the result.

    Args:
        command: fit, validate or test.
        args: the arguments behind it, with a file path after every `-c`.
        locations: of the settings in these files and arguments, for error messages.

    Raises:
        UserError: the recipe, the arguments, the checkpoint or the data are wrong.
    """

    def __init__(self, command: str, args: list[str], locations: ConfigLocations) -> None:
        self.command = command
        self.locations = locations
        self.exit_code = 0
        strict = {"exit_on_error": False, "allow_abbrev": False}  # abbreviations are ambiguous
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=SaveRecipe,
            trainer_defaults={"enable_model_summary": False, "log_every_n_steps": 1},
            seed_everything_default=0,
            parser_kwargs={"prog": "lit-rlhf", **strict, command: dict(strict)},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            auto_configure_optimizers=False,  # the modules have an optimizer setting
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return only the one to run: building the parsers of all four takes longer than the parse."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; an error of jsonargparse becomes one line."""
        self.args: list[str] = args
        try:
            self.config = parser.parse_args([self.command, *args])
        except ArgumentError as problem:
            options = [action.dest for action in self._parser(self.command)._actions]
            raise UserError(explain_parse_error(str(problem), options, self.locations)) from None

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint. Lightning's version would override the recipe with the checkpoint's settings."""
        settings = self.config[self.command]
        if settings.get("ckpt_path"):
            check_checkpoint(str(settings.ckpt_path), settings.model.class_path)

    def before_instantiate_classes(self) -> None:
        """Run the checks that need no model, and add the callbacks that every run has."""
        # imported here: --help and --print_config do not need them
        from lit_rlhf.callbacks import RunState, StopOnSignal, TerminateOnNaN

        check_compatibility(self.config[self.command])
        self.trainer_defaults["callbacks"] = [TerminateOnNaN(), RunState(), StopOnSignal()]
        trainer = self.config[self.command].trainer
        folder = str(trainer.default_root_dir or os.getcwd())
        if not trainer.fast_dev_run and "://" not in folder:
            check_writable(Path(folder))
        loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        if any(get_class_name(logger) == "WandbLogger" for logger in loggers):
            prepare_wandb(os.environ)

    def instantiate_classes(self) -> None:
        """Instantiate; an error of Lightning becomes one line."""
        with raise_misconfiguration_as_user_error():
            try:
                super().instantiate_classes()
            except ValueError as problem:  # jsonargparse wraps a constructor's exception, once per union
                raise unwrap_error(problem) from None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Instantiate the Trainer with atomic checkpoints; its argument errors have several types."""
        from lit_rlhf.checkpoints import AtomicCheckpointIO

        given = self.config_init[self.command].trainer.plugins or []
        plugins = given if isinstance(given, list) else [given]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, AtomicCheckpointIO()]
        try:
            return super().instantiate_trainer(**kwargs, plugins=plugins)
        except (ValueError, TypeError) as problem:
            raise UserError(f"trainer: {problem}") from None

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; an interrupt prints the command that resumes."""
        from lit_rlhf.callbacks.stop_on_signal import StoppedBySignal

        self.resolve_checkpoint()
        try:
            with raise_misconfiguration_as_user_error():
                super()._run_subcommand(subcommand)
        except SystemExit as stop:
            if not self.trainer.interrupted:
                raise
            signaled = stop if isinstance(stop, StoppedBySignal) else None
            self.exit_code = 128 + signaled.signal if signaled else INTERRUPTED
            if self.trainer.is_global_zero:
                print(self.resume_message(signaled.checkpoint if signaled else None), file=sys.stderr)
            elif signaled:
                self.exit_code = 0  # a launcher may kill rank zero if another rank fails
        except RuntimeError as problem:
            if "Error(s) in loading state_dict" not in str(problem) or not self.config[subcommand].get("ckpt_path"):
                raise
            settings = self.config[subcommand]
            raise UserError(
                f"ckpt_path: {settings.ckpt_path} does not fit {settings.model.class_path} as this recipe builds it: "
                f"{first_mismatch(str(problem))}"
            ) from None

    def resolve_checkpoint(self) -> None:
        """Replace `ckpt_path=last` by the path, and make the loggers continue that run."""
        from lit_rlhf.commands.support.resume import continue_logs, find_last

        settings = self.config_init[self.command]
        if settings.get("ckpt_path") == "last":
            settings.ckpt_path = find_last(self.trainer, self.command)
        if settings.get("ckpt_path") and self.command == "fit":
            continue_logs(self.trainer, Path(settings.ckpt_path))

    def resume_message(self, written: Path | None) -> str:
        """Return the line that names the last checkpoint and the command that resumes from it.

        Args:
            written: the checkpoint that was written for this stop.
        """
        step = self.trainer.global_step
        paths = (
            [str(written)]
            if written
            else [
                str(path)
                for callback in self.trainer.checkpoint_callbacks
                if isinstance(callback, ModelCheckpoint)
                for path in (callback.last_model_path, callback.best_model_path)
                if path
            ]
        )
        if not paths:
            return f"interrupted after step {step}; no checkpoint was written"
        last = max(paths, key=lambda path: os.path.getmtime(path) if os.path.exists(path) else 0.0)
        command = shlex.join(["lit-rlhf", self.command, *iter_without_checkpoint(self.args), f"--ckpt_path={last}"])
        return f"interrupted after step {step}; the last checkpoint is {last}; resume: {command}"


@contextmanager
def raise_misconfiguration_as_user_error() -> Iterator[None]:
    """Turn Lightning's exceptions for a wrong setting and for a missing package into a `UserError`."""
    try:
        yield
    except MisconfigurationException as problem:
        raise UserError(str(problem)) from None
    except ModuleNotFoundError as problem:
        if problem.name is not None:  # raised by an import statement; those of Lightning's checks have a message only
            raise
        raise UserError(str(problem)) from None


def unwrap_error(problem: BaseException) -> BaseException:
    """Return the first exception of a chain; as a `UserError` if it is a ValueError, which is about a setting."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return UserError(str(problem)) if isinstance(problem, ValueError) else problem


def iter_without_checkpoint(args: list[str]) -> Iterator[str]:
    """Yield the arguments except `--ckpt_path`."""
    words = iter(args)
    for word in words:
        if word == "--ckpt_path":
            next(words, None)
        elif not word.startswith("--ckpt_path="):
            yield word
