"""A stand-in for the Hugging Face hub on loopback: who the token is of, new repositories, and commits of files."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.helpers.loopback import Call, serve_calls

TOKEN = "hf_" + "abcdefghijklmnopqrst" * 2  # in the form of a real one, so that a leak is found
USER = {"name": "ada", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}


class HubServer:
    """A running stand-in.

    Attributes:
        user: its answer to whoami; None: the token is refused.
        files: repository -> path -> bytes, as committed.
        created: the bodies of the requests for new repositories.
        fails: path of a request -> status that it is answered with.
    """

    def __init__(self, url: str) -> None:
        self.url, self.user, self.fails = url, dict[str, Any](USER), dict[str, int]()
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Return status and JSON of the answer to a request."""
        if path in self.fails:
            return self.fails[path], {"error": "no"}
        if path == "/api/whoami-v2":
            return (200, self.user) if self.user else (401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            repo = f"{self.created[-1]['organization']}/{self.created[-1]['name']}"
            self.files[repo] = {}
            return 200, {"url": f"{self.url}/{repo}", "id": repo}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        repo, _, action = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if action == "preupload":
            paths = [each["path"] for each in json.loads(body)["files"]]
            return 200, {"files": [{"path": each, "uploadMode": "regular", "shouldIgnore": False} for each in paths]}
        if action != "commit":
            return 404, {"error": "Repository not found"}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/0", "commitOid": "0"}


@contextmanager
def serve_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Run a stand-in, with the environment of a user who is logged in to it."""

    def answer(call: Call) -> tuple[int, Any]:
        hub.tokens.append(call.authorization)
        return hub.answer(call.path, call.body)

    with serve_calls(answer) as url:
        hub = HubServer(url)
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # read when it was imported
        yield hub
