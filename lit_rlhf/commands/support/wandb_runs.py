"""A run in Weights & Biases: what it is called by default, and its config."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.loggers import Logger

from lit_rlhf.commands.recipes import is_overlay, read_description, shipped_recipes
from lit_rlhf.commands.support.setting_paths import get_class_name
from lit_rlhf.loggers import media_loggers
from lit_rlhf.secrets import mask_text

MAX_TAG = 64  # characters
VARIABLES = {  # argument of wandb.init -> the variable that sets it
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "name": "WANDB_NAME",
    "tags": "WANDB_TAGS",
    "notes": "WANDB_NOTES",
}


class WandbRun(NamedTuple):
    """What a run is called, unless the user's settings say otherwise."""

    group: str  # the experiment
    job_type: str  # the stage
    name: str | None
    tags: list[str]
    notes: str


def describe_run(
    folder: Path, job_type: str, tags: Sequence[str], recipes: Sequence[Path], experiment: Path | None = None
) -> WandbRun:
    """Return what a run is called by default.

    Args:
        folder: of the run.
        job_type: its stage.
        tags: such as the model; those of the overlays among the recipes are added.
        recipes: the files of `-c`; the title of the first one becomes the notes.
        experiment: folder of the runs that belong together; by default the one above the run's, unless the run's is
            the working directory.
    """
    folder = folder.absolute()
    if experiment is None:
        experiment = folder if folder == Path.cwd() or not folder.parent.name else folder.parent
    experiment = experiment.absolute()
    inner = folder.relative_to(experiment).parts if folder.is_relative_to(experiment) else (folder.name,)
    name = "-".join([experiment.name, *(inner or (job_type,))])
    shipped = {path.resolve(): name for name, path in shipped_recipes().items()}
    names = [shipped.get(path.resolve(), "") for path in recipes]
    kept = [mask_text(tag)[-MAX_TAG:] for tag in (*tags, *(each for each in names if is_overlay(each))) if tag]
    notes = read_description(recipes[0]) if recipes else ""
    return WandbRun(experiment.name, job_type, name, list(dict.fromkeys(kept)), notes)


def apply_run(loggers: Sequence[Logger], run: WandbRun, environ: Mapping[str, str]) -> None:
    """Set what a run is called in loggers that have not started; arguments and variables of the user's win."""
    for logger in media_loggers(loggers):
        arguments = logger._wandb_init  # there is no public way after construction
        if arguments.get("anonymous") is None:  # W&B warns of the setting, whatever its value
            arguments.pop("anonymous", None)
        for name, value in run._asdict().items():
            if value and not arguments.get(name) and not environ.get(VARIABLES[name]):
                arguments[name] = value


def nest_config(config: Any) -> Any:
    """Return a configuration in the form that runs are filtered by: with the names of the command line.

    `init_args` are moved up to their class, and a list of objects becomes a mapping by class name, as in
    `model.kl.coefficient` and `trainer.callbacks.EMA.decay`.
    """
    if isinstance(config, dict):
        arguments = config.get("init_args")
        if "class_path" in config and isinstance(arguments, dict):
            config = {"class_path": config["class_path"], **arguments, **(config.get("dict_kwargs") or {})}
        return {key: nest_config(value) for key, value in config.items()}
    if isinstance(config, list):
        names = [get_class_name(each) for each in config if isinstance(each, dict) and "class_path" in each]
        if config and len(set(names)) == len(config):
            return dict(zip(names, map(nest_config, config)))
        return [nest_config(each) for each in config]
    return config
