"""The runs of a sweep: each a process of its own, several at a time, and none that is done already."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from lit_rlhf.errors import UserError

RECIPE, RESULT, LOG = "recipe.yaml", "result.json", "log.txt"


class Run(NamedTuple):
    """One run to be made."""

    name: str
    values: dict[str, Any]  # setting -> value
    seed: int
    folder: Path
    text: str  # of its recipe

    @property
    def recipe(self) -> Path:
        """The recipe's file."""
        return self.folder / RECIPE


def prepare(run: Run) -> bool:
    """Write a run's recipe; return whether it has been done already, by this very recipe.

    What an earlier run of another recipe left in the folder is removed.

    Raises:
        UserError: the folder holds something that is no run of a sweep.
    """
    if run.folder.exists():
        if not run.recipe.is_file():
            raise UserError(f"--out: {run.folder} holds something else than a run of a sweep; name another folder")
        if run.recipe.read_text(encoding="utf-8") == run.text and is_done(run):
            return True
        shutil.rmtree(run.folder)
    run.folder.mkdir(parents=True)
    run.recipe.write_text(run.text, encoding="utf-8")
    return False


def is_done(run: Run) -> bool:
    """Whether a run has ended well."""
    result = run.folder / RESULT
    return result.is_file() and json.loads(result.read_text(encoding="utf-8"))["code"] == 0


def run_all(runs: Sequence[Run], jobs: int, last: int) -> tuple[list[Any], list[int]]:
    """Make every run that is not done; return outcomes and exit codes, in order.

    Args:
        runs: whose recipes have been written.
        jobs: how many at the same time.
        last: values of a metric that its mean is taken over.
    """
    from lit_rlhf.evaluation.reports.sweeps import Outcome, read_final

    if jobs == 1:
        results = [make(run, jobs) for run in runs]
    else:
        pool = ThreadPoolExecutor(jobs)
        try:
            results = list(pool.map(lambda run: make(run, jobs), runs))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # after an interrupt nothing further is started
    outcomes = []
    for run, result in zip(runs, results):
        metrics = run.folder / "metrics.csv"
        figures = read_final(metrics, last) if result["code"] == 0 and metrics.is_file() else {}
        outcomes.append(Outcome(run.values, run.seed, result["seconds"], figures, result["error"]))
    return outcomes, [result["code"] for result in results]


def make(run: Run, jobs: int) -> dict[str, Any]:
    """Make one run, unless it is done; return code, seconds and error."""
    file = run.folder / RESULT
    if is_done(run):
        print(f"{run.name}: done before", flush=True)
        done: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return done
    start = time.perf_counter()
    code = start_process(run, jobs)
    error = "" if code == 0 else last_words(run.folder / LOG) or f"exit code {code}"
    result = {"code": code, "seconds": round(time.perf_counter() - start, 1), "error": error}
    file.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(f"{run.name}: {error or 'done'}, {result['seconds']:.0f} s", flush=True)
    return result


def start_process(run: Run, jobs: int) -> int:
    """Run `lit-rlhf fit` on the run's recipe in a process of its own, its output in log.txt; return its exit code."""
    threads = str(max((os.cpu_count() or 1) // jobs, 1))
    # -P: the working directory comes last in the search path, as in the command itself
    command = [sys.executable, "-P", "-m", "lit_rlhf", "fit", "-c", str(run.recipe)]
    with open(run.folder / LOG, "w", encoding="utf-8") as log:
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode


def last_words(log: Path) -> str:
    """Return the last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ")[:200] if lines else ""
