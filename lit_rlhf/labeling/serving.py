"""Start a server on a socket, and say where it is."""

from __future__ import annotations

import socket

import uvicorn
from starlette.applications import Starlette

from lit_rlhf.errors import UserError
from lit_rlhf.labeling.web import LOOPBACK


def bind(host: str, port: int) -> socket.socket:
    """Open the server's socket, which holds the address from now on; port 0 takes a free one.

    Raises:
        UserError: The address cannot be taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()  # without it, another program may bind the same address
    except (OSError, OverflowError) as problem:
        raise UserError(f"--host {host} --port {port}: {problem}: choose others; --port 0 takes a free port") from None
    return listener


def is_loopback(host: str) -> bool:
    """Return whether only programs on this machine reach a server there."""
    return host in LOOPBACK


def allowed_hosts(host: str) -> tuple[str, ...] | None:
    """Return the names under which a server may be asked; None: any, where links are secret anyway."""
    return LOOPBACK if is_loopback(host) else None


def address_of(listener: socket.socket, host: str) -> str:
    """Return the address to print."""
    port = listener.getsockname()[1]
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def serve(app: Starlette, listener: socket.socket) -> None:
    """Serve until the process is interrupted."""
    # no access log: addresses hold secrets
    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        lifespan="off",
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=3,
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()
