"""Peak memory of a function, measured in a process of its own."""

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.ranks import on_ranks

CLEAR = Path("/proc/self/clear_refs")
M_MMAP_THRESHOLD = -3  # of malloc.h
needs_proc = pytest.mark.skipif(not CLEAR.exists(), reason="peak memory is read from Linux's /proc")


def measure_peak_memory(work: Callable[[], object], folder: Path) -> int:
    """Return the peak resident bytes of `work` in addition to those before it, in a fork of this process.

    Run the work once at a small size first, so that libraries are loaded.
    """

    def measure() -> int:
        gc.collect()
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)  # freed memory goes back to the system at once
        CLEAR.write_text("5")  # resets the peak
        before = _resident("VmRSS")
        work()
        return _resident("VmHWM") - before

    (peak,) = on_ranks(measure, folder, world_size=1)
    return int(peak)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found.group(1))
