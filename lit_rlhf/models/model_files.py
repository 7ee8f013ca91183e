"""Files of a model folder or of a hub repository, found without loading a model."""

from pathlib import Path

from transformers.utils import cached_file, has_file
from transformers.utils.hub import extract_commit_hash

from lit_rlhf.models.loading_config import ModelLoadingConfig


def looks_local(model: str) -> bool:
    """Whether a name can only be a folder's: it is a path, or has more parts than a hub name."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1


def find_file(model: str, name: str, loading: ModelLoadingConfig) -> str | None:
    """Return the path of a file of a folder or of a hub model, which is downloaded; None if it has none."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path: str | None = cached_file(model, name, revision=loading.revision, **quiet)
    return path


def find_commit(model: str, name: str, loading: ModelLoadingConfig) -> str | None:
    """Return the commit of a hub repository that a file of it is read from; None for a folder, and if it is unknown."""
    return None if Path(model).is_dir() else extract_commit_hash(find_file(model, name, loading), None)


def holds_file(model: str, name: str, loading: ModelLoadingConfig) -> bool:
    """Return whether a folder or a hub model has a file, without downloading it."""
    if Path(model).is_dir():
        return (Path(model) / name).is_file()
    return bool(has_file(model, name, revision=loading.revision))
