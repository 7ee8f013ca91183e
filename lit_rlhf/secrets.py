"""Keep credentials out of everything that a run writes: recipes and command lines hold none, and none is saved.

Recipes and command lines end in config.yaml, checkpoints, loggers, W&B's metadata, shell histories and process lists.
A credential comes from an environment variable or a file.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl, urlsplit

REMOVED = "removed"
FIX = "recipes and command lines are saved and logged: take it from an environment variable or a file"
# last word of a setting's name that makes any value a credential
CREDENTIALS = {
    *("password", "passwd", "passphrase", "passcode", "pwd", "secret", "bearer", "authorization", "credential"),
    *("cookie", "jwt"),
}
# words before "key", "token" and "auth" that do so; with another word the value decides: "text_key" names a column
QUALIFIERS = {
    *("api", "access", "auth", "private", "secret", "service", "account", "encryption", "signing", "session", "bearer"),
    *(
        "refresh",
        "client",
        "subscription",
        "security",
        "master",
        "ssh",
        "openai",
        "anthropic",
        "azure",
        "aws",
        "google",
    ),
    *("gemini", "cohere", "mistral", "openrouter", "hf", "hub", "huggingface", "github", "gitlab", "wandb", "comet"),
    *("neptune", "perspective", "vllm"),
}
QUERY = {"key", "sig", "signature"}  # parameters of an address that are secret whatever their value
BRACKETED = re.compile(r"[<\[|].*[>\]|]|\W*|[-+.\d]+", re.DOTALL)  # a special token, or a number
WORD = re.compile(r"[a-z][a-z_]*")  # such as the name of a column
KNOWN = re.compile(  # forms of widely used services
    r"\b(?:sk|pk|rk)-[\w-]{16,}|\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_\w{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}|"
    r"\bxox[abprs]-[\w-]{10,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\beyJ[\w-]+\.eyJ[\w-]+\.[\w-]+|"
    r"\A(?i:bearer|basic) +(?![a-z]+\Z)\S{6,}\Z|-----BEGIN [A-Z ]*PRIVATE KEY-----.*",
    re.DOTALL,
)
ASSIGNMENT = re.compile(r"""((?P<name>[\w.-]+)['"]?\s?[=:]\s?['"])(?P<value>[^'"]*)(['"])""")
ADDRESS = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)


def without_secrets(config: Any, path: Sequence[str] = ()) -> Any:
    """Return a copy of a nested configuration in which "removed" stands for every credential.

    Args:
        config: any YAML value.
        path: names of the settings that lead to it.
    """
    if isinstance(config, dict):
        return {key: without_secrets(value, (*path, str(key))) for key, value in config.items()}
    if isinstance(config, list):
        return [without_secrets(value, path) for value in config]
    if is_secret(path, config):
        return REMOVED
    return mask_text(config) if isinstance(config, str) else config


def drop_secrets(config: Any, path: Sequence[str] = ()) -> Any:
    """Return a copy of a nested configuration without the settings that hold a credential, which are defaults."""
    if isinstance(config, dict):
        inner = {key: (value, (*path, str(key))) for key, value in config.items()}
        return {
            key: drop_secrets(value, names) for key, (value, names) in inner.items() if not holds_secret(value, names)
        }
    return [drop_secrets(value, path) for value in config] if isinstance(config, list) else config


def holds_secret(value: Any, path: Sequence[str]) -> bool:
    """Return whether a setting's plain value, or an entry of its list, is or contains a credential."""
    if isinstance(value, list):
        return any(holds_secret(each, path) for each in value)
    return not isinstance(value, dict) and bool(without_secrets(value, path) != value)


def is_secret(path: Sequence[str], value: Any) -> bool:
    """Return whether a setting's plain value is a credential, by its name, and by the value where that is ambiguous.

    "api_key" always holds one, and so does all below "credentials"; "pad_token" and "text_key" do unless their value is
    a special token or a plain word.
    """
    if value in (None, "", REMOVED) or isinstance(value, bool):
        return False
    for position, name in enumerate(path):
        is_class = {"class_path", "init_args"} & set(path[position + 1 :])  # the settings below have names of their own
        if names_credential(name) and not is_class:
            return True
    *before, last = split_name(path[-1]) if path else [""]
    if last not in ("key", "token", "auth") or not isinstance(value, str) or BRACKETED.fullmatch(value):
        return False
    return (last == "token" and not before) or WORD.fullmatch(value) is None


def names_credential(name: str) -> bool:
    """Return whether a setting of this name always holds a credential."""
    *before, last = split_name(name)
    return last in CREDENTIALS or (last in ("key", "token", "auth") and bool(before) and before[-1] in QUALIFIERS)


def split_name(name: str) -> list[str]:
    """Return the words of a setting's name, in lower case, the last in the singular: "openaiAPIKeys+" has three."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    words = re.sub(r"apikey", "api_key", name).strip("_-+. ")
    *before, last = re.split(r"[\W_]+", words)
    return [*before, last.removesuffix("s")]


def mask_text(text: str) -> str:
    """Return a text without user names and passwords in addresses, keys in their queries, and known forms of tokens."""
    return KNOWN.sub(REMOVED, ADDRESS.sub(lambda match: mask_address(match[0]), text))


def mask_message(text: str) -> str:
    """Return an error message without credentials, such as in `Namespace(api_key='...')`."""

    def mask(match: re.Match[str]) -> str:
        return f"{match[1]}{REMOVED}{match[4]}" if is_secret([match["name"]], match["value"]) else match[0]

    return mask_text(ASSIGNMENT.sub(mask, text))


def mask_address(address: str) -> str:
    """Return an address without its user name and password, and without the credentials in its query."""
    try:
        parts = urlsplit(address)
    except ValueError:  # no address after all
        return address
    user, at, _ = parts.netloc.rpartition("@")
    if at and (":" in user or parts.scheme in ("http", "https", "ws", "wss")):
        address = address.replace(f"{user}@", f"{REMOVED}@", 1)
    for name, value in (*parse_qsl(parts.query), *parse_qsl(parts.fragment)):
        if name.lower() in QUERY or is_secret([name], value):
            address = re.sub(rf"([?&#]{re.escape(name)}=)[^&#]+", rf"\1{REMOVED}", address)
    return address


class MaskedHelp(argparse.ArgumentParser):
    """A parser whose help shows no credential, which can be a default."""

    def format_help(self) -> str:
        """Return the help."""
        text = super().format_help()
        for action in self._actions:
            if holds_secret(action.default, action.dest.split(".")):
                text = re.sub(r"\s+".join(map(re.escape, str(action.default).split())), REMOVED, text)
        return mask_text(text)
