"""The recipes of a sweep: one whole configuration, with a value, a seed and a folder written in."""

import copy
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from lit_rlhf.commands.fit import run as run_fit
from lit_rlhf.commands.support.suggestions import did_you_mean
from lit_rlhf.errors import UserError

CSV_LOGGER = "lightning.pytorch.loggers.CSVLogger"


def composed(args: list[str]) -> dict[str, Any]:
    """Return the whole configuration that `fit` would run with these arguments.

    Raises:
        UserError: what `fit` says of them.
    """
    text = StringIO()
    with redirect_stdout(text):
        try:
            run_fit("fit", [*args, "--print_config"])
        except SystemExit as stop:  # how --print_config ends
            assert not stop.code, stop.code
    config: dict[str, Any] = yaml.safe_load(text.getvalue())
    return config


def read_values(text: str) -> tuple[str, list[Any]]:
    """Return the key and the values of `KEY=V1,V2,...`.

    Raises:
        UserError: it is not of that form.
    """
    key, equals, rest = text.partition("=")
    try:
        values = yaml.safe_load(f"[{rest}]") if equals and rest else None
    except yaml.YAMLError:
        values = None
    if not values:
        raise UserError(f"--over {text}: expected KEY=V1,V2,..., such as model.kl.coefficient=0,0.02,0.2")
    return key, [number(value) for value in values]


def number(value: Any) -> Any:
    """Return 1e-3 as a number, which YAML takes for text."""
    try:
        return float(value) if isinstance(value, str) and value[:1] in "+-.0123456789" else value
    except ValueError:
        return value


def set_value(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a copy of a configuration with one setting changed.

    Args:
        config: as `composed` gives it.
        key: dotted; `init_args` may be left out, and an entry of a list is named by its class or its number.
        value: the new value.

    Raises:
        UserError: there is no such setting, or a list has two entries of that class.
    """
    changed = copy.deepcopy(config)
    place: Any = changed
    *path, last = key.split(".")
    for part in path:
        place = inside(place, part, key)
    settings = with_arguments(place, last)
    if not isinstance(settings, dict) or last not in settings:
        raise UserError(f"--over {key}: no setting {last!r}{did_you_mean(last, names_in(place))}")
    settings[last] = value
    return changed


def inside(place: Any, part: str, key: str) -> Any:
    """Return what a part of a dotted key leads to."""
    if isinstance(place, list):
        found = [entry for entry in place if class_name(entry) == part]
        if part.isdigit() and int(part) < len(place):
            found = [place[int(part)]]
        if len(found) > 1:
            raise UserError(f"--over {key}: {len(found)} entries are a {part}; name one by its number, from 0")
        if found:
            return found[0]
    else:
        settings = with_arguments(place, part)
        if isinstance(settings, dict) and settings.get(part) is not None:
            return settings[part]
    raise UserError(f"--over {key}: no setting {part!r}{did_you_mean(part, names_in(place))}")


def with_arguments(place: Any, name: str) -> Any:
    """Return the mapping that holds `name`: the place itself, or the arguments of its class."""
    if isinstance(place, dict) and name not in place and isinstance(place.get("init_args"), dict):
        return place["init_args"]
    return place


def names_in(place: Any) -> list[str]:
    """Return the names that could follow, for a suggestion."""
    if isinstance(place, list):
        return [class_name(entry) for entry in place]
    return [*place, *(place.get("init_args") or {})] if isinstance(place, dict) else []


def class_name(entry: Any) -> str:
    """Return the name of an entry's class."""
    path: str = entry.get("class_path", "") if isinstance(entry, dict) else str(entry)
    return path.rsplit(".", 1)[-1]


def with_seed(config: Any, seed: int) -> Any:
    """Return a copy with the seed of the run and of its data set, and in place of `{seed}` in any text."""

    def written(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: written(entry) for name, entry in value.items()}
        if isinstance(value, list):
            return [written(entry) for entry in value]
        return value.replace("{seed}", str(seed)) if isinstance(value, str) else value

    changed: dict[str, Any] = written(config)
    changed["seed_everything"] = seed
    data = with_arguments(changed.get("data"), "seed")
    if isinstance(data, dict) and "seed" in data:
        data["seed"] = seed
    return changed


def placed(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a copy that writes into `folder` and nowhere else, metrics.csv included, without a progress bar."""
    changed = copy.deepcopy(config)
    trainer = changed["trainer"]
    trainer |= {"default_root_dir": str(folder), "enable_progress_bar": False}
    loggers = trainer.get("logger")
    entries = [entry for entry in (loggers if isinstance(loggers, list) else [loggers]) if isinstance(entry, dict)]
    entries = [entry for entry in entries if class_name(entry) != "CSVLogger"]
    for entry in entries:
        if "save_dir" in (entry.get("init_args") or {}):
            entry["init_args"]["save_dir"] = str(folder)
    own = {"class_path": CSV_LOGGER, "init_args": {"save_dir": str(folder), "name": "", "version": ""}}
    trainer["logger"] = [own, *entries]
    return changed


def name_of(values: dict[str, Any], seed: int) -> str:
    """Return a run's name, which is also a folder's."""
    words = [f"{key.split('.')[-1]}={value}" for key, value in values.items()]
    return re.sub(r"[^\w=.,+-]", "_", ",".join([*words, f"seed={seed}"]))


def check_recipe(recipe: Path, name: str) -> None:
    """Refuse a recipe that `fit` would refuse.

    Raises:
        UserError: what `fit` says of it, and for which run.
    """
    try:
        composed(["-c", str(recipe)])
    except UserError as problem:
        raise UserError(f"run {name}: {problem}") from None
