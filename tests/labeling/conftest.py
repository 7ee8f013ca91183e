"""A database of small tasks, an app on it, and a client that behaves like a browser."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra [label] is not installed")
pytest.importorskip("uvicorn", reason="the extra [label] is not installed")

from lit_rlhf.labeling.database import Database, Kind, NewTask
from lit_rlhf.labeling.pages import read_instructions
from lit_rlhf.labeling.server import LabelSettings, create_label_app


def make_task(number: int, count: int = 4, gold: dict[str, Any] | None = None, **content: Any) -> NewTask:
    prompt = f"question {number}?"
    completions = [f"answer {n} to {number}" for n in range(count)]
    own = {"fields": {"prompt": prompt}, "prompt": [{"role": "user", "content": prompt}], "completions": completions}
    return NewTask(f"task-{number}", own | content, gold, f"tasks.jsonl:{number}")


@pytest.fixture
def database(tmp_path: Path) -> Database:
    """An empty database."""
    return Database(tmp_path / "labels.db")


Fill = Callable[..., Database]


@pytest.fixture
def fill(database: Database) -> Fill:
    """Add tasks of a kind, each with that many labels."""

    def add(kind: Kind, count: int = 3, labels: int = 1, completions: int | None = None, **content: Any) -> Database:
        size = {"rank": 4, "compare": 2, "rate": 1, "demonstrate": 0}[kind] if completions is None else completions
        database.add_tasks(kind, [make_task(n, size, **content) for n in range(count)], [labels] * count)
        return database

    return add


class Browser:
    """Follows links and sends forms as a browser without JavaScript."""

    def __init__(self, app: Any, base: str = "http://127.0.0.1") -> None:
        from starlette.testclient import TestClient

        self.client = TestClient(app, base_url=base)
        self.page = ""
        self.status = 0

    def open(self, path: str = "/") -> str:
        return self._keep(self.client.get(path))

    def hidden(self) -> dict[str, str]:
        """Return the hidden fields of the task's form."""
        form = self.page.partition('id="task-form"')[2].partition("</form>")[0]
        return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', form))

    def send(self, path: str = "/answer", **fields: Any) -> str:
        return self._keep(self.client.post(path, data=self.hidden() | fields))

    def undo(self) -> str:
        form = self.page.partition('action="/undo"')[2].partition("</form>")[0]
        return self._keep(self.client.post("/undo", data=dict(re.findall(r'name="(\w+)" value="([^"]*)"', form))))

    def _keep(self, response: Any) -> str:
        self.page, self.status = response.text, response.status_code
        return self.page


@pytest.fixture
def browse(database: Database) -> Callable[..., Browser]:
    """Open the app as its only labeler."""

    def start(kind: Kind, instructions: str | None = None) -> Browser:
        only = database.add_labeler("ann")
        hosts = ("127.0.0.1",)
        return Browser(
            create_label_app(database, LabelSettings(kind, instructions or read_instructions(kind), only, hosts))
        )

    return start
