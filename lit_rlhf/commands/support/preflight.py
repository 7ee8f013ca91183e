"""What a run reads and writes on disk, checked before anything is loaded: the output folder and the checkpoint."""

import os
import pickle
import re
from pathlib import Path

import torch

from lit_rlhf.errors import UserError

CHECKPOINT_WORDS = ("best", "last", "hpc")  # Lightning finds the file itself


def check_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be written to; creates it where it is missing.

    Raises:
        UserError: names the folder and the setting.
    """
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise UserError(
            f"cannot write to the output folder {folder} ({problem.strerror}): set trainer.default_root_dir to another"
        ) from None


def write_out(text: str, path: Path) -> None:
    """Write what a command was asked for under `--out`, with the folder it lies in.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise UserError(f"--out: cannot write {path} ({problem.strerror})") from None


def check_checkpoint(path: str, module: str) -> None:
    """Refuse a checkpoint that is missing, unreadable, or known to be of another module than `module`.

    A checkpoint that does not say whose it is passes: loading its weights decides.

    Args:
        path: as given: a file, a folder (sharded), a URL, or one of Lightning's own words.
        module: the class path of the module that would load it.

    Raises:
        UserError: names the checkpoint and both modules.
    """
    if path in CHECKPOINT_WORDS or "://" in path or path.startswith("registry") or Path(path).is_dir():
        return
    if not Path(path).is_file():
        raise UserError(f"ckpt_path: no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # holds more than tensors and plain values: Lightning's loader decides
        return
    except (RuntimeError, EOFError, OSError, ValueError) as problem:
        raise UserError(f"ckpt_path: {path} is no readable checkpoint ({problem})") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"ckpt_path: {path} is no Lightning checkpoint; it holds no state_dict")
    from lit_rlhf.models.export import CHECKPOINT_KEY  # here, for --help needs no transformers

    owner = (checkpoint.get("hyper_parameters") or {}).get("_class_path", module)
    if owner == module:  # as the modules here say it, without the package
        owner = (checkpoint.get(CHECKPOINT_KEY) or {}).get("module", module.rsplit(".", 1)[-1])
        module = module.rsplit(".", 1)[-1]
    if owner != module:
        raise UserError(f"ckpt_path: {path} is a checkpoint of {owner}, and this run is of {module}")


def first_mismatch(problem: str) -> str:
    """Return the first of torch's complaints about a state dict that does not fit."""
    lines = [line.strip() for line in problem.splitlines() if line.strip()]
    text = lines[1] if len(lines) > 1 else problem
    return re.sub(r"(Missing|Unexpected) key\(s\) in state_dict: (\"[^\"]+\").*", r"\1 weight \2", text).rstrip(". ")
