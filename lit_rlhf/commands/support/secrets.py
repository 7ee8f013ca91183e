"""Keep credentials out of everything that a run writes: recipes and command lines hold none, and none is saved.

Recipes and command lines end in config.yaml, checkpoints, loggers, W&B's metadata, shell histories and process lists.
A credential comes from an environment variable or a file.
"""

import re
from collections.abc import Iterator, MutableMapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from lit_rlhf.errors import UserError

REMOVED = "removed"
# last word of a setting's name that makes any text a credential
CREDENTIALS = {
    *("password", "passwd", "passphrase", "passcode", "pwd", "secret", "bearer", "authorization", "auth", "apikey"),
    *("credential", "cookie", "signature", "sig", "jwt"),
}
# words before "key" and "token" that do; with another word the value decides: "text_key" names a column
QUALIFIERS = {
    *("api", "access", "auth", "private", "secret", "service", "account", "encryption", "signing", "session", "bearer"),
    *("refresh", "client", "subscription", "security", "master", "ssh", "openai", "anthropic", "azure", "aws", "google"),
    *("gemini", "cohere", "mistral", "openrouter", "hf", "hub", "huggingface", "github", "gitlab", "wandb", "comet"),
    *("neptune", "perspective", "vllm"),
}
# a column or a special token: a lower-case word, or a token in its brackets
HARMLESS = re.compile(r"[a-z][a-z_]*|[<\[|].*[>\]|]|\W*|[-+.\d]+", re.DOTALL)
KNOWN = re.compile(
    r"\b(?:sk|pk|rk)-[\w-]{16,}|\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_\w{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}|"
    r"\bxox[abprs]-[\w-]{10,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\beyJ[\w-]+\.eyJ[\w-]+\.[\w-]+|"
    r"(?i:\b(?:bearer|basic)) +[\w+/=.~-]{8,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
ADDRESS = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)
FIX = "recipes and command lines are saved and logged: read it from an environment variable or a file"


def is_secret(name: str, value: Any) -> bool:
    """Return whether a setting's value is a credential, by its name, and by the value where a name is ambiguous.

    "api_key" always holds one; "pad_token" and "text_key" do not, unless the value is no token and no plain word.
    """
    if value is None or value == "" or isinstance(value, (bool, float)):
        return False
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rstrip("+")).lower()
    *before, last = re.split(r"[\W_]+", re.sub(r"api[\W_]*key", "api_key", words).strip("_-. ")) or [""]
    last = last if last in CREDENTIALS else last.removesuffix("s")
    if last in CREDENTIALS or (last in ("key", "token") and before and before[-1] in QUALIFIERS):
        return True
    if last == "token" and not before and isinstance(value, str):
        return HARMLESS.fullmatch(value) is None or value.isidentifier()
    return last in ("key", "token") and isinstance(value, str) and HARMLESS.fullmatch(value) is None


def find_secret(name: str, value: Any) -> str | None:
    """Return what is secret in a setting, in words, or None.

    Args:
        name: the setting's own name, without the path to it; "" for an entry of a list.
        value: any YAML value; the entries of lists and mappings under a secret name are secret.
    """
    if isinstance(value, dict):
        found = (find_secret(f"{name}.{key}" if is_secret(name, "x1") else str(key), v) for key, v in value.items())
    elif isinstance(value, list):
        found = (find_secret(name, entry) for entry in value)
    elif is_secret(name, value) or is_secret(name.rpartition(".")[0], value):
        return "is a credential"
    else:
        text = value if isinstance(value, str) else ""
        return "holds a credential" if mask_text(text) != text else None
    return next((each for each in found if each), None)


def mask_text(text: str) -> str:
    """Return a text without user names and passwords in addresses, keys in their queries, and tokens of known forms."""
    return KNOWN.sub(REMOVED, ADDRESS.sub(lambda match: mask_address(match[0]), text))


def mask_address(address: str) -> str:
    """Return an address without its user name and password, and with secrets in its query removed."""
    try:
        parts = urlsplit(address)
    except ValueError:  # no address after all
        return address
    user, at, host = parts.netloc.rpartition("@")
    if at and (":" in user or parts.scheme in ("http", "https", "ws", "wss")):
        address = address.replace(f"{user}@", f"{REMOVED}@", 1) if user != REMOVED else address
    for name, value in parse_qsl(f"{parts.query}&{parts.fragment}"):
        if name.lower() == "key" or is_secret(name, value):
            address = re.sub(rf"([?&#]{re.escape(name)}=)[^&#]+", rf"\1{REMOVED}", address)
    return address


def without_secrets(config: Any, name: str = "") -> Any:
    """Return a copy of a nested configuration in which "removed" stands for every credential."""
    if isinstance(config, dict):
        prefix = f"{name}." if is_secret(name, "x1") else ""
        return {key: without_secrets(value, f"{prefix}{key}") for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(without_secrets(value, name) for value in config)
    if is_secret(name, config) or is_secret(name.rpartition(".")[0], config):
        return REMOVED
    return mask_text(config) if isinstance(config, str) else config


def refuse_secret(setting: str, value: Any, location: str) -> None:
    """Refuse a credential in a setting.

    Args:
        setting: its dotted name.
        value: as YAML.
        location: such as " [recipe.yaml:3]".

    Raises:
        UserError: names the setting, and never the value.
    """
    found = find_secret(setting.rpartition(".")[2], value)
    if found:
        raise UserError(f"{setting}: this {found}, and {FIX}{location}")
