"""Copies of shipped recipes with other texts in them, such as the folder of a procedure's runs."""

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from lit_rlhf.models.export import make_directory


def copy_shipped_recipes(folder: str, texts: Mapping[str, str], target: Path) -> dict[str, Path]:
    """Copy a folder of shipped recipes, with other texts in them; return the copies by name.

    Args:
        folder: below `recipes/`.
        texts: text -> what replaces it, such as the folder of the runs.
        target: folder of the copies.
    """
    make_directory(target)
    copies = {}
    for source in (files("lit_rlhf") / "recipes" / folder).iterdir():
        path = target / source.name
        path.write_text(read_shipped_recipe(f"{folder}/{path.stem}", texts), encoding="utf-8")
        copies[path.stem] = path
    return copies


def read_shipped_recipe(name: str, texts: Mapping[str, str]) -> str:
    """Return a shipped recipe, such as "quickstart/ppo", with other texts in it, such as the folder of the runs."""
    return replace_texts((files("lit_rlhf") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"), texts)


def replace_texts(text: str, texts: Mapping[str, str]) -> str:
    """Return a text with other parts; the longest that fits counts, and what replaces it is not itself searched."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda match: texts[match[0]], text)
