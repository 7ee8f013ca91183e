"""Weights & Biases without a login: offline, instead of a prompt that blocks the run."""

import netrc
import os
from collections.abc import MutableMapping
from pathlib import Path
from urllib.parse import urlsplit


def prepare_wandb(environ: MutableMapping[str, str]) -> None:
    """Set WANDB_MODE=offline if there is neither a login nor a chosen mode, and print one line about it.

    A login is WANDB_API_KEY or an entry of the netrc file, which `wandb login` writes.
    """
    if environ.get("WANDB_MODE") or environ.get("WANDB_API_KEY") or has_netrc_entry(environ):
        return
    environ["WANDB_MODE"] = "offline"
    if environ.get("LOCAL_RANK", "0") == "0":
        print("wandb: no login found, so this run is recorded offline; wandb sync uploads it after wandb login")


def has_netrc_entry(environ: MutableMapping[str, str]) -> bool:
    """Return whether the netrc file has an entry for the wandb host."""
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    path = Path(environ.get("NETRC") or Path(environ.get("HOME") or os.path.expanduser("~")) / ".netrc")
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
