"""The range of seeds, which Lightning and numpy set: 0 to 2^32 - 1, for every seed of a command or a recipe."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lit_rlhf.errors import UserError

if TYPE_CHECKING:
    from lit_rlhf.commands.support.config_locations import ConfigLocations

MAX_SEED = 2**32 - 1


def check_seed(seed: int, setting: str, location: str = "") -> None:
    """Refuse a seed that is out of range.

    Args:
        seed: as given.
        setting: name of the setting or option.
        location: such as " [recipe.yaml:3]".

    Raises:
        UserError: names the setting and the range.
    """
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"{setting}: {seed} is no seed; use an integer from 0 to {MAX_SEED}{location}")


def check_seeds(config: Mapping[str, Any], locations: "ConfigLocations") -> None:
    """Check every seed of a configuration: that of the run, and those of this library's classes.

    Raises:
        UserError: see `check_seed`.
    """
    for path, seed in iter_seeds(config):
        check_seed(seed, ".".join(path), locations.locate_setting(path[-1], str(seed)))


def iter_seeds(config: Any, path: tuple[str, ...] = (), own: bool = True) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the name and value of every seed; another package's class may give -1 a meaning, so `own` excludes it."""
    if isinstance(config, Mapping):
        own = str(config.get("class_path", "lit_rlhf." if own else "")).startswith("lit_rlhf.")
        for name, value in config.items():
            inner = path if name == "init_args" else (*path, name)
            if own and name.split("_")[-1] in ("seed", "everything") and isinstance(value, int):
                yield inner, int(value)
            yield from iter_seeds(value, inner, own)
    elif isinstance(config, list):
        for entry in config:
            yield from iter_seeds(entry, path, own)
