"""Progress within a step: long work reports it where it happens, and whoever shows it listens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

#: takes the name of a phase, how much of it is done, and how much there is
Listener = Callable[[str, float, float], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def report_progress(phase: str, done: float, total: float) -> None:
    """Say how far a phase is, such as ("generate", 96, 256); nothing happens where nobody listens."""
    listener = _listener.get()
    if listener is not None:
        listener(phase, done, total)


@contextmanager
def without_progress_bar(module: Any) -> Iterator[None]:
    """Within the block, the bars that another package's module draws by its `tqdm` are off; they have no setting."""
    progress_bar = module.tqdm
    module.tqdm = partial(progress_bar, disable=True)
    try:
        yield
    finally:
        module.tqdm = progress_bar


@contextmanager
def progress_listener(listener: Listener) -> Iterator[None]:
    """Pass every report within the block to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
