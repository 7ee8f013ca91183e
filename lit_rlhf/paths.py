"""Paths as users write them."""

import os
from pathlib import Path


def expand_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` replaced; one of an unknown home stays as it is, for which `Path.expanduser` raises."""
    return Path(os.path.expanduser(path))
