"""The recipes of a sweep: one full configuration with a value, a seed and a folder set."""

import copy
import re
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from lit_rlhf.commands.fit import run as run_fit
from lit_rlhf.commands.support.config_locations import RefusedYAML, apply_rules, check_arguments
from lit_rlhf.commands.support.setting_paths import find_mapping, get_class_name
from lit_rlhf.commands.support.stage_records import compute_fingerprint
from lit_rlhf.errors import UserError

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
        values = apply_rules(yaml.safe_load)(f"[{rest}]") if equals and rest else None
    except yaml.YAMLError:
        values = None
    except RefusedYAML as refused:
        raise UserError(f"--over {key}: {refused}") from None
    if not values:
        raise UserError(f"--over {text}: expected KEY=V1,V2,..., such as model.kl.coefficient=0,0.02,0.2")
    check_arguments([f"--{key}={rest}"])
    numbers = [parse_number(value) for value in values]
    repeated = [value for value, count in Counter(map(repr, numbers)).items() if count > 1]
    if repeated:
        raise UserError(f"--over {key}: {repeated[0]} stands twice; name every value once")
    return key, numbers


def parse_number(value: Any) -> Any:
    """Return a text such as "1e-3", which YAML does not parse, as a number; any other value as it is."""
    try:
        return float(value) if isinstance(value, str) and value[:1] in "+-.0123456789" else value
    except ValueError:
        return value


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
    changed |= {"run_dir": str(folder), "overwrite": False}
    trainer = changed["trainer"]
    trainer |= {"default_root_dir": None, "enable_progress_bar": False}
    loggers = trainer.get("logger")
    entries = [entry for entry in (loggers if isinstance(loggers, list) else [loggers]) if isinstance(entry, dict)]
    entries = [entry for entry in entries if get_class_name(entry) != "CSVLogger"]
    own = {"class_path": CSV_LOGGER, "init_args": {"save_dir": str(folder), "name": "", "version": ""}}
    for entry in entries:
        if "save_dir" in (entry.get("init_args") or {}):
            entry["init_args"]["save_dir"] = str(folder)
    trainer["logger"] = [own, *entries]
    return changed


def name_wandb_runs(config: dict[str, Any], group: str, name: str) -> dict[str, Any]:
    """Return a copy whose WandbLoggers have a group and a name, unless they have one already."""
    changed = copy.deepcopy(config)
    for entry in changed["trainer"]["logger"]:
        if get_class_name(entry) == "WandbLogger":
            arguments, others = entry.setdefault("init_args", {}), entry.setdefault("dict_kwargs", {})
            arguments["name"] = arguments.get("name") or name
            others["group"] = others.get("group") or group
    return changed


def make_run_names(runs: list[tuple[dict[str, Any], int]]) -> list[str]:
    """Return the names of runs by their values and seeds, which are also their folders' names.

    Texts that differ only in characters that a name cannot have get a hash of the values behind their name.
    """
    names = [make_run_name(values, seed) for values, seed in runs]
    count = Counter(names)
    return [
        name if count[name] == 1 else f"{name},{compute_fingerprint(repr(values))[:8]}"
        for name, (values, _) in zip(names, runs)
    ]


def make_run_name(values: dict[str, Any], seed: int) -> str:
    """Return a run's name, which is also its folder's name."""
    words = [f"{key.split('.')[-1]}={value}" for key, value in values.items()]
    return re.sub(r"[^\w=.,+-]", "_", ",".join([*words, f"seed={seed}"]))


def check_recipe(text: str, name: str) -> None:
    """Refuse a recipe that `fit` would refuse; nothing is kept of it.

    Args:
        text: of the recipe.
        name: of its run.

    Raises:
        UserError: names the run, and repeats the error of `fit`.
    """
    with TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(text, encoding="utf-8")
        try:
            compose_config(["-c", str(recipe)])
        except UserError as problem:
            message = re.sub(rf" \[{re.escape(str(recipe))}:\d+\]", "", str(problem))  # of a file that is removed
            raise UserError(f"run {name}: {message}") from None
