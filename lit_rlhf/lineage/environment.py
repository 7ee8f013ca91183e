"""What ran it: git commit, package versions, devices, and the time."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from lit_rlhf.lineage.records import Environment

PACKAGES = (
    *("lit-rlhf", "torch", "lightning", "transformers", "tokenizers", "datasets", "peft", "bitsandbytes", "vllm"),
    *("deepspeed", "torchao", "wandb", "numpy"),
)
GIT_SECONDS = 5.0  # `git status` of a very large repository


def now() -> str:
    """Return the time, UTC, in ISO 8601 with seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_environment(device: torch.device, count: int = 1) -> Environment:
    """Describe this process.

    Args:
        device: that computes.
        count: number of such devices, over all processes.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(device)
    commit, dirty = read_git_state()
    return Environment(commit, dirty, read_versions(), f"{count} x {name}")


def _cpu_name(device: torch.device) -> str:
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)" if device.type == "cpu" else device.type.upper()


@cache
def read_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of packages, those that are installed."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # an optional one
            continue
    return versions


def read_git_state() -> tuple[str, bool]:
    """Return the commit of the working directory's repository, and whether its tracked files differ from it.

    ("", False) without a repository, without git, or where git does not answer in time.
    """
    commit = _git("rev-parse", "HEAD")
    return (commit, bool(_git("status", "--porcelain", "--untracked-files=no"))) if commit else ("", False)


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
