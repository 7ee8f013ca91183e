"""The LightningCLI behind `fit`, `validate` and `test`: recipes in, one clear line out where a recipe is wrong."""

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
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from lit_rlhf.commands.support.compatibility import check_compatibility
from lit_rlhf.commands.support.config_locations import ConfigLocations
from lit_rlhf.commands.support.parse_errors import explain
from lit_rlhf.commands.support.preflight import check_checkpoint, check_writable, first_mismatch
from lit_rlhf.commands.support.secrets import without_secrets
from lit_rlhf.commands.support.wandb_login import prepare_wandb
from lit_rlhf.errors import UserError

INTERRUPTED = 130


class SaveRecipe(SaveConfigCallback):
    """Writes the whole configuration, without credentials, to config.yaml, and to Weights & Biases where it is used."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write once, on the first rank."""
        folder = trainer.log_dir  # a collective call: every rank must make it
        if self.already_saved or folder is None:
            return
        self.already_saved = True
        if not trainer.is_global_zero:
            return
        # a default that is a live object prints a warning here and is written as its text
        config = without_secrets(yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml")))
        target = Path(folder) / self.config_filename
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams({"config": config})


class RecipeCLI(LightningCLI):
    """Runs one subcommand with any LightningModule and LightningDataModule named by `class_path`.

    As Lightning's own, it does everything in its constructor; `exit_code` is what came of it.

    Args:
        command: fit, validate or test.
        args: what follows it, with every `-c` a file.
        places: the same files and arguments, to say where a wrong setting stands.

    Raises:
        UserError: the recipe, the arguments, the checkpoint or the data are wrong.
    """

    def __init__(self, command: str, args: list[str], places: ConfigLocations) -> None:
        self.command = command
        self.places = places
        self.exit_code = 0
        strict = {"exit_on_error": False, "allow_abbrev": False}  # an abbreviation is a guess
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
            auto_configure_optimizers=False,  # the modules take their optimizer as a setting of their own
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the one asked for: building the parsers of all of them takes longer than the parse."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; what jsonargparse refuses becomes one line."""
        self.args: list[str] = args
        try:
            self.config = parser.parse_args([self.command, *args])
        except ArgumentError as problem:
            options = [action.dest for action in self._parser(self.command)._actions]
            raise UserError(explain(str(problem), options, self.places)) from None

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint. Unlike Lightning's, this takes no setting from it: the recipe holds."""
        settings = self.config[self.command]
        if settings.get("ckpt_path"):
            check_checkpoint(str(settings.ckpt_path), settings.model.class_path)

    def before_instantiate_classes(self) -> None:
        """Check what can be checked before anything is loaded; add the callbacks that every run has."""
        # here, for --help and --print_config need none of it
        from lit_rlhf.callbacks import RunState, StopOnSignal, TerminateOnNaN

        check_compatibility(self.config[self.command])
        self.trainer_defaults["callbacks"] = [TerminateOnNaN(), RunState(), StopOnSignal()]
        trainer = self.config[self.command].trainer
        folder = str(trainer.default_root_dir or os.getcwd())
        if not trainer.fast_dev_run and "://" not in folder:
            check_writable(Path(folder))
        loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        if any(str(getattr(logger, "class_path", "")).endswith("WandbLogger") for logger in loggers):
            prepare_wandb(os.environ)

    def instantiate_classes(self) -> None:
        """Instantiate; what Lightning refuses becomes one line."""
        with raise_misconfiguration_as_user_error():
            try:
                super().instantiate_classes()
            except ValueError as problem:  # jsonargparse wraps whatever a constructor raises, once for every union
                raise original(problem) from None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Instantiate the Trainer, whose complaints about its arguments are of many types."""
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
        """Run; an interrupt ends with the way to resume."""
        self.find_checkpoint()
        try:
            with raise_misconfiguration_as_user_error():
                super()._run_subcommand(subcommand)
        except SystemExit as stop:
            if not self.trainer.interrupted:
                raise
            by_signal = isinstance(stop.code, int) and stop.code > 128
            self.exit_code = int(stop.code or 0) if by_signal else INTERRUPTED
            if self.trainer.is_global_zero:
                print(self.how_to_resume(getattr(stop, "checkpoint", None)), file=sys.stderr)
            elif by_signal:
                self.exit_code = 0  # else whatever started the ranks may kill the first for it
        except RuntimeError as problem:
            if "Error(s) in loading state_dict" not in str(problem) or not self.config[subcommand].get("ckpt_path"):
                raise
            settings = self.config[subcommand]
            raise UserError(
                f"ckpt_path: {settings.ckpt_path} does not fit {settings.model.class_path} as this recipe builds it: "
                f"{first_mismatch(str(problem))}"
            ) from None

    def find_checkpoint(self) -> None:
        """Put the path where `last` stands, and let the logs go on."""
        from lit_rlhf.commands.support.resume import continue_logs, find_last

        settings = self.config_init[self.command]
        if settings.get("ckpt_path") == "last":
            settings.ckpt_path = find_last(self.trainer, self.command)
        if settings.get("ckpt_path") and self.command == "fit":
            continue_logs(self.trainer, Path(settings.ckpt_path))

    def how_to_resume(self, written: Path | None) -> str:
        """Return the line that names the last checkpoint and the command to go on from it.

        Args:
            written: the checkpoint of the stop itself.
        """
        step = self.trainer.global_step
        paths = (
            [str(written)]
            if written
            else [
                str(path)
                for callback in self.trainer.checkpoint_callbacks
                for name in ("last_model_path", "best_model_path")
                if (path := getattr(callback, name, ""))
            ]
        )
        if not paths:
            return f"interrupted after step {step}; no checkpoint was written"
        last = max(paths, key=lambda path: os.path.getmtime(path) if os.path.exists(path) else 0.0)
        command = shlex.join(["lit-rlhf", self.command, *without_checkpoint(self.args), f"--ckpt_path={last}"])
        return f"interrupted after step {step}; the last checkpoint is {last}; resume: {command}"


@contextmanager
def raise_misconfiguration_as_user_error() -> Iterator[None]:
    """Turn Lightning's word for a wrong setting, and for a package that is missing, into a `UserError`."""
    try:
        yield
    except MisconfigurationException as problem:
        raise UserError(str(problem)) from None
    except ModuleNotFoundError as problem:
        if problem.name is not None:  # an import statement's own; Lightning's checks carry only a message
            raise
        raise UserError(str(problem)) from None


def original(problem: BaseException) -> BaseException:
    """Return the exception at the start of a chain; a constructor's ValueError is about its settings: a `UserError`."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return UserError(str(problem)) if isinstance(problem, ValueError) else problem


def without_checkpoint(args: list[str]) -> Iterator[str]:
    """Yield the arguments but for `--ckpt_path`."""
    words = iter(args)
    for word in words:
        if word == "--ckpt_path":
            next(words, None)
        elif not word.startswith("--ckpt_path="):
            yield word
