"""Push a model folder to the Hugging Face hub; what can be checked is checked before training starts."""

import os
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UserError

ENDPOINT_VARIABLE = "HF_ENDPOINT"
CLIENTS = ("huggingface_hub", "httpx", "httpx2")  # whose exceptions say that the hub refuses or does not answer


def make_api() -> Any:
    """Return the client of the hub that HF_ENDPOINT names, by default huggingface.co."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get(ENDPOINT_VARIABLE) or None)


def check_push(repo: str) -> None:
    """Refuse a push that the hub would refuse; one request.

    Raises:
        UserError: the name is no name of a repository, there is no token, the hub does not know it, or its owner does
            not belong to the organization.
        huggingface_hub.errors.HfHubHTTPError, or an error of httpx: no answer.
    """
    check_repo_name(repo)
    from huggingface_hub import get_token, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    if is_offline_mode():
        raise UserError(f"push: {repo} cannot be pushed with HF_HUB_OFFLINE=1; unset it, or leave push out")
    if get_token() is None:
        raise UserError("push: there is no token of the Hugging Face hub; log in with `hf auth login`, or set HF_TOKEN")
    try:
        user = make_api().whoami()
    except HfHubHTTPError as problem:
        if problem.response.status_code not in (401, 403):
            raise
        raise UserError(
            "push: the Hugging Face hub refuses the token; log in again with `hf auth login`, or correct HF_TOKEN"
        ) from None
    namespace = repo.split("/")[0]
    names = [user["name"], *(each["name"] for each in user.get("orgs", []))]
    if namespace.lower() not in (name.lower() for name in names):
        raise UserError(
            f"push: the token is of {user['name']}, who is not in {namespace}; it may push to {', '.join(names)}"
        )
    if (user.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"push: the token of {user['name']} may only read; create one that may write")


def check_repo_name(repo: str) -> None:
    """Refuse what is not OWNER/NAME.

    Raises:
        UserError: names the rule.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as problem:
        raise UserError(f"push: {problem}") from None
    if repo.count("/") != 1:
        raise UserError(f"push: {repo!r} must be OWNER/NAME, such as my-org/assistant")


def push_folder(folder: Path, repo: str, private: bool, message: str) -> str:
    """Create the repository if it is new, upload every file of a folder, and return the address.

    Raises:
        UserError: the hub refuses, or does not answer; the folder is complete.
    """
    api = make_api()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as problem:
        if type(problem).__module__.split(".")[0] not in CLIENTS:
            raise
        reason = " ".join(str(problem).split()).rstrip(". ") or type(problem).__name__
        raise UserError(
            f"push: {reason[:300]}; the model is complete in {folder}: push it with `hf upload {repo} {folder}`"
        ) from None
    return str(url)
