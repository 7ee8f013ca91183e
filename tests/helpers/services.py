"""A fake HTTP service on loopback with scripted replies; it records its requests."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """One reply of the service."""

    body: Any = None  # JSON, or raw bytes
    status: int = 200
    headers: dict[str, str] = {}
    delay: float = 0.0
    hang_up: bool = False
    drip: float = 0.0  # seconds between two bytes of the body


class Request(NamedTuple):
    """One recorded request."""

    path: str
    headers: dict[str, str]
    payload: Any
    time: float


class Service:
    """A running service: its address and the requests so far."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[Request] = []


class Server(ThreadingHTTPServer):
    """A server whose queue holds every connection of a test: of more than five, Linux delays or resets some."""

    daemon_threads = True
    request_queue_size = 128


@contextmanager
def serve(answer: Callable[[Request, int], Reply]) -> Iterator[Service]:
    """Run a service; `answer` gets a request and the number of earlier requests with the same payload."""
    counts: dict[str, int] = {}
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply_to(None)

        def do_POST(self) -> None:
            self.reply_to(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply_to(self, payload: Any) -> None:
            request = Request(self.path, dict(self.headers), payload, time.monotonic())
            with lock:
                service.requests.append(request)
                key = json.dumps(payload, sort_keys=True)
                before = counts.get(key, 0)
                counts[key] = before + 1
            reply = answer(request, before)
            time.sleep(reply.delay)
            if reply.hang_up:
                self.connection.close()
                return
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for byte in body if reply.drip else ():
                    self.wfile.write(bytes([byte]))
                    time.sleep(reply.drip)
                self.wfile.write(b"" if reply.drip else body)
            except (BrokenPipeError, ConnectionResetError):
                pass

        def log_message(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    service = Service(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()


def chat_reply(text: str) -> Reply:
    """Return a chat completion."""
    return Reply({"choices": [{"message": {"role": "assistant", "content": text}}]})


@contextmanager
def refused_url() -> Iterator[str]:
    """Yield an address that refuses connections: its port is taken, and nothing listens on it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def silent_url() -> Iterator[str]:
    """Yield an address that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
