"""The configuration of a model that a recipe starts from, also before the stage that writes the model has run."""

from pathlib import Path
from typing import NamedTuple

import yaml
from transformers import PretrainedConfig

from lit_rlhf.commands.recipes import shipped_recipes
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import load_config
from lit_rlhf.models.loading_config import ModelLoadingConfig

EXPORT = "model"  # of `ExportModel`, in the folder of a run
OTHERWISE = "--model.model= takes a folder with a config.json, that file, or a hub name"


class PlannedModel(NamedTuple):
    """A model's configuration.

    Args:
        config: of the model, or of the one that the stages before it start from: its shape is the same.
        note: says so, for the reader of the plan; empty if the model exists.
    """

    config: PretrainedConfig
    note: str = ""


def load_planned_model(model: str, loading: ModelLoadingConfig) -> PlannedModel:
    """Load the configuration of a model: a folder, a `config.json`, a hub name, or a folder that a stage will write.

    For the last one the recipes are followed back to a model that exists: those of runs that have begun, by their
    `config.yaml`, and the shipped ones, by their `run_dir`.

    Raises:
        UserError: There is no such model, or none that the stages before it start from.
    """
    origin, stages = model, list[str]()
    while not Path(origin).exists() and (stage := find_stage(origin)) is not None and stage[0] not in stages:
        stages.append(stage[0])
        origin = stage[1]
    file = Path(origin)
    try:
        config = load_config(str(file.parent) if file.name == "config.json" and file.is_file() else origin, loading)
    except UserError as problem:
        chain = f"{model!r} does not exist yet; {', '.join(stages)} would make it from {origin!r}: " if stages else ""
        raise UserError(f"{chain}{problem}; {OTHERWISE}") from problem
    note = f"{model} does not exist yet: of the shape of {origin}, by {', '.join(stages)}" if stages else ""
    return PlannedModel(config, note)


def find_stage(model: str) -> tuple[str, str] | None:
    """Return the recipe of the stage that writes a folder, and the model that this stage starts from; None if unknown.

    Args:
        model: Path of the folder.
    """
    folder = Path(model)
    if folder.name != EXPORT:
        return None
    begun = folder.parent / "config.yaml"
    if begun.is_file():
        return _read_stage(str(begun), begun)
    for name, file in shipped_recipes().items():
        run_dir = yaml.safe_load(file.read_text(encoding="utf-8")).get("run_dir")  # an overlay has none
        if run_dir is not None and Path(run_dir) == folder.parent:
            return _read_stage(name, file)
    return None


def _read_stage(name: str, file: Path) -> tuple[str, str] | None:
    """Return a recipe's name and the model that it starts from; None for a module that names no model."""
    recipe = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    start = ((recipe.get("model") or {}).get("init_args") or {}).get("model")
    return (name, start) if isinstance(start, str) else None
