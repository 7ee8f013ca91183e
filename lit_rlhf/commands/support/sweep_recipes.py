"""The recipes of a sweep: one full configuration with a value, a seed and a folder set."""

import copy
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from lit_rlhf.commands.fit import run as run_fit
from lit_rlhf.errors import UserError
from lit_rlhf.suggestions import did_you_mean

CSV_LOGGER = "lightning.pytorch.loggers.CSVLogger"


def compose_config(args: list[str]) -> dict[str, Any]:
    """Return the full configuration that `fit` would run with these arguments.

    Raises:
        UserError: raised by `fit`.
    """
    text = StringIO()
    with redirect_stdout(text):
        try:
            run_fit("fit", [*args, "--print_config"])
        except SystemExit as stop:  # raised by --print_config
            assert not stop.code, stop.code
    config: dict[str, Any] = yaml.safe_load(text.getvalue())
    return config


def parse_values(text: str) -> tuple[str, list[Any]]:
    """Return the key and the values of `KEY=V1,V2,...`.

    Raises:
        UserError: it does not have that form.
    """
    key, equals, rest = text.partition("=")
    try:
        values = yaml.safe_load(f"[{rest}]") if equals and rest else None
    except yaml.YAMLError:
        values = None
    if not values:
        raise UserError(f"--over {text}: expected KEY=V1,V2,..., such as model.kl.coefficient=0,0.02,0.2")
    return key, [parse_number(value) for value in values]


def parse_number(value: Any) -> Any:
    """Return a text such as "1e-3", which YAML does not parse, as a number; any other value as it is."""
    try:
        return float(value) if isinstance(value, str) and value[:1] in "+-.0123456789" else value
    except ValueError:
        return value


def set_value(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a copy of a configuration with one setting changed.

    Args:
        config: from `compose_config`.
        key: dotted; `init_args` can be left out, and an entry of a list is named by its class or its index.
        value: the new value.

    Raises:
        UserError: there is no such setting, or a list has several entries of that class.
    """
    changed = copy.deepcopy(config)
    node: Any = changed
    *path, last = key.split(".")
    for part in path:
        node = find_child(node, part, key)
    settings = find_mapping(node, last)
    if not isinstance(settings, dict) or last not in settings:
        raise UserError(f"--over {key}: no setting {last!r}{did_you_mean(last, list_names(node))}")
    settings[last] = value
    return changed


def find_child(node: Any, part: str, key: str) -> Any:
    """Return the child of a configuration node by one part of a dotted key."""
    if isinstance(node, list):
        found = [entry for entry in node if get_class_name(entry) == part]
        if part.isdigit() and int(part) < len(node):
            found = [node[int(part)]]
        if len(found) > 1:
            raise UserError(f"--over {key}: {len(found)} entries are a {part}; name one by its index, from 0")
        if found:
            return found[0]
    else:
        settings = find_mapping(node, part)
        if isinstance(settings, dict) and settings.get(part) is not None:
            return settings[part]
    raise UserError(f"--over {key}: no setting {part!r}{did_you_mean(part, list_names(node))}")


def find_mapping(node: Any, name: str) -> Any:
    """Return the mapping that should hold `name`: the node itself, or the `init_args` of its class."""
    if isinstance(node, dict) and name not in node and isinstance(node.get("init_args"), dict):
        return node["init_args"]
    return node


def list_names(node: Any) -> list[str]:
    """Return the names of a node's children, for a suggestion."""
    if isinstance(node, list):
        return [get_class_name(entry) for entry in node]
    return [*node, *(node.get("init_args") or {})] if isinstance(node, dict) else []


def get_class_name(entry: Any) -> str:
    """Return the class name of a list entry."""
    path: str = entry.get("class_path", "") if isinstance(entry, dict) else str(entry)
    return path.rsplit(".", 1)[-1]


def set_seed(config: Any, seed: int) -> Any:
    """Return a copy with the seed of the run and of its data, and in place of `{seed}` in any text."""

    def replace_seed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: replace_seed(entry) for name, entry in value.items()}
        if isinstance(value, list):
            return [replace_seed(entry) for entry in value]
        return value.replace("{seed}", str(seed)) if isinstance(value, str) else value

    changed: dict[str, Any] = replace_seed(config)
    changed["seed_everything"] = seed
    data = find_mapping(changed.get("data"), "seed")
    if isinstance(data, dict) and "seed" in data:
        data["seed"] = seed
    return changed


def set_output_folder(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a copy that writes all output into `folder`, including metrics.csv, without a progress bar."""
    changed = copy.deepcopy(config)
    trainer = changed["trainer"]
    trainer |= {"default_root_dir": str(folder), "enable_progress_bar": False}
    loggers = trainer.get("logger")
    entries = [entry for entry in (loggers if isinstance(loggers, list) else [loggers]) if isinstance(entry, dict)]
    entries = [entry for entry in entries if get_class_name(entry) != "CSVLogger"]
    for entry in entries:
        if "save_dir" in (entry.get("init_args") or {}):
            entry["init_args"]["save_dir"] = str(folder)
    own = {"class_path": CSV_LOGGER, "init_args": {"save_dir": str(folder), "name": "", "version": ""}}
    trainer["logger"] = [own, *entries]
    return changed


def make_run_name(values: dict[str, Any], seed: int) -> str:
    """Return a run's name, which is also its folder's name."""
    words = [f"{key.split('.')[-1]}={value}" for key, value in values.items()]
    return re.sub(r"[^\w=.,+-]", "_", ",".join([*words, f"seed={seed}"]))


def check_recipe(recipe: Path, name: str) -> None:
    """Refuse a recipe that `fit` would refuse.

    Raises:
        UserError: names the run, and repeats the error of `fit`.
    """
    try:
        compose_config(["-c", str(recipe)])
    except UserError as problem:
        raise UserError(f"run {name}: {problem}") from None
