"""The LightningCLI behind `fit`, `validate` and `test`; an error in a recipe is one line."""

import os
import re
import shlex
import sys
import tempfile
import time
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_rlhf.checkpoints import read_metadata
from lit_rlhf.commands.support.callback_settings import set_named_callbacks
from lit_rlhf.commands.support.command_line import format_command, name_configs
from lit_rlhf.commands.support.compatibility import check_compatibility
from lit_rlhf.commands.support.config_locations import ConfigLocations, RefusedYAML
from lit_rlhf.commands.support.console import Verbosity, get_verbosity
from lit_rlhf.commands.support.locks import locked_folder
from lit_rlhf.commands.support.monitors import check_monitors
from lit_rlhf.commands.support.parse_errors import explain_parse_error
from lit_rlhf.commands.support.preflight import check_checkpoint, first_mismatch
from lit_rlhf.commands.support.python_only import register_python_only_types
from lit_rlhf.commands.support.python_values import NestedValues
from lit_rlhf.commands.support.recipe_differences import describe_differences
from lit_rlhf.commands.support.run_folder import (
    OpenRun,
    check_exports,
    check_overwrite,
    check_writable,
    find_run,
    move_loggers,
    name_run_dir,
    next_report_folder,
    place_output,
    resolve_run_dir,
    say,
)
from lit_rlhf.commands.support.seeds import check_seeds
from lit_rlhf.commands.support.setting_paths import get_class_name
from lit_rlhf.commands.support.wandb_login import prepare_loggers, start_service
from lit_rlhf.commands.support.wandb_runs import (
    WandbRun,
    apply_run,
    describe_run,
)
from lit_rlhf.commands.support.wandb_sweeps import in_sweep, sweep_run_dir
from lit_rlhf.errors import UserError
from lit_rlhf.loggers import finish_runs
from lit_rlhf.secrets import MaskedHelp, without_secrets

INTERRUPTED = 130
EVALUATION_HOOKS = {"validate": ("validation_step", "val_dataloader"), "test": ("test_step", "test_dataloader")}


class RecipeParser(NestedValues, MaskedHelp, LightningArgumentParser):  # type: ignore[misc]  # a mixin's signature
    """Lightning's parser, which takes null everywhere, and whose help shows no credential."""


