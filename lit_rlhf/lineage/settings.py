"""Files and models that nested settings name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_rlhf.paths import expand_path

MAX_PATH = 1000  # characters


def iter_paths(settings: Any, name: str = "") -> Iterator[tuple[str, str, Path]]:
    """Yield every text in nested settings that names something on this disk: dotted name, text, path.

    `class_path` and `init_args` are left out of the names.
    """
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from iter_paths(value, name if key == "init_args" else f"{name}.{key}".strip("."))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from iter_paths(value, name)
    elif isinstance(settings, str) and 0 < len(settings) < MAX_PATH and "\n" not in settings:
        path = expand_path(settings)
        try:
            if path.exists():
                yield name, settings, path
        except OSError:  # a name that no file can have
            return


def find_files(settings: Any) -> list[tuple[str, str]]:
    """Return the existing files that settings name: dotted name and path."""
    return list(dict.fromkeys((name, text) for name, text, path in iter_paths(settings) if path.is_file()))


def find_model_folders(settings: Any) -> list[tuple[str, str]]:
    """Return the existing model folders that settings name: dotted name and path."""
    found = ((name, text) for name, text, path in iter_paths(settings) if (path / "config.json").is_file())
    return list(dict.fromkeys(found))
