"""Headless Chromium, driven through the DevTools pipe: real keys, a real mouse, and what the page asked for."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT = 60.0
KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Tab": ("Tab", 9, ""),
    "Space": (" ", 32, " "),
    "ArrowDown": ("ArrowDown", 40, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
}


class Chromium:
    """A browser process."""

    def __init__(self, folder: Path) -> None:
        assert BROWSER is not None
        (child_in, self._write), (self._read, child_out) = os.pipe(), os.pipe()
        # the browser reads descriptor 3 and writes descriptor 4
        high_in, high_out = (fcntl.fcntl(each, fcntl.F_DUPFD, 40) for each in (child_in, child_out))

        def place_pipes() -> None:
            os.dup2(high_in, 3)
            os.dup2(high_out, 4)

        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
        quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio")
        self.process = subprocess.Popen(
            [BROWSER, *flags, *quiet, "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"],
            preexec_fn=place_pipes,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for each in (child_in, child_out, high_in, high_out):
            os.close(each)
        self._next, self._lock = 0, threading.Condition()
        self._answers: dict[int, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        buffer = b""
        while chunk := os.read(self._read, 1 << 20):
            *messages, buffer = (buffer + chunk).split(b"\0")
            for each in messages:
                message = json.loads(each)
                with self._lock:
                    if "id" in message:
                        self._answers[message["id"]] = message
                    else:
                        self.events.append(message)
                    self._lock.notify_all()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        with self._lock:
            self._next += 1
            number = self._next
            message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
            os.write(self._write, json.dumps(message).encode() + b"\0")
            assert self._lock.wait_for(lambda: number in self._answers, TIMEOUT), f"no answer to {method}"
            answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open_tab(self, width: int, height: int = 800, dark: bool = False) -> "Tab":
        """Open a tab with a browser context of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Tab(self, session, width, height, dark)

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Tab:
    """One page, with its console and its requests."""

    def __init__(self, browser: Chromium, session: str, width: int, height: int, dark: bool) -> None:
        self._browser, self._session = browser, session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def _events(self, *methods: str) -> list[dict[str, Any]]:
        own = [each for each in list(self._browser.events) if each.get("sessionId") == self._session]
        return [each["params"] for each in own if each["method"] in methods]

    def console(self) -> list[str]:
        """Return what was written to the console, and every error."""
        found = [str(each) for each in self._events("Runtime.consoleAPICalled", "Runtime.exceptionThrown")]
        return found + [
            f"{each['entry']['text']} {each['entry'].get('url')}" for each in self._events("Log.entryAdded")
        ]

    def requests(self) -> list[str]:
        """Return the addresses that were asked for."""
        return [each["request"]["url"] for each in self._events("Network.requestWillBeSent")]

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, script: str) -> Any:
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a condition holds; a page that is being replaced does not count."""
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            try:
                if self.evaluate(f"Boolean({condition})"):
                    return
            except AssertionError:
                pass
            time.sleep(0.03)
        raise AssertionError(f"never: {condition}; the page: {self.evaluate('document.body.innerText')[:2000]}")

    @contextmanager
    def next_page(self) -> Iterator[None]:
        """Wait for the page that an action leads to."""
        self.evaluate("window.isOld = true")
        yield
        self.wait("!window.isOld && document.readyState === 'complete'")

    def press(self, *keys: str) -> None:
        """Press keys: names of `KEYS`, or characters."""
        for key in keys:
            name, code, text = KEYS.get(key, (key, ord(key[0].upper()), key))
            event = {"key": name, "windowsVirtualKeyCode": code, "code": name if len(name) > 1 else ""}
            self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **event)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def press_control_enter(self) -> None:
        event = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": 2}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def tab_to(self, selector: str, limit: int = 150) -> None:
        """Press Tab until an element has the focus."""
        for _ in range(limit):
            if self.evaluate(f"Boolean(document.activeElement.matches({json.dumps(selector)}))"):
                return
            self.press("Tab")
        raise AssertionError(f"the keyboard does not reach {selector}")

    def _middle(self, selector: str) -> tuple[float, float]:
        script = f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "center", behavior: "instant"}});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        x, y = self.evaluate(script)
        return x, y

    def _mouse(self, kind: str, x: float, y: float, **settings: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **settings)

    def click(self, selector: str) -> None:
        x, y = self._middle(selector)
        self._mouse("mouseMoved", x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self._mouse(kind, x, y, button="left", clickCount=1)

    def drag(self, source: str, target: str) -> None:
        """Drag one element onto another that is in view."""
        x, y = self._middle(source)
        self._mouse("mouseMoved", x, y)
        self._mouse("mousePressed", x, y, button="left", clickCount=1)
        box = self.evaluate(
            f"(() => {{ const b = document.querySelector({json.dumps(target)}).getBoundingClientRect(); "
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for part in (0.3, 0.6, 1.0, 1.0):
            self._mouse("mouseMoved", x + part * (box[0] - x), y + part * (box[1] - y), button="left", buttons=1)
        self._mouse("mouseReleased", box[0], box[1], button="left", clickCount=1)

    def screenshot(self, path: Path, full: bool = True) -> Path:
        result = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(result["data"]))
        return path
