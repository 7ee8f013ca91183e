"""`lit-rlhf fit`, `validate` and `test`: Lightning's CLI on recipes."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_rlhf.commands.places import Places
from lit_rlhf.commands.quiet import quiet
from lit_rlhf.commands.recipes import resolve
from lit_rlhf.errors import UserError


def run(command: str, args: list[str]) -> int:
    """Run one of the Trainer's methods as the recipes and arguments say; return the exit code.

    Raises:
        UserError: whatever of the recipes, the arguments or the data the user can mend.
    """
    quiet()
    args, files = resolve_recipes(args)
    places = Places(files, args)
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)  # a class_path may name the user's own file; last, so that it shadows no package
    from lit_rlhf.commands.lightning_cli import RecipeCLI

    handler = signal.getsignal(signal.SIGINT)
    try:
        return RecipeCLI.start(command, args, places)
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored after an interrupt


def resolve_recipes(args: list[str]) -> tuple[list[str], list[Path]]:
    """Replace every recipe name after `-c` or `--config` by its file; return the arguments and the files.

    Raises:
        UserError: no such file and no such recipe, or nothing after `-c`.
    """
    resolved: list[str] = []
    files: list[Path] = []
    words = iter(args)
    for word in words:
        flag, _, name = word.partition("=")
        if flag not in ("-c", "--config"):
            resolved.append(word)
            continue
        name = name or next(words, "")
        if not name:
            raise UserError(f"{flag} needs the name of a recipe or a file; lit-rlhf recipes ls lists the recipes")
        files.append(resolve(name))
        resolved += [flag, str(files[-1])]
    return resolved, files


def without_checkpoint(args: list[str]) -> Iterator[str]:
    """Yield the arguments but for `--ckpt_path`: what a command to resume starts from."""
    words = iter(args)
    for word in words:
        if word == "--ckpt_path":
            next(words, None)
        elif not word.startswith("--ckpt_path="):
            yield word


def check_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be written to.

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


def without_secrets(config: Any) -> Any:
    """Return a copy of a nested configuration whose keys and passwords are blanked."""
    if isinstance(config, dict):
        return {key: "removed" if value and is_secret(key) else without_secrets(value) for key, value in config.items()}
    if isinstance(config, list):
        return [without_secrets(value) for value in config]
    return config


def is_secret(name: str) -> bool:
    """Whether a setting's name says that its value is a credential ("pad_token" is none)."""
    return name in ("token", "key", "auth") or name.endswith(
        ("api_key", "password", "secret", "auth_token", "access_token", "hf_token", "credentials")
    )
