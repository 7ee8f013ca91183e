"""Which weights a folder or a hub name stands for: what a resumed run must find unchanged."""

import hashlib
from pathlib import Path

from lit_rlhf.models.loading import load_config
from lit_rlhf.models.options import ModelOptions

DECIDING = ("config.json", "*.safetensors", "*.bin")  # what decides what a model computes


def model_identity(model: str, options: ModelOptions) -> str:
    """Return what tells a model from another of the same name.

    A folder is known by the SHA-256 of its weight files and config.json, all bytes (about a second a GB, read as a
    stream; dates and sizes say nothing on another machine), a checkpoint by its own. A model of the hub is known by
    its commit.
    """
    folder = Path(model)
    if folder.is_file():
        with open(folder, "rb") as file:
            return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
    if not folder.is_dir():
        commit = getattr(load_config(model, options), "_commit_hash", None)
        return f"commit {commit}" if commit else f"hub name {model}"
    whole = hashlib.sha256()
    for path in sorted({path for pattern in DECIDING for path in folder.glob(pattern)}):
        with open(path, "rb") as file:
            whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256 {whole.hexdigest()}"
