"""Run a function on several gloo ranks: fork this process and set the environment of torchelastic."""

import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def on_ranks(function: Callable[[], Any], folder: Path, world_size: int = 2) -> list[Any]:
    """Run `function` on every rank and return what each rank returned; fail with the traceback of the rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            _run_rank(rank, world_size, port, function, folder)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    results = [pickle.loads((folder / f"rank-{rank}").read_bytes()) for rank in range(world_size)]
    for rank, (code, (failed, result)) in enumerate(zip(codes, results)):
        assert not failed and code == 0, f"rank {rank}:\n{result}"
    return [result for _, result in results]


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
    (folder / f"rank-{rank}").write_bytes(pickle.dumps(outcome))
    sys.stdout.flush()
    os._exit(int(outcome[0]))
