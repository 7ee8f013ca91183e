"""The runs that an agent of a Weights & Biases sweep starts: a folder for each."""

import os
from collections.abc import Mapping
from pathlib import Path


def in_sweep(environ: Mapping[str, str]) -> bool:
    """Return whether an agent of a W&B sweep started this process."""
    return bool(environ.get("WANDB_SWEEP_ID") and environ.get("WANDB_RUN_ID"))


def sweep_run_dir(run_dir: str, environ: Mapping[str, str]) -> str:
    """Return the folder of this run of a W&B sweep, which gives all its runs the same `run_dir`."""
    run = environ["WANDB_RUN_ID"]
    return run_dir if run in Path(run_dir).parts else os.path.join(run_dir, f"sweep-{environ['WANDB_SWEEP_ID']}", run)
