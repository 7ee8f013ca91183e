"""The folder of a run: one setting, `run_dir`, from which everything that a run writes follows.

A folder never holds two runs, and nothing is written to it before everything is checked.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from lit_rlhf.commands.support.monitors import check_validation
from lit_rlhf.commands.support.setting_paths import get_class_name
from lit_rlhf.commands.support.wandb_runs import nest_config
from lit_rlhf.errors import UserError
from lit_rlhf.loggers import media_loggers
from lit_rlhf.modules.trainer_settings import check_whole_minibatches
from lit_rlhf.paths import written_whole

# what a run writes to its folder; `validate` and `test` write to folders of their own in it
RUN_FILES = (
    "metrics.csv",
    "config.yaml",
    "hparams.yaml",
    "samples.jsonl",
    "validation_samples.jsonl",
    "reward_quality.html",
    "reward_quality.json",
    "checkpoints",
    "model",
    "metric_guard",
)
REPORTS = ("validate-*", "test-*")
LOGGER_FOLDERS = ("save_dir", "dir")  # settings of loggers
FILE_LOGGERS = ("CSVLogger", "TensorBoardLogger")  # whose files are in save_dir/name/version


@rank_zero_only
def say(line: str) -> None:
    """Print a line to stderr, on rank zero."""
    print(line, file=sys.stderr)


def name_run_dir(args: list[str]) -> list[str]:
    """Return the arguments with `--run_dir` in place of Lightning's `--trainer.default_root_dir`, and say so."""
    renamed = []
    for arg in args:
        name, equals, value = arg.partition("=")
        if name == "--trainer.default_root_dir":
            say(f"{name} is run_dir here, the folder of everything that the run writes")
            arg = f"--run_dir{equals}{value}"
        renamed.append(arg)
    return renamed


def resolve_run_dir(settings: Namespace, args: list[str]) -> str:
    """Return the folder of the run, and store it in the settings as `run_dir` alone.

    Args:
        settings: of a subcommand; a recipe may name the folder by Lightning's `trainer.default_root_dir`.
        args: the arguments; a `--run_dir` among them decides.

    Raises:
        UserError: two folders.
    """
    folder, other = settings.get("run_dir"), settings.trainer.get("default_root_dir")
    if folder and other and Path(folder) != Path(other):
        if not any(arg == "--run_dir" or arg.startswith("--run_dir=") for arg in args):
            raise UserError(
                f"trainer.default_root_dir: {other} is another folder than run_dir, {folder}; set run_dir alone"
            )
        say(f"trainer.default_root_dir: {other} is not used; the run writes to run_dir, {folder}")
    settings.run_dir, settings.trainer.default_root_dir = str(folder or other or os.getcwd()), None
    return str(settings.run_dir)


def move_loggers(trainer: Namespace, folder: str) -> None:
    """Make every logger of a recipe write to a folder, and say where that is another than it names.

    Args:
        trainer: the Trainer's settings, changed in place.
        folder: of the run.
    """
    for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
        arguments = logger.get("init_args") if isinstance(logger, Namespace) else None
        if not arguments:
            continue
        for name in LOGGER_FOLDERS:
            given = arguments.get(name)
            if name not in arguments or (given is None and name != "save_dir"):
                continue
            if given is not None and Path(given) not in (Path(folder), Path(".")):
                say(f"trainer.logger.{name}: {given} is not used; the run writes to {folder}")
            arguments[name] = folder
        if get_class_name(logger) in FILE_LOGGERS and arguments.name == "lightning_logs" and arguments.version is None:
            arguments.name = arguments.version = ""  # no folders within the run's


def next_report_folder(folder: Path, command: str) -> Path:
    """Return a folder for the report of `validate` or `test` that does not exist yet."""
    number = 1
    while (folder / f"{command}-{number}").exists():
        number += 1
    return folder / f"{command}-{number}"


def check_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be created or written to, and create nothing.

    Raises:
        UserError: names the folder and the reason.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    probe = existing / f".writable-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise UserError(
            f"cannot write to the output folder {folder} ({problem.strerror}): set run_dir to another"
        ) from None


def find_exports(folder: Path, trainer: L.Trainer) -> list[Path]:
    """Return the folders that the run of a folder exports its model to."""
    from lit_rlhf.callbacks import ExportModel  # imported here: --help and --print_config do not need it

    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [folder / each.directory for each in callbacks if isinstance(each, ExportModel)]


def find_run(folder: Path, trainer: L.Trainer) -> list[Path]:
    """Return what a run has written to a folder, and to where this one would export its model."""
    paths = dict.fromkeys([*(folder / name for name in RUN_FILES), *find_exports(folder, trainer)])
    return [path for path in paths if path.is_file() or (path.is_dir() and any(path.iterdir()))]


