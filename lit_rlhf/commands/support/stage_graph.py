"""A graph of stages, each a process of its own, as many at a time as there are cores; finished ones are not repeated.

A finished stage leaves `NAME.json` in the folder of the graph's state. It is done as long as its fingerprint is the
same: its command, the files that it reads from outside the graph, and the fingerprints of the stages before it. After a
kill, the stages that were running start again.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from lit_rlhf.commands.support.console import format_seconds
from lit_rlhf.commands.support.locks import try_lock
from lit_rlhf.commands.support.stage_records import StageRecords, compute_fingerprint
from lit_rlhf.commands.support.sweep_runs import read_last_line
from lit_rlhf.errors import UserError

POLL_SECONDS = 0.05


class Stage(NamedTuple):
    """One stage of a graph.

    Attributes:
        name: unique in the graph, a file name.
        command: arguments of `python -m`.
        inputs: stages that must be done before.
        seconds: expected duration, for the order and for the time left.
        settings: what its result depends on besides its command and inputs, such as the text of its recipe.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    seconds: float = 10.0
    settings: str = ""


def select_stages(stages: Sequence[Stage], wanted: Sequence[str]) -> list[Stage]:
    """Return the wanted stages and all that they need, in the order of `stages`, which has inputs before their users.

    Raises:
        KeyError: a stage or an input that is not before it in the graph.
    """
    by_name = {stage.name: stage for stage in stages}
    needed: set[str] = set()
    pending = list(wanted)
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += by_name[name].inputs
    return [stage for stage in stages if stage.name in needed]


def compute_fingerprints(stages: Sequence[Stage], root: Path) -> dict[str, str]:
    """Return the fingerprint of every stage; the path of `root` is not in it, so that a graph's folder can be moved.

    Raises:
        KeyError: an input of a stage is not before it.
    """
    fingerprints: dict[str, str] = {}
    for stage in stages:
        own = [word.replace(str(root), "{root}") for word in (*stage.command, stage.settings)]
        fingerprints[stage.name] = compute_fingerprint([own, [fingerprints[name] for name in stage.inputs]])
    return fingerprints


class StageGraph:
    """Runs the stages of a graph.

    Args:
        stages: inputs before their users.
        root: folder of all that the stages write; it may be moved.
        processes: at most so many at a time.
    """

    def __init__(self, stages: Sequence[Stage], root: Path, processes: int) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.records, self.processes = StageRecords(root), processes
        self.state = self.records.folder
        self.fingerprints = compute_fingerprints(stages, root)
        self.priorities = compute_priorities(stages)
        self.seconds: dict[str, float] = {}  # of the stages that this call has run

    def is_done(self, name: str) -> bool:
        """Return whether an earlier call has finished a stage with the same fingerprint."""
        return self.records.read(name).get("fingerprint") == self.fingerprints[name]

    def run(self) -> None:
        """Run every stage that is not done, and print a line about each.

        Raises:
            UserError: a stage failed; those that do not need it were run, and its output is in its log.
        """
        self.state.mkdir(parents=True, exist_ok=True)
        done = {name for name in self.stages if self.is_done(name)}
        pending = [name for name in self.stages if name not in done]
        if done:
            print(f"{len(done)} of {len(self.stages)} stages are done already", flush=True)
        failed: list[str] = []
        with running_processes() as running:
            while pending or running:
                ready = [name for name in pending if done.issuperset(self.stages[name].inputs)]
                for name in sorted(ready, key=lambda name: -self.priorities[name]):
                    if len(running) >= self.processes:
                        break
                    process = self._start(name)
                    if process is not None:
                        running[name] = process
                        pending.remove(name)
                    elif self.is_done(name):
                        done.add(name)
                        pending.remove(name)
                        print(f"{name:<24}done by another call", flush=True)
                if not running and not ready:
                    break
                time.sleep(POLL_SECONDS)
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    process = running.pop(name)
                    seconds, code = process.wait()
                    if code:
                        failed.append(name)
                    else:
                        done.add(name)
                        self.seconds[name] = seconds
                        self.records.write(name, {"fingerprint": self.fingerprints[name], "seconds": round(seconds, 1)})
                    process.release()  # after the record: another call that waits for the lock finds it
                    print(f"{name:<24}{'failed' if code else self._describe(name, [*pending, *running])}", flush=True)
        if failed:
            log = self.state / f"{failed[0]}.log"
            raise UserError(
                f"stage {failed[0]} failed: {read_last_line(log)} ({log}); the same command goes on from here"
            )

    def _start(self, name: str) -> "StageProcess | None":
        """Start a stage; None while a process of another call, even a killed one, is at it, or if that has done it."""
        lock = open(self.state / f"{name}.lock", "w")  # noqa: SIM115
        if not try_lock(lock.fileno()) or self.is_done(name):
            lock.close()
            return None
        self.records.remove(name)
        return StageProcess(self.stages[name].command, self.state / f"{name}.log", lock)

    def _describe(self, name: str, left: Sequence[str]) -> str:
        """Return the seconds of a finished stage, and an estimate for those that are left."""
        pace = sum(self.seconds.values()) / sum(self.stages[each].seconds for each in self.seconds)
        expected = sum(self.stages[each].seconds for each in left) * pace / self.processes
        more = f"   {len(left)} left, about {format_seconds(expected)}" if left else ""
        return f"{format_seconds(self.seconds[name]):>8}{more}"


class StageProcess:
    """A running stage. Its process holds the lock too, so that it is known to run even if this one is killed.

    Args:
        command: arguments of `python -m`.
        log: file of its output.
        lock: an open and locked file.
    """

    def __init__(self, command: Sequence[str], log: Path, lock: IO[str]) -> None:
        self.started, self._lock = time.perf_counter(), lock
        with open(log, "w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # the models are too small for a second thread, and every core has a stage of its own
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                pass_fds=(lock.fileno(),),
            )

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self._process.poll()

    def wait(self) -> tuple[float, int]:
        """Wait for the process; return its seconds and its exit code."""
        code = self._process.wait()
        return time.perf_counter() - self.started, code

    def release(self) -> None:
        """Free the lock."""
        self._lock.close()

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self.wait()
        self.release()


@contextmanager
def running_processes() -> Iterator[dict[str, StageProcess]]:
    """Yield an empty dict of processes; those that are in it when the block ends are stopped."""
    running: dict[str, StageProcess] = {}
    try:
        yield running
    finally:
        for process in running.values():
            process.stop()


def compute_priorities(stages: Sequence[Stage]) -> dict[str, float]:
    """Return the expected seconds from the start of each stage to the end of the longest chain that it begins."""
    after = {stage.name: 0.0 for stage in stages}
    priorities = {}
    for stage in reversed(stages):
        priorities[stage.name] = stage.seconds + after[stage.name]
        for name in stage.inputs:
            after[name] = max(after[name], priorities[stage.name])
    return priorities
