"""Run a sweep: each run in a process of its own, several at a time, skipping runs that are complete."""

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
from lit_rlhf.paths import written_whole

RECIPE, RESULT, LOG = "recipe.yaml", "result.json", "log.txt"


class Run(NamedTuple):
    """One run of a sweep."""

    name: str
    values: dict[str, Any]  # setting -> value
    seed: int
    folder: Path
    text: str  # its recipe as YAML

    @property
    def recipe(self) -> Path:
        """The recipe's file."""
        return self.folder / RECIPE


def check_folder(run: Run, overwrite: bool) -> None:
    """Refuse to replace what is not a run of a sweep, or a complete run with another recipe.

    Args:
        run: to be executed.
        overwrite: whether complete runs may be replaced.

    Raises:
        UserError: names the folder.
    """
    if not run.folder.exists():
        return
    if not run.recipe.is_file():
        raise UserError(f"--out: {run.folder} holds files that are not of a sweep; name another folder")
    if is_complete(run) and not is_unchanged(run) and not overwrite:
        raise UserError(
            f"--out: {run.folder} holds a complete run with another recipe; name another folder, or --overwrite to "
            "replace it"
        )


def is_unchanged(run: Run) -> bool:
    """Return whether the folder of a run holds exactly this recipe."""
    return run.recipe.read_text(encoding="utf-8") == run.text


def prepare_run(run: Run) -> bool:
    """Write a run's recipe; return whether the run is complete already, with exactly this recipe.

    The output of an earlier run that failed or has another recipe is removed; see `check_folder`.
    """
    if run.folder.exists():
        if is_unchanged(run) and is_complete(run):
            return True
        shutil.rmtree(run.folder)
    run.folder.mkdir(parents=True)
    run.recipe.write_text(run.text, encoding="utf-8")
    return False


def is_complete(run: Run) -> bool:
    """Return whether a run has succeeded."""
    return read_result(run).get("code") == 0


def read_result(run: Run) -> dict[str, Any]:
    """Return code, seconds and error of a run; empty if it has not ended, or its file is damaged."""
    try:
        result = json.loads((run.folder / RESULT).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def run_all(runs: Sequence[Run], jobs: int, last: int) -> tuple[list[Any], list[int]]:
    """Execute every run that is not complete; return results and exit codes, in order.

    Args:
        runs: with their recipes written.
        jobs: number of parallel processes.
        last: number of final values of each metric to average.
    """
    from lit_rlhf.evaluation.reports.sweeps import RunResult, read_final_metrics

    if jobs == 1:
        results = [execute_run(run, jobs) for run in runs]
    else:
        pool = ThreadPoolExecutor(jobs)
        try:
            results = list(pool.map(lambda run: execute_run(run, jobs), runs))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # after an interrupt, start no further runs
    run_results = []
    for run, result in zip(runs, results):
        file = run.folder / "metrics.csv"
        metrics = read_final_metrics(file, last) if result["code"] == 0 and file.is_file() else {}
        run_results.append(RunResult(run.values, run.seed, result["seconds"], metrics, result["error"]))
    return run_results, [result["code"] for result in results]


def execute_run(run: Run, jobs: int) -> dict[str, Any]:
    """Execute one run unless it is complete; return code, seconds and error."""
    if is_complete(run):
        print(f"{run.name}: complete already", flush=True)
        return read_result(run)
    start = time.perf_counter()
    code = start_process(run, jobs)
    error = "" if code == 0 else read_last_line(run.folder / LOG) or f"exit code {code}"
    result = {"code": code, "seconds": round(time.perf_counter() - start, 1), "error": error}
    with written_whole(run.folder / RESULT) as part:
        part.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(f"{run.name}: {error or 'done'}, {result['seconds']:.0f} s", flush=True)
    return result


def start_process(run: Run, jobs: int) -> int:
    """Run `lit-rlhf fit` with the run's recipe in a new process, with its output in log.txt; return the exit code."""
    threads = str(max((os.cpu_count() or 1) // jobs, 1))
    # -P: do not put the working directory first in sys.path; the command appends it
    command = [sys.executable, "-P", "-m", "lit_rlhf", "fit", "-c", str(run.recipe)]
    with open(run.folder / LOG, "w", encoding="utf-8") as log:
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode


def read_last_line(log: Path) -> str:
    """Return the last non-empty line of a log, at most 200 characters."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ")[:200] if lines else ""
