"""The stages of a procedure, one after another: a line for each, its seconds, and what an earlier call has done.

A finished stage leaves `stages/NAME.json` in the folder of the procedure. Called again with the same settings, it is
not repeated; one that was killed goes on.
"""

import csv
import math
import shlex
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from lit_rlhf.callbacks.throughput import read_peak_memory
from lit_rlhf.commands.support.console import (
    Verbosity,
    format_seconds,
    get_verbosity,
    set_verbosity,
    terminal_width,
    wrap_words,
)
from lit_rlhf.commands.support.stage_records import StageRecords, compute_fingerprint
from lit_rlhf.models.export import make_directory
from lit_rlhf.progress import progress_listener

REFRESH_SECONDS = 0.2
ERASE_LINE = "\r\x1b[K"
NAME_WIDTH = 12
MAX_POINTS = 200  # of a curve


class StageState:
    """What the runner and the work of a stage tell each other.

    Attributes:
        resumes: whether an earlier call has begun this stage, with the same settings, and did not finish it.
        headline: the work's own words for the line of the finished stage.
    """

    def __init__(self, resumes: bool) -> None:
        self.resumes, self.headline = resumes, ""


class StageRunner:
    """Runs stages, each once.

    Args:
        folder: of the procedure.
        expected: stage -> seconds on some machine, for an estimate of the time that is left; without it there is none.
    """

    def __init__(self, folder: Path, expected: Mapping[str, float] | None = None) -> None:
        self.records, self.expected = StageRecords(folder), dict(expected or {})
        self.seconds: dict[str, float] = {}  # of the stages so far, over all calls
        self.peak_memory_gib = 0.0  # of the host, the same
        self._settings_so_far = ""

    def start_over(self) -> None:
        """Forget what earlier calls have done."""
        shutil.rmtree(self.records.folder, ignore_errors=True)

    def run(
        self,
        stage: str,
        work: Callable[[StageState], Any],
        description: str = "",
        settings: Any = None,
        has_bar: bool = False,
    ) -> Any:
        """Run a stage, unless it is done, and print one line about it.

        Args:
            stage: its name.
            work: what it does; what it returns is kept, and must be JSON-serializable.
            description: for `-v`.
            settings: what its result depends on besides the stages before it, JSON-serializable. With others, it and
                the stages behind it are run again.
            has_bar: whether it shows its progress itself.

        Returns:
            What the work returned.
        """
        self._settings_so_far = fingerprint = compute_fingerprint([self._settings_so_far, stage, settings])
        record = self.records.read(stage)
        if record.get("fingerprint") != fingerprint:
            record = {}
        if "result" in record:
            self._count(stage, record)
            say(f"{stage:<{NAME_WIDTH}}{'done':>7}  {record['headline']}".rstrip())
            return record["result"]
        make_directory(self.records.folder)
        state, start = StageState(resumes=bool(record)), time.perf_counter()
        record = {"fingerprint": fingerprint, "seconds": record.get("seconds", 0.0)}
        self.records.write(stage, record)
        try:
            with show_stage(stage, description, has_bar):
                record["result"] = work(state)
        finally:
            record["seconds"] += time.perf_counter() - start
            record["peak_memory_gib"] = read_peak_memory(torch.device("cpu"))
            self.records.write(stage, record | {"headline": state.headline})
        self._count(stage, record)
        line = f"{stage:<{NAME_WIDTH}}{format_seconds(record['seconds']):>7}  {state.headline}".rstrip()
        say(line + self._format_time_left())
        return record["result"]

    def _count(self, stage: str, record: Mapping[str, Any]) -> None:
        self.seconds[stage] = record["seconds"]
        self.peak_memory_gib = max(self.peak_memory_gib, record.get("peak_memory_gib", 0.0))

    def _format_time_left(self) -> str:
        left = sum(seconds for stage, seconds in self.expected.items() if stage not in self.seconds)
        done = sum(seconds for stage, seconds in self.expected.items() if stage in self.seconds)
        if not left or not done:
            return ""
        taken = sum(seconds for stage, seconds in self.seconds.items() if stage in self.expected)
        return f"; about {format_seconds(left * taken / done)} left"