class RecipeCLI(LightningCLI):
    """Runs one subcommand with any LightningModule and LightningDataModule named by `class_path`.

    Like Lightning's own, the constructor does everything; `exit_code` is the result.

    Args:
        command: fit, validate or test.
        args: the arguments behind it, with a file path after every `-c`.
        locations: of the settings in these files and arguments, for error messages.
        experiment: folder of the runs that belong together; by default the one above the run's.

    Raises:
        UserError: the recipe, the arguments, the checkpoint or the data are wrong.
    """

    def __init__(
        self, command: str, args: list[str], locations: ConfigLocations, experiment: Path | None = None
    ) -> None:
        self.command, self.experiment = command, experiment
        self.locations = locations
        self.exit_code = 0
        self.dry_folder: tempfile.TemporaryDirectory[str] | None = None
        self.lock = ExitStack()  # of the run's folder, to the end of the run
        register_python_only_types()
        strict = {"exit_on_error": False, "allow_abbrev": False}  # abbreviations are ambiguous
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=OpenRun,
            trainer_defaults={"enable_model_summary": False, "log_every_n_steps": 1},
            seed_everything_default=0,
            parser_class=RecipeParser,
            parser_kwargs={"prog": "lit-rlhf", **strict, command: dict(strict)},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            auto_configure_optimizers=False,  # the modules have an optimizer setting
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return only the one to run: building the parsers of all four takes longer than the parse."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the folder of the run."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            help="folder of everything that the run writes: metrics, checkpoints, samples, reports, model; by default "
            "the working directory. validate and test take from it what was trained",
        )
        if self.command == "fit":
            parser.add_argument(
                "--overwrite", action="store_true", help="delete the run that run_dir holds, when the new one starts"
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; an error of jsonargparse becomes one line."""
        self.args: list[str] = name_run_dir(args)
        self.config = self.parse(parser, set_named_callbacks(self.args, lambda words: self.compose(parser, words)))
        check_seeds(self.config[self.command].as_dict(), self.locations)

    def parse(self, parser: LightningArgumentParser, args: list[str]) -> Namespace:
        """Return the settings that arguments give.

        Raises:
            UserError: a wrong setting.
        """
        try:
            return parser.parse_args([self.command, *args])
        except ArgumentError as problem:
            options = [action.dest for action in self._parser(self.command)._actions]
            raise UserError(explain_parse_error(str(problem), options, self.locations)) from None
        except RefusedYAML as refused:
            raise UserError(f"{refused} [command line]") from None

    def compose(self, parser: LightningArgumentParser, args: list[str]) -> dict[str, Any]:
        """Return the full configuration that arguments give, as plain values."""
        return self.dump(self.parse(parser, args)[self.command])

    def dump(self, settings: Namespace) -> dict[str, Any]:
        """Return the settings of the subcommand as plain values, without credentials."""
        text = self._parser(self.command).dump(settings, skip_none=False, format="yaml")
        config: dict[str, Any] = yaml.safe_load(text)
        return config

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint. Lightning's version would override the recipe with the checkpoint's settings."""
        settings = self.config[self.command]
        if settings.get("ckpt_path"):
            check_checkpoint(str(settings.ckpt_path), settings.model.class_path)

    def before_instantiate_classes(self) -> None:
        """Run the checks that need no model, and add the callbacks that every run has."""
        # imported here: --help and --print_config do not need them
        from lit_rlhf.callbacks import Lineage, RunState, StopOnSignal, TerminateOnNaN

        settings = self.config[self.command]
        check_compatibility(settings)
        self.place_run(settings)
        self.recipe = self.dump(settings)
        args, configs = name_configs(self.args)
        state = RunState(self.recipe, format_command(self.command, args), configs)
        callbacks: list[L.Callback] = [TerminateOnNaN(), state, StopOnSignal()]
        given = settings.trainer.callbacks or []
        if "Lineage" not in map(get_class_name, given if isinstance(given, list) else [given]):
            callbacks.append(Lineage())  # a recipe's own has settings
        self.trainer_defaults["callbacks"] = callbacks
        if not settings.trainer.fast_dev_run:
            prepare_loggers(settings.trainer.logger, "trainer.logger", os.environ)
            start_service(settings.trainer.logger, os.environ)

    def place_run(self, settings: Namespace) -> None:
        """Decide where the run writes to, and what `validate` and `test` take."""
        from lit_rlhf.commands.support.resume import find_trained

        self.run_dir = resolve_run_dir(settings, self.args)
        if self.command == "fit" and in_sweep(os.environ):
            self.experiment = self.experiment or Path(self.run_dir).absolute().parent
            self.run_dir = settings.run_dir = sweep_run_dir(self.run_dir, os.environ)
        self.output, self.overwrites = self.run_dir, bool(settings.get("overwrite"))
        if self.overwrites:
            settings.overwrite = False  # config.yaml says what the run is, not what it replaced
        is_local = "://" not in self.run_dir
        if settings.trainer.fast_dev_run:
            say("fast_dev_run: a dry run, whose files are written to a temporary folder and removed")
            self.dry_folder = tempfile.TemporaryDirectory(prefix="lit-rlhf-dry-run-")
            self.output = self.dry_folder.name
        elif self.command != "fit" and is_local:
            self.output = str(next_report_folder(Path(self.run_dir), self.command))
        elif is_local:
            check_writable(Path(self.run_dir))
        if self.command != "fit" and not settings.get("ckpt_path") and is_local:
            say(f"{self.command}: {find_trained(Path(self.run_dir), settings, self.command)}")
            self._parse_ckpt_path()
        move_loggers(settings.trainer, self.output)

    def _dump_config(self) -> None:
        """Take the recipe's plain values; Lightning would dump the same once more, which takes as long as the parse."""
        self.config_dump = deepcopy(self.recipe)

    def instantiate_classes(self) -> None:
        """Instantiate; an error of Lightning becomes one line."""
        with raise_misconfiguration_as_user_error():
            try:
                super().instantiate_classes()
            except ValueError as problem:  # jsonargparse wraps a constructor's exception, once per union
                raise unwrap_error(problem) from None
        for owner in (self.model, self.datamodule):  # a default can be a credential: os.environ["KEY"]
            owner._log_hyperparams = False  # the loggers get the whole recipe, and start when everything is checked
            for name in ("_hparams", "_hparams_initial"):  # in checkpoints, and in the loggers; set if they are saved
                hparams = vars(owner).get(name, {})
                hparams.update(without_secrets(dict(hparams)))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Instantiate the Trainer with atomic checkpoints; its argument errors have several types."""
        from lit_rlhf.checkpoints import AtomicCheckpointIO

        given = self.config_init[self.command].trainer.plugins or []
        plugins = given if isinstance(given, list) else [given]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, AtomicCheckpointIO()]
        settings = {**kwargs, "plugins": plugins, "default_root_dir": self.output}
        given = self.config_init[self.command].trainer
        if given.logger in (None, True) and not given.barebones:
            settings["logger"] = CSVLogger(self.output, name="", version="")
        callbacks = given.callbacks if isinstance(given.callbacks, list) else [given.callbacks]
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if given.enable_progress_bar is not False and not given.barebones and not has_bar:
            from lit_rlhf.commands.support.progress_bar import StageProgressBar

            self.trainer_defaults["callbacks"].append(StageProgressBar())
        try:
            trainer = super().instantiate_trainer(**settings)
        except (ValueError, TypeError) as problem:
            raise UserError(f"trainer: {problem}") from None
        except RuntimeError as problem:
            twice = re.search("more than one stateful callback of type `(.+?)`", str(problem))
            if twice is None:
                raise
            raise UserError(
                f"trainer.callbacks: {twice[1]} is there twice; change the settings of the first one instead: "
                f"--trainer.callbacks.{twice[1]}.NAME=VALUE"
            ) from None
        apply_run(trainer.loggers, self.describe_run(), os.environ)
        written = self.output if self.command == "fit" else self.run_dir  # validate and test write no checkpoint
        self.opener = place_output(trainer, os.path.join(written, "checkpoints"))
        return trainer

    def describe_run(self) -> WandbRun:
        """Return what this run is called in Weights & Biases by default."""
        model = self.config[self.command].model
        stage = get_class_name(model).removesuffix("Module").lower()
        job_type = stage if self.command == "fit" else self.command
        tags = [stage, str((model.get("init_args") or {}).get("model", ""))]
        run = describe_run(Path(self.run_dir), job_type, tags, list(self.locations.trees), self.experiment)
        return run._replace(name=None) if in_sweep(os.environ) else run  # W&B names the runs of its sweeps

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; an interrupt prints the command that resumes."""
        from lit_rlhf.callbacks.stop_on_signal import StoppedBySignal

        self.check_hooks()
        start = time.perf_counter()
        try:
            with raise_misconfiguration_as_user_error():
                if subcommand == "fit":
                    check_monitors(self.trainer, self.model)
                self.prepare_run()
                super()._run_subcommand(subcommand)
                batches = {"validate": "num_val_batches", "test": "num_test_batches"}.get(subcommand)
                if batches and not sum(getattr(self.trainer, batches)):
                    raise UserError(f"{subcommand}: there are no rows for it; set data.validation_path")
                self.print_summary(time.perf_counter() - start)
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
            if str(problem).startswith("Early stopping conditioned on metric"):
                raise UserError(f"trainer.callbacks: {problem}") from None
            if "Error(s) in loading state_dict" not in str(problem) or not self.config[subcommand].get("ckpt_path"):
                raise
            settings = self.config[subcommand]
            raise UserError(
                f"ckpt_path: {settings.ckpt_path} does not fit {settings.model.class_path} as this recipe builds it: "
                f"{first_mismatch(str(problem))}"
            ) from None
        finally:
            finish_runs(self.trainer.loggers, succeeded=sys.exc_info()[0] is None and not self.exit_code)
            self.lock.close()
            if self.dry_folder is not None:
                self.dry_folder.cleanup()

    def print_summary(self, seconds: float) -> None:
        """Print what the run leaves behind, on rank zero."""
        from lit_rlhf.commands.support.run_summary import format_metrics, format_summary

        if not self.trainer.is_global_zero or get_verbosity() is Verbosity.STAGE or self.dry_folder is not None:
            return
        if self.command == "fit":
            print(format_summary(self.trainer, Path(self.run_dir), list(self.locations.trees), seconds), flush=True)
        elif not self.config_init[self.command].verbose:
            print(format_metrics(dict(self.trainer.callback_metrics)), flush=True)

    def check_hooks(self) -> None:
        """Refuse `validate` or `test` where there is no step or no data for it.

        Raises:
            UserError: names the class that lacks it, and what to use.
        """
        if self.command == "fit":
            return
        step, loader = EVALUATION_HOOKS[self.command]
        hint = "" if self.command == "validate" else "; use lit-rlhf validate, or lit-rlhf evaluate"
        if not is_overridden(step, self.model):
            raise UserError(f"{self.command}: {type(self.model).__name__} has no {step}{hint}")
        if not is_overridden(loader, self.datamodule) and not is_overridden(loader, self.model):
            raise UserError(f"{self.command}: {type(self.datamodule).__name__} has no {loader}{hint}")

    def prepare_run(self) -> None:
        """Find the checkpoint, refuse a folder that holds another run, and hold the loggers until all is checked."""
        from lit_rlhf.commands.support.resume import find_checkpoint_folders, find_last, is_of_same_run, set_versions
        from lit_rlhf.modules.base import LitModule

        settings, folder = self.config_init[self.command], Path(self.run_dir)
        if self.command != "fit" and get_verbosity() is not Verbosity.VERBOSE:
            settings.verbose = False  # Lightning's table is wider than a terminal
        folders = find_checkpoint_folders(folder, self.trainer.checkpoint_callbacks)
        takes_last = settings.get("ckpt_path") == "last"
        if takes_last:
            settings.ckpt_path = find_last(self.trainer, folders, self.command)
        if self.opener is None:  # a dry run
            return
        self.opener.hold_loggers(self.trainer)
        if self.command != "fit" or "://" in self.run_dir:
            return
        if self.trainer.is_global_zero:  # which launches the other ranks, or ends them
            self.lock.enter_context(locked_folder(folder, "run_dir"))
        checkpoint = settings.get("ckpt_path") or self.trainer._checkpoint_connector._hpc_resume_path
        content = read_metadata(Path(checkpoint)) if checkpoint and Path(checkpoint).exists() else None
        if content is not None:
            if isinstance(self.model, LitModule):
                self.model.check_resumable(content)
            for line in describe_differences(content, self.recipe, self.trainer.world_size):
                say(line)
            set_versions(self.trainer, content)
        if checkpoint and is_of_same_run(Path(checkpoint), content, folders):
            if self.overwrites:
                raise UserError(
                    f"--overwrite and ckpt_path exclude each other: {checkpoint} resumes the run in {folder}"
                )
            check_exports(self.config[self.command], folder, self.trainer)
            self.opener.resumed = content
            return
        found = find_run(folder, self.trainer)
        is_unfinished = bool(self.trainer.checkpoint_callbacks) and not any(path.name == "model" for path in found)
        if found and not self.overwrites and not (takes_last and is_unfinished):
            raise UserError(
                f"run_dir: {folder} holds a run already ({', '.join(path.name for path in found)}); set another "
                "--run_dir, --ckpt_path=last to resume that run, or --overwrite to replace it"
            )
        if found:
            if self.overwrites and self.run_dir == os.getcwd():
                raise UserError("--overwrite needs a --run_dir: it would delete files of the working directory")
            check_overwrite(self.config[self.command], folder)
            self.opener.overwrites = folder
        check_exports(self.config[self.command], folder, self.trainer)

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
    """Yield the arguments except `--ckpt_path` and `--overwrite`."""
    words = iter(args)
    for word in words:
        if word == "--ckpt_path":
            next(words, None)
        elif not word.startswith(("--ckpt_path=", "--overwrite")):
            yield word
