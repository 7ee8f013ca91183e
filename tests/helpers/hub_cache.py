"""A model's configuration as a download from the hub leaves it: what a machine with a network would find there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from transformers import PretrainedConfig

COMMIT = "0" * 40


@contextmanager
def in_hub_cache(name: str, config: PretrainedConfig) -> Iterator[None]:
    """Keep a configuration in the hub's cache under a hub name, without weights."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    config.save_pretrained(folder / "snapshots" / COMMIT)
    try:
        yield
    finally:
        shutil.rmtree(folder)
