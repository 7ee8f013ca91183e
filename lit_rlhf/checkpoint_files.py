"""Open Lightning checkpoints: one file, or the folder of shards that FSDP2 writes on request."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from lit_rlhf.errors import UserError

SHARD_INDEX = ".metadata"  # PyTorch's index of the shards, written when all of them are
UNSHARDED_FILE = "meta.pt"  # what Lightning stores next to the shards, written last


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete or corrupt, or a file that is no checkpoint."""


class ContainsObjects(UserError):
    """A checkpoint that holds pickled objects besides tensors and plain values."""


def is_sharded_checkpoint(path: Path) -> bool:
    """Return whether `path` is a folder of shards."""
    return (path / SHARD_INDEX).is_file()


def open_checkpoint(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Open a checkpoint without unpickling objects; of a folder of shards, the part that is not sharded.

    Args:
        path: a file, or a folder of shards.
        device: "cpu" maps tensors from the file, so their values are read on first use; "meta" never reads them.

    Raises:
        DamagedCheckpoint: it is missing, incomplete, unreadable, or no checkpoint of Lightning.
        ContainsObjects: it holds more than tensors and plain values.
    """
    file = path / UNSHARDED_FILE if path.is_dir() else path
    if not path.exists():
        raise DamagedCheckpoint(f"there is no checkpoint {path}")
    if path.is_dir() and not (file.is_file() and is_sharded_checkpoint(path)):
        raise DamagedCheckpoint(f"the folder {path} is no complete checkpoint of shards")
    if not zipfile.is_zipfile(file):  # the format of torch.save
        raise DamagedCheckpoint(f"{path} is no readable checkpoint (truncated, or not written by torch.save)")
    try:
        content = torch.load(file, map_location=device, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ContainsObjects(f"{path} holds objects other than tensors and plain values") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} is no readable checkpoint ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict) or "loops" not in content:
        raise DamagedCheckpoint(f"{path} is no Lightning checkpoint; it holds no loops")
    return content


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's content on the CPU; of a folder of shards, with full weights.

    The optimizer state of shards is left out: it is several times as large as the weights, and no caller needs it.

    Raises:
        UserError: see `open_checkpoint`.
    """
    content = open_checkpoint(path)
    return content | _read_sharded_weights(path) if path.is_dir() else content


def read_weight_names(path: Path) -> set[str]:
    """Return the names of a checkpoint's weights, without reading them.

    Raises:
        UserError: see `open_checkpoint`.
    """
    if not is_sharded_checkpoint(path):
        return set(open_checkpoint(path, "meta")["state_dict"])
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    names = FileSystemReader(path).read_metadata().state_dict_metadata
    return {name.removeprefix("state_dict.") for name in names if name.startswith("state_dict.")}


def _read_sharded_weights(folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    content: dict[str, Any] = {}
    # the public loader needs tensors of the right shapes to load into
    planner = _EmptyStateDictLoadPlanner(keys={"state_dict"})  # type: ignore[no-untyped-call]
    _load_state_dict(content, FileSystemReader(folder), planner=planner, no_dist=True)
    return content
