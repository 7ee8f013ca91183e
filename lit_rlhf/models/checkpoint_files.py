"""Checkpoints as they lie on disk: one file, or the folder of shards that FSDP2 writes on request."""

from pathlib import Path
from typing import Any

import torch

from lit_rlhf.errors import UserError


def is_sharded_checkpoint(path: Path) -> bool:
    """Return whether this is a folder of shards."""
    return (path / ".metadata").is_file()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's content on the CPU, without unpickling objects; of a folder of shards, whole weights.

    Of shards the optimizer's state is left out: it is several times as large, and nothing that reads whole weights
    needs it.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not (path.is_file() or is_sharded_checkpoint(path)):
        raise UserError(f"there is no checkpoint {str(path)!r}")
    try:
        content: dict[str, Any] = _read_shards(path) if path.is_dir() else _load(path)
    except Exception as error:
        raise UserError(f"{str(path)!r} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    return content


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_shards(folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    content: dict[str, Any] = {}
    # the public loader wants to be told every weight's shape beforehand
    planner = _EmptyStateDictLoadPlanner(keys={"state_dict"})  # type: ignore[no-untyped-call]
    _load_state_dict(content, FileSystemReader(folder), planner=planner, no_dist=True)
    return {**_load(folder / "meta.pt"), **content}
