"""What differs between the recipe of a checkpoint and the recipe of now, as a short table."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from lit_rlhf.checkpoints import RUN_KEY

NOT_SETTINGS = ("ckpt_path", "config", "overwrite")
MAX_WIDTH = 48  # characters of a value
ABSENT = "–"


def describe_differences(content: dict[str, Any], recipe: dict[str, Any], ranks: int) -> list[str]:
    """Return a table of the settings that differ from those of a checkpoint; no line if none does.

    Args:
        content: metadata of the checkpoint.
        recipe: the full configuration of now, without credentials.
        ranks: processes of now.
    """
    run = content.get(RUN_KEY) or {}
    if "recipe" not in run:  # not written by `lit-rlhf fit`
        return []
    then = dict(iter_settings(run["recipe"])) | {"ranks": str(run["ranks"])}
    now = dict(iter_settings(recipe)) | {"ranks": str(ranks)}
    differing = [name for name in {**now, **then} if then.get(name) != now.get(name)]
    # the settings of a class that is new, gone or another one are not listed as well
    others = {f"{name}." for name in differing if is_class(then.get(name)) or is_class(now.get(name))}
    names = [name for name in differing if not any(name.startswith(other) for other in others)]
    if not names:
        return []
    rows = [("setting", "checkpoint", "now")]
    rows += [(name, shorten(then.get(name, ABSENT)), shorten(now.get(name, ABSENT))) for name in sorted(names)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"  {name:<{widths[0]}}  {old:<{widths[1]}}  {new}" for name, old, new in rows]
    return ["resumed with settings that differ from the checkpoint's:", *lines]


def iter_settings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting of nested plain values as dotted name and text; a class is the value of its own name.

    An entry of a list is named by its class, and where there are several of a class, by its number among them.
    """
    if isinstance(value, dict) and "class_path" in value:
        yield name, f"class {value['class_path']}"
        for part in ("init_args", "dict_kwargs"):
            yield from iter_settings(value.get(part) or {}, name)
    elif isinstance(value, dict) and value:
        for key, part in value.items():
            if name or key not in NOT_SETTINGS:
                yield from iter_settings(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(part, dict) and "class_path" in part for part in value):
        seen: Counter[str] = Counter()
        for part in value:
            label = part["class_path"].rsplit(".", 1)[-1] if isinstance(part, dict) else str(part)
            seen[label] += 1
            yield from iter_settings(part, f"{name}.{label}" + (f".{seen[label]}" if seen[label] > 1 else ""))
    elif name and value != {}:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        yield name, re.sub(r" at 0x[0-9a-f]+", "", text)  # of an object that has no text of its own


def is_class(text: str | None) -> bool:
    """Whether `iter_settings` named a class."""
    return text is not None and text.startswith("class ")


def shorten(text: str) -> str:
    """Return a value in one short line."""
    text = " ".join(text.removeprefix("class ").split())
    return text if len(text) <= MAX_WIDTH else f"{text[: MAX_WIDTH - 1]}…"
