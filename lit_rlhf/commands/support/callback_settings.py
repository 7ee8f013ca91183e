"""Settings of callbacks named by their class on the command line: `--trainer.callbacks.EMA.decay=0.9`."""

import json
import re
from collections.abc import Callable
from typing import Any

import yaml

from lit_rlhf.commands.support.setting_paths import get_class_name, set_value
from lit_rlhf.errors import UserError
from lit_rlhf.suggestions import did_you_mean

NAMED = re.compile(r"--(trainer\.callbacks\.([A-Z]\w*|\d+)\.[\w.]+)(?:=(.*))?", re.DOTALL)


def set_named_callbacks(args: list[str], compose: Callable[[list[str]], dict[str, Any]]) -> list[str]:
    """Replace arguments that name a callback by the full list of callbacks with these settings.

    jsonargparse itself reaches the last callback of the list alone.

    Args:
        args: the arguments of `fit`.
        compose: returns the full configuration of other arguments.

    Raises:
        UserError: the recipe has no such callback, or several.
    """
    named: list[tuple[str, str, str]] = []
    rest: list[str] = []
    words = iter(args)
    for word in words:
        match = NAMED.fullmatch(word)
        if match is None:
            rest.append(word)
            continue
        key, name, value = match.groups()
        value = next(words, None) if value is None else value
        if value is None:
            raise UserError(f"--{key}: a value is missing")
        named.append((key, name, value))
    if not named:
        return args
    config = compose([word for word in rest if not word.startswith("--print_config")])
    callbacks = config["trainer"].get("callbacks") or []
    config["trainer"]["callbacks"] = callbacks if isinstance(callbacks, list) else [callbacks]
    names = [get_class_name(entry) for entry in config["trainer"]["callbacks"]]
    for key, name, value in named:
        if name not in names and not name.isdigit():
            has = f"it has {', '.join(names)}" if names else "it has none"
            raise UserError(
                f"--{key}: the recipe has no callback {name!r}{did_you_mean(name, names)}; {has}; "
                "--trainer.callbacks+=CLASS adds one"
            )
        config = set_value(config, key, parse_value(key, value), option="--")
    return [*rest, f"--trainer.callbacks={json.dumps(config['trainer']['callbacks'])}"]


def parse_value(key: str, text: str) -> Any:
    """Return the value of a setting, which is YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--{key}: {text!r} is not valid YAML") from None
