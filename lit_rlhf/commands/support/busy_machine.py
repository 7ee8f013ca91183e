"""Threads on a machine that others compute on, settled before torch is imported: OpenMP reads the environment once.

OpenMP's threads spin while they wait for each other. That is fastest where every thread has a core. Where there are
more runnable threads than cores, those that spin take the cores from those that work: two programs of two threads on
two cores took twice as long as with threads that sleep. The waiting changes no number. The number of threads does, in
the last bits, so it is changed only where a container's quota says that the cores are not there.
"""

import os
import time
from collections.abc import MutableMapping
from math import ceil
from pathlib import Path
from statistics import median

THREADS, WAITING = "OMP_NUM_THREADS", "OMP_WAIT_POLICY"
SAMPLES, SAMPLE_SECONDS = 5, 0.02
BUSY_THREADS = 0.5  # of others, on average, while we look
# of a process that another one started, with its environment
LAUNCHED = ("LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


def settle_threads(environment: MutableMapping[str, str], root: Path = Path("/")) -> str | None:
    """Set how many threads OpenMP starts and how they wait; return a line that says so, or None if nothing changed.

    A variable that is set already stays as it is.

    Args:
        environment: of this process, changed in place.
        root: above `proc` and `sys`.
    """
    if any(name in environment for name in LAUNCHED):
        return None
    cores = count_cores()
    quota = read_cpu_quota(root)
    lines = []
    if quota is not None and quota < cores and THREADS not in environment:
        threads = max(ceil(quota), 1)
        environment[THREADS] = str(threads)
        lines.append(f"this container may use {quota:g} of {cores} cores: {THREADS}={threads}")
    if WAITING not in environment:
        threads = read_count(environment.get(THREADS), cores)
        others, machine = count_other_threads(root), os.cpu_count() or 1
        if others > BUSY_THREADS and others + threads > machine:
            environment[WAITING] = "passive"
            count = f"{others:.0f} other thread{'s'[: round(others) != 1]}"
            lines.append(f"{count} on {machine} cores: {WAITING}=passive, the numbers stay the same")
    return "; ".join(lines) or None


def count_cores() -> int:
    """Return the cores that this process may run on, which OpenMP starts as many threads for."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_count(text: str | None, default: int) -> int:
    """Return the number of threads that a value of OMP_NUM_THREADS asks for, such as "4" or "4,2"."""
    first = (text or "").split(",")[0].strip()
    return int(first) if first.isdigit() else default


def read_cpu_quota(root: Path) -> float | None:
    """Return the cores that the control groups of this process grant it, or None without a limit."""
    limits = []
    for folder in iter_cgroup_folders(root):
        try:
            if (folder / "cpu.max").is_file():  # version 2
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text().strip()
            if quota not in ("max", "-1"):
                limits.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(limits, default=None)


def iter_cgroup_folders(root: Path) -> list[Path]:
    """Return the folders of this process's CPU control group and of all groups around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = top / path.lstrip("/")
        folders += [group, *(each for each in group.parents if each == top or top in each.parents)]
    return folders


def count_other_threads(root: Path) -> float:
    """Return how many threads besides this one want a core of the machine: the median of some looks, or the load."""
    counts = []
    for number in range(SAMPLES):
        if number:
            time.sleep(SAMPLE_SECONDS)
        running = read_running_threads(root)
        if running is None:
            return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        counts.append(running - 1)
    return median(counts)


def read_running_threads(root: Path) -> int | None:
    """Return the runnable threads of the machine, this one included; None where the system does not say."""
    try:
        lines = (root / "proc/stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("procs_running "))
    except (OSError, ValueError, StopIteration):
        return None
