"""Keep credentials out of the files that a run writes."""

from typing import Any

SECRET_NAMES = ("token", "key", "auth")
SECRET_ENDINGS = ("api_key", "password", "secret", "auth_token", "access_token", "hf_token", "credentials")


def without_secrets(config: Any) -> Any:
    """Return a copy of a nested configuration in which the value of every credential is "removed"."""
    if isinstance(config, dict):
        return {key: "removed" if value and is_secret(key) else without_secrets(value) for key, value in config.items()}
    if isinstance(config, list):
        return [without_secrets(value) for value in config]
    return config


def is_secret(name: str) -> bool:
    """Return whether a setting holds a credential, by its name: "api_key" does, "pad_token" does not."""
    return name in SECRET_NAMES or name.endswith(SECRET_ENDINGS)
