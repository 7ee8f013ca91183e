"""Labelers who click through the pages over HTTP, also while the server is killed and started again."""

import html
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

Judge = Callable[[str, list[str]], list[int]]  # prompt and the outputs as shown -> a number for each


class LabelServer:
    """`lit-rlhf label` as a process of its own."""

    def __init__(self, args: Sequence[str], folder: Path, port: int = 0) -> None:
        self.args, self.folder, self.port = list(args), folder, port
        self.start()

    def start(self, *more: str) -> None:
        """Start it, and wait for its links."""
        command = [sys.executable, "-m", "lit_rlhf", "label", *self.args, *more, f"--port={self.port}"]
        settings = {"cwd": self.folder, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, **settings)
        assert self.process.stdout is not None
        self.output = ""
        for line in self.process.stdout:
            self.output += line
            if line.startswith("stop:"):
                break
        assert "stop:" in self.output, self.output
        self.links = dict(re.findall(r"^(\S+): (http\S+)$", self.output, re.MULTILINE))
        addresses = re.findall(r"http://127\.0\.0\.1:(\d+)", self.output)
        self.port = int(addresses[0])

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> str:
        """End it as Ctrl+C does; return its last lines."""
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=60)[0]


class ScriptedLabeler:
    """One person: opens the page, ranks by `judge`, sends; sends again where the server was gone."""

    def __init__(self, link: str, judge: Judge, patience: float = 120.0) -> None:
        self.link, self.judge, self.patience = link, judge, patience
        self.client = httpx.Client(timeout=60.0, follow_redirects=False, trust_env=False)
        self.base = re.match(r"http://[^/]+", link)[0]  # type: ignore[index]
        self.sent: list[tuple[str, str]] = []  # task's prompt and lease of each answer that was accepted
        self.page_seconds: list[float] = []

    def request(self, method: str, url: str, **settings: object) -> httpx.Response:
        """Send a request until the server answers."""
        end = time.monotonic() + self.patience
        while True:
            try:
                begin = time.perf_counter()
                response = self.client.request(method, url, **settings)  # type: ignore[arg-type]
                self.page_seconds.append(time.perf_counter() - begin)
                return response
            except httpx.TransportError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def work(self, limit: int | None = None) -> None:
        """Answer until nothing is left, or `limit` answers."""
        if "/login/" in self.link:
            assert self.request("GET", self.link).status_code == 200
        while limit is None or len(self.sent) < limit:
            page = self.request("GET", f"{self.base}/").text
            if "All done" in page:
                return
            texts = [
                html.unescape(each) for each in re.findall(r'<pre class="text" dir="auto">\n(.*?)</pre>', page, re.S)
            ]
            form = page.partition('id="task-form"')[2].partition("</form>")[0]
            fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', form))
            count = form.count("<article")
            prompt, outputs = texts[-count - 1], texts[-count:]
            numbers = self.judge(prompt, outputs)
            fields |= {f"rank-{place}": str(number) for place, number in enumerate(numbers)} | {"action": "submit"}
            response = self.request("POST", f"{self.base}/answer", data=fields)
            assert response.status_code == 303, response.text
            self.sent.append((prompt, fields["lease"]))


def work_together(labelers: Sequence[ScriptedLabeler]) -> None:
    """Let all work at once."""
    failures: list[BaseException] = []

    def run(labeler: ScriptedLabeler) -> None:
        try:
            labeler.work()
        except BaseException as problem:
            failures.append(problem)

    threads = [threading.Thread(target=run, args=(labeler,)) for labeler in labelers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