def fit(arguments: Sequence[str], resumes: bool) -> None:
    """Run `lit-rlhf fit` in this process.

    Args:
        arguments: recipes and overrides.
        resumes: go on with the run in the folder; otherwise a run that is there is replaced.

    Raises:
        SystemExit: it failed, or was stopped.
    """
    run_command(["fit", *arguments, "--ckpt_path=last" if resumes else "--overwrite"])


def run_command(arguments: Sequence[str]) -> None:
    """Run a command as a part of another one, in this process.

    Raises:
        SystemExit: it failed, or was stopped.
    """
    from lit_rlhf.cli import main

    with set_verbosity(Verbosity.VERBOSE if is_verbose() else Verbosity.STAGE):
        code = main(list(arguments))
    if code:
        raise SystemExit(code)


def describe_command(arguments: Sequence[str]) -> str:
    """Return a command as it is typed."""
    return f"lit-rlhf {shlex.join(arguments)}"


@contextmanager
def show_stage(stage: str, description: str, has_bar: bool = False) -> Iterator[None]:
    """At a terminal, show on one line how far a stage is, unless it `has_bar` of its own; with `-v`, describe it."""
    is_live = sys.stdout.isatty() and not is_verbose() and not has_bar
    if is_verbose():
        print(f"\n== {stage}: {description}", flush=True)
    with progress_listener(LiveLine(stage)) if is_live else nullcontext():
        if is_live:
            print(f"{stage} …", end="", flush=True)
        try:
            yield
        finally:
            if is_live:
                print(ERASE_LINE, end="", flush=True)


class LiveLine:
    """Shows the phases of a stage on the terminal's last line.

    Args:
        stage: its name.
    """

    def __init__(self, stage: str) -> None:
        self.stage, self.refreshed = stage, -math.inf

    def __call__(self, phase: str, done: float, total: float) -> None:
        """Show a phase, a few times per second."""
        now = time.perf_counter()
        if now - self.refreshed >= REFRESH_SECONDS:
            self.refreshed = now
            print(f"{ERASE_LINE}{self.stage}: {phase} {done:,.0f}/{total:,.0f}", end="", flush=True)


def is_verbose() -> bool:
    """Return whether `-v` asks for what the stages print."""
    return get_verbosity() is Verbosity.VERBOSE


def say(text: str) -> None:
    """Print a text, wrapped for a terminal."""
    print(wrap_words(text, terminal_width(sys.stdout)), flush=True)


def read_last_values(folder: Path, names: Mapping[str, str]) -> dict[str, float]:
    """Return the last value of some columns of a stage's metrics.csv, under other names; none without the file."""
    last: dict[str, float] = {}
    if not (folder / "metrics.csv").is_file():  # an overlay switched it off
        return {}
    with open(folder / "metrics.csv") as file:
        for row in csv.DictReader(file):
            last |= {name: float(row[column]) for column, name in names.items() if row.get(column)}
    return {name: last[name] for name in names.values() if name in last}


def format_values(values: Mapping[str, float]) -> str:
    """Return metrics as a headline."""
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def read_curves(folder: Path, names: Mapping[str, str], x_axis: str) -> dict[str, list[list[float]]]:
    """Read `metric: [[x, value], …]` from the metrics.csv of a stage, about 200 points per curve at most.

    Args:
        folder: of the stage.
        names: column -> metric.
        x_axis: the column of x, such as step.
    """
    curves: dict[str, list[list[float]]] = defaultdict(list)
    if not (folder / "metrics.csv").is_file():
        return {}
    with open(folder / "metrics.csv") as file:
        for row in csv.DictReader(file):
            for column, name in names.items():
                if row.get(column):
                    curves[name].append([float(row[x_axis]), float(row[column])])
    return {name: points[:: max(len(points) // MAX_POINTS, 1)] for name, points in curves.items()}