def remove_run(folder: Path) -> None:
    """Delete what an earlier run has written to a folder, and nothing else."""
    for path in folder.iterdir():
        if path.name in RUN_FILES or any(fnmatch(path.name, pattern) for pattern in REPORTS):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def iter_texts(settings: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield every text in nested settings with its dotted name."""
    if isinstance(settings, Namespace):
        settings = vars(settings)
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from iter_texts(value, name if key == "init_args" else f"{name}.{key}")
    elif isinstance(settings, list):
        for value in settings:
            yield from iter_texts(value, name)
    elif isinstance(settings, str):
        yield name, settings


def iter_paths(settings: Namespace, sections: tuple[str, ...]) -> Iterator[tuple[str, str, Path]]:
    """Yield the name, the text and the path of every setting that can be one."""
    for section in sections:
        for name, text in iter_texts(settings.get(section), section):
            if text and "\n" not in text and len(text) < 1000:
                yield name, text, Path(text).resolve()


def check_overwrite(settings: Namespace, folder: Path) -> None:
    """Refuse to delete an earlier run that this one reads from.

    Raises:
        UserError: names the setting.
    """
    for name, text, path in iter_paths(settings, ("model", "data", "trainer")):
        inside = path.relative_to(folder.resolve()).parts if path.is_relative_to(folder.resolve()) else ()
        if inside and inside[0] in RUN_FILES and path.exists() and "dirpath" not in name:
            raise UserError(f"--overwrite would delete {text}, which {name} reads; set another --run_dir")


def check_exports(settings: Namespace, folder: Path, trainer: L.Trainer) -> None:
    """Refuse to replace a model that the run reads by the one that it exports.

    Raises:
        UserError: names the setting.
    """
    exports = [path.resolve() for path in find_exports(folder, trainer)]
    for name, text, path in iter_paths(settings, ("model", "data")):
        if path in exports:
            raise UserError(f"ExportModel would replace {text}, which {name} reads; set another --run_dir")


class LazyWriter(ExperimentWriter):
    """Lightning's writer of metrics.csv, which changes nothing on the disk until it has a row to write.

    Lightning's deletes the file of an earlier run when it is made, before anything of the new run is checked.
    """

    def __init__(self, log_dir: str) -> None:
        self.metrics: list[dict[str, float]] = []
        self.metrics_keys: list[str] = []
        self.hparams: dict[str, Any] = {}
        self.log_dir, self._fs = log_dir, get_filesystem(log_dir)
        self.metrics_file_path = os.path.join(log_dir, self.NAME_METRICS_FILE)

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Keep them until the first row."""
        self.hparams.update(params)

    def save(self) -> None:
        """Write the rows, if there are any."""
        if self.metrics:
            self._fs.makedirs(self.log_dir, exist_ok=True)
            if self.hparams:
                super().log_hparams({})
                self.hparams = {}
            super().save()


class OpenRun(SaveConfigCallback):
    """Opens the folder of a run when everything is checked: just before the first step.

    It removes an earlier run that is to be overwritten, or continues its logs, and gives the configuration, without
    credentials, to a Weights & Biases logger. Until then the loggers start nothing. config.yaml is written behind the
    first batch: a run that fails in it leaves a folder that does not hold a run, whose start can be repeated.
    """

    overwrites: Path | None = None  # the folder whose run is removed
    resumed: dict[str, Any] | None = None  # metadata of the checkpoint whose logs are continued
    loggers: list[Logger] | None = None
    unwritten: tuple[Path, str] | None = None  # config.yaml and its text

    def hold_loggers(self, trainer: L.Trainer) -> None:
        """Hide the loggers until `setup`: Lightning starts them before it reads the data."""
        self.loggers, trainer.loggers = trainer.loggers, []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the loggers back; they start when the model is loaded."""
        if self.loggers is not None:
            trainer.loggers, self.loggers = self.loggers, None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the folder, after the last checks."""
        check_validation(trainer, pl_module)
        check_whole_minibatches(trainer)
        self.open(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Write the configuration, before any other callback writes."""
        self.write_config()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the folder of a report."""
        if not trainer.sanity_checking:
            self.open(trainer)
            self.write_config()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the folder of a report."""
        self.open(trainer)
        self.write_config()

    def open(self, trainer: L.Trainer) -> None:
        """Open it once, on rank zero; a collective call."""
        from lit_rlhf.commands.support.resume import restore_logs

        folder = trainer.log_dir  # a collective call: on every rank
        if self.already_saved:
            return
        self.already_saved = True
        if trainer.is_global_zero:
            if self.overwrites is not None:
                remove_run(self.overwrites)
            if self.resumed is not None:
                restore_logs(trainer, self.resumed)
            # a default that is a live object prints a warning here and is written as its repr
            text = self.parser.dump(self.config, skip_none=False, format="yaml")
            self.unwritten = Path(folder or trainer.default_root_dir) / self.config_filename, text
            for logger in media_loggers(trainer.loggers):
                logger.log_hyperparams(nest_config(yaml.safe_load(text)))
        trainer.strategy.barrier()

    def write_config(self) -> None:
        """Write the configuration, once and on rank zero."""
        if self.unwritten is not None:
            target, text = self.unwritten
            target.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(target) as part:
                part.write_text(text, encoding="utf-8")
            self.unwritten = None


def place_loggers(loggers: list[Logger]) -> None:
    """Make instantiated loggers write nothing to the disk before their first row."""
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            logger._experiment = LazyWriter(logger.log_dir)


def place_output(trainer: L.Trainer, checkpoints: str) -> OpenRun | None:
    """Make an instantiated Trainer write to the folder of the run.

    Args:
        trainer: changed in place.
        checkpoints: folder of a ModelCheckpoint that names none.

    Returns:
        the callback that opens the folder, moved before all others; None in a dry run.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = checkpoints
    place_loggers(trainer.loggers)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    openers = [callback for callback in callbacks if isinstance(callback, OpenRun)]
    callbacks.sort(key=lambda callback: callback not in openers)
    return openers[0] if openers else None
