"""Checks of the checkpoint, made before anything is loaded, and the writing of files."""

import re
from pathlib import Path

from lit_rlhf.errors import UserError

CHECKPOINT_KEYWORDS = ("best", "last", "hpc")  # Lightning finds the file itself


def write_output(text: str, path: Path, option: str = "--out") -> None:
    """Write the file that an option of a command names, and create its folder.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise UserError(f"{option}: cannot write {path} ({problem.strerror})") from None


def check_checkpoint(path: str, module: str) -> None:
    """Refuse a checkpoint that is missing, unreadable, or known to be of a module other than `module`.

    A checkpoint that does not name its module passes: loading its weights decides.

    Args:
        path: a file, a folder of shards, a URL, or one of Lightning's keywords.
        module: class path of the module that will load it.

    Raises:
        UserError: names the checkpoint and both modules.
    """
    if path in CHECKPOINT_KEYWORDS or "://" in path or path.startswith("registry") or Path(path).is_dir():
        return
    # imported here: --help needs neither torch nor transformers
    from lit_rlhf.checkpoint_files import DamagedCheckpoint
    from lit_rlhf.checkpoints import read_metadata
    from lit_rlhf.models.export import CHECKPOINT_KEY

    try:
        checkpoint = read_metadata(Path(path))
    except DamagedCheckpoint as problem:
        raise UserError(f"ckpt_path: {problem}") from None
    if checkpoint is None:
        return
    owner = (checkpoint.get("hyper_parameters") or {}).get("_class_path", module)
    if owner == module:  # this library's modules store their class name, without the package
        owner = (checkpoint.get(CHECKPOINT_KEY) or {}).get("module", module.rsplit(".", 1)[-1])
        module = module.rsplit(".", 1)[-1]
    if owner != module:
        raise UserError(f"ckpt_path: {path} is a checkpoint of {owner}, and this run is of {module}")


def first_mismatch(problem: str) -> str:
    """Return the first line of torch's error about a state dict that does not fit."""
    lines = [line.strip() for line in problem.splitlines() if line.strip()]
    text = lines[1] if len(lines) > 1 else problem
    return re.sub(r"(Missing|Unexpected) key\(s\) in state_dict: (\"[^\"]+\").*", r"\1 weight \2", text).rstrip(". ")
