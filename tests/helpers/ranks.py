"""Run a function on several gloo ranks: fork this process and set the environment of torchelastic."""

import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 20.0  # seconds that the other ranks have to report their own failure


def on_ranks(function: Callable[[], Any], folder: Path, world_size: int = 2) -> list[Any]:
    """Run `function` on every rank and return what each rank returned; fail with the traceback of the rank."""
    with socket.socket() as taken:  # bound and not listening: no other program gets the port, and rank zero can
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        children = []
        for rank in range(world_size):
            (folder / f"rank-{rank}").unlink(missing_ok=True)
            child = os.fork()
            if child == 0:
                _run_rank(rank, world_size, taken.getsockname()[1], function, folder)
            children.append(child)
        codes = _wait_for_ranks(children)
    files = [folder / f"rank-{rank}" for rank in range(world_size)]
    results = [pickle.loads(file.read_bytes()) if file.exists() else (True, "it was killed") for file in files]
    for rank, (code, (failed, result)) in enumerate(zip(codes, results)):
        assert not failed and code == 0, f"rank {rank}:\n{result}"
    return [result for _, result in results]


def leave_process_group() -> None:
    """Destroy the process group of this process, if it has one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _wait_for_ranks(children: list[int]) -> list[int]:
    """Wait for all ranks and return their codes; when one has failed, the others, which may wait for it, are killed."""
    codes: dict[int, int] = {}
    last = float("inf")
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (found := os.waitpid(child, os.WNOHANG)) != (0, 0):
                codes[child] = found[1]
        if any(codes.values()):
            last = min(last, time.monotonic() + PATIENCE)
        for child in children:
            if time.monotonic() > last and child not in codes:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def _run_rank(rank: int, world_size: int, port: int, function: Callable[[], Any], folder: Path) -> None:
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "GROUP_RANK": 0,
    }
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in names.items()})
    # after a fork PyTorch's thread pool must be created again, which fails if several threads do so at once
    torch.set_num_threads(torch.get_num_threads())
    signal.alarm(600)  # a rank that hangs is killed and fails its test
    try:
        outcome = (False, function())
    except BaseException:
        outcome = (True, traceback.format_exc())
    finally:
        leave_process_group()  # the other ranks see it at once
    (folder / f"rank-{rank}").write_bytes(pickle.dumps(outcome))
    sys.stdout.flush()
    os._exit(int(outcome[0]))
