"""Weights & Biases without a login or a network: offline, instead of a prompt or a wait that blocks the run."""

import netrc
import os
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from ssl import SSLError
from threading import Thread
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

from lit_rlhf.commands.support.console import terminal_width, wrap_words
from lit_rlhf.commands.support.setting_paths import get_class_name
from lit_rlhf.errors import UserError

TIMEOUT = 5.0  # seconds that the server has for its first answer
# arguments of a WandbLogger -> the setting of W&B that checks them
CHECKED = {"project": "project", "id": "run_id", "version": "run_id", "entity": "entity", "name": "run_name"}


def prepare_loggers(loggers: Any, setting: str, environ: MutableMapping[str, str]) -> None:
    """Call `prepare_wandb` for every WandbLogger among the settings of a logger, or of several.

    Args:
        loggers: value of the setting.
        setting: its name.
        environ: see `prepare_wandb`.
    """
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if is_wandb(logger):
            arguments = logger.get("init_args") or {}
            prepare_wandb(environ, setting, {**arguments, **(logger.get("dict_kwargs") or {})})


def prepare_wandb(environ: MutableMapping[str, str], setting: str, logger: Mapping[str, Any]) -> None:
    """Refuse what W&B would refuse; record offline, with one line about it, if there is no login or no network.

    A mode of the user's (WANDB_MODE, `mode` or `offline` of the logger, a settings file of W&B) is left alone.

    Args:
        environ: WANDB_MODE is set in it.
        setting: the setting that holds the WandbLogger.
        logger: the arguments of the WandbLogger.

    Raises:
        UserError: names the argument.
    """
    import wandb  # slow to import
    import wandb.util

    wandb.util.pd_available = False  # else the first table imports pandas, 0.4 s, to see that it is no data frame
    settings = wandb.Settings()
    home = Path(environ.get("HOME") or os.path.expanduser("~"))
    folder = Path(environ.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb")
    try:
        settings.settings_system = str(folder / "settings")
        settings.update_from_system_settings()
        settings.update_from_env_vars({name: value for name, value in environ.items() if value})
    except (wandb.Error, ValueError) as problem:
        raise UserError(f"Weights & Biases refuses its own settings, WANDB_* or {folder}: {problem}") from None
    for name, field in CHECKED.items():
        try:
            wandb.Settings(**{field: logger.get(name)})
        except (wandb.Error, ValueError) as problem:
            raise UserError(f"{setting}.{name}: {problem}") from None
    if "mode" in settings.model_fields_set or logger.get("offline") or logger.get("mode"):
        return
    proxies = {"http": settings.http_proxy, "https": settings.https_proxy}
    if not (
        settings.api_key or environ.get("WANDB_IDENTITY_TOKEN_FILE") or has_netrc_entry(environ, settings.base_url)
    ):
        reason = "no login found"
    elif not is_reachable(settings.base_url, {name: proxy for name, proxy in proxies.items() if proxy}):
        reason = f"no answer from {settings.base_url} within {TIMEOUT:g} s"
    else:
        return
    environ["WANDB_MODE"] = "offline"
    environ.setdefault("WANDB_SILENT", "true")  # the line says it all
    if environ.get("LOCAL_RANK", "0") == "0":
        line = f"wandb: {reason}, so this run is recorded offline; wandb sync uploads it after wandb login"
        print(wrap_words(line, terminal_width(sys.stdout)))


def start_service(loggers: Any, environ: MutableMapping[str, str]) -> None:
    """Start W&B's own process in the background, if there is a WandbLogger among the settings of the loggers.

    It takes a quarter of a second, in which the models are read. Where it fails, the run says so when it starts.

    Args:
        loggers: see `prepare_loggers`, which goes before.
        environ: of this process; later changes of it are not seen by W&B.
    """
    found = [each for each in (loggers if isinstance(loggers, list) else [loggers]) if is_wandb(each)]
    if not found or environ.get("LOCAL_RANK", "0") != "0" or environ.get("WANDB_MODE") == "disabled":
        return
    if any((logger.get("init_args") or {}).get("offline") for logger in found):
        environ["WANDB_MODE"] = "dryrun"  # as Lightning does when the run starts

    def start() -> None:
        import wandb

        with suppress(Exception):
            wandb.setup()

    Thread(target=start, daemon=True).start()


def is_wandb(logger: Any) -> bool:
    """Return whether the settings of a logger are a WandbLogger's."""
    return get_class_name(logger) == "WandbLogger"


def has_netrc_entry(environ: Mapping[str, str], base_url: str) -> bool:
    """Return whether the netrc file, which `wandb login` writes, has an entry for the server."""
    parts = urlsplit(base_url)
    path = Path(environ.get("NETRC") or Path(environ.get("HOME") or os.path.expanduser("~")) / ".netrc")
    try:
        entries = netrc.netrc(str(path))
        return any(entries.authenticators(host) for host in (parts.netloc, parts.hostname or ""))
    except (OSError, netrc.NetrcParseError):
        return False


def is_reachable(address: str, proxies: dict[str, str]) -> bool:
    """Return whether an HTTP server answers at an address, whatever it answers.

    Args:
        address: base URL.
        proxies: by scheme; those of the environment if there are none.
    """
    answered: list[bool] = []

    def ask() -> None:
        try:
            build_opener(ProxyHandler(proxies or None)).open(address, timeout=TIMEOUT).close()
        except HTTPError:
            pass
        except URLError as problem:
            if not isinstance(problem.reason, SSLError):  # W&B may know the certificate
                return
        except Exception:  # no HTTP, or the connection is closed: no server of W&B
            return
        answered.append(True)

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)  # the time-out of `open` excludes the name server, and is per read
    return bool(answered)
