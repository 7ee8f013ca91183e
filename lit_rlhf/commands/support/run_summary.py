"""What a run leaves behind, in a few lines at its end: the best figures, the paths, and the next command."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from lightning.pytorch.loggers import WandbLogger

from lit_rlhf.commands.support.config_locations import iter_scalars
from lit_rlhf.commands.support.console import format_seconds, terminal_width, wrap_words
from lit_rlhf.commands.support.progress_bar import LABELS, StageProgressBar, describe_step, format_metric
from lit_rlhf.modules import PPOModule, RewardModule, SFTModule

# title -> files of a run's folder
FILES = {
    "metrics": ("metrics.csv",),
    "samples": ("samples.jsonl", "validation_samples.jsonl"),
    "report": ("reward_quality.html",),
    "config": ("config.yaml",),
}
STAGES = (SFTModule, RewardModule, PPOModule)  # in the paper's order


def format_summary(trainer: L.Trainer, folder: Path, recipes: list[Path], seconds: float) -> str:
    """Return the lines.

    Args:
        trainer: after the run.
        folder: of the run.
        recipes: the files that the run was composed from.
        seconds: that the run took.
    """
    models = [path for path in exported_folders(trainer) if (path / "config.json").is_file()]
    rows = [("best", describe_best(trainer)), *(("model", show(path)) for path in models)]
    for title, names in FILES.items():
        rows += [(title, show(folder / name)) for name in names if (folder / name).is_file()]
    if (folder / "checkpoints").is_dir():
        rows.append(("checkpoints", show(folder / "checkpoints")))
    rows += [("wandb", address) for address in iter_wandb_addresses(trainer)]
    if models:
        rows.append(("next", next_command(trainer, models[0], recipes)))
    head = f"done in {format_seconds(seconds)}, {describe_step(trainer, float('inf'))}"
    lines = [f"{title:<13}{text}" for title, text in rows if text]
    return "\n".join([head, *(wrap_words(f"  {line}", terminal_width(sys.stdout)) for line in lines)])


def format_metrics(metrics: dict[str, Any]) -> str:
    """Return the metrics of `validate` or `test`, one per line."""
    width = max(map(len, metrics), default=0)
    return "\n".join(f"{name:<{width}}  {float(value):.6g}" for name, value in sorted(metrics.items()))


def describe_best(trainer: L.Trainer) -> str:
    """Return a text such as "score 1.02 (iteration 22/25)"; "" where no bar has kept the best values."""
    bar = trainer.progress_bar_callback
    if not isinstance(bar, StageProgressBar):
        return ""
    best = [f"{LABELS.get(name, name)} {format_metric(value)} ({where})" for name, (value, where) in bar.best.items()]
    return ", ".join(best) + (f", since step {bar.first_step:,}" if best and bar.first_step else "")


def exported_folders(trainer: L.Trainer) -> list[Path]:
    """Return where the run exports its model."""
    from lit_rlhf.callbacks import ExportModel

    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback.directory for callback in callbacks if isinstance(callback, ExportModel)]


def iter_wandb_addresses(trainer: L.Trainer) -> Iterator[str]:
    """Yield where the run is on Weights & Biases, or the folder that `wandb sync` uploads."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            run: Any = logger.experiment
            if run.disabled:
                continue
            yield run.url or f"wandb sync {show(Path(run.dir).parent)}"


def next_command(trainer: L.Trainer, model: Path, recipes: list[Path]) -> str:
    """Return a command that uses the model: the recipe beside this run's that names it, or a first look at it."""
    names = {str(model), show(model)}
    beside = sorted(recipes[0].parent.glob("*.yaml"), key=lambda path: path.stem) if recipes else []
    values = {path: read_values(path) for path in beside if path not in recipes}
    module = type(trainer.lightning_module)
    for stage in STAGES[STAGES.index(module) + (module is not SFTModule) :] if module in STAGES else ():
        for path in values:
            if names & values[path] and f"{stage.__module__.rpartition('.')[0]}.{stage.__name__}" in values[path]:
                return f"lit-rlhf fit -c {shlex.quote(name_recipe(path))}"
    verb = "rank" if module is RewardModule else "generate"
    return f"lit-rlhf {verb} --model {shlex.quote(show(model))}" + (" FILE" if verb == "rank" else "")


def read_values(path: Path) -> set[str]:
    """Return the values in a YAML file; none if it is not valid."""
    try:
        tree = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return set()
    return {node.value for node in iter_scalars(tree)}


def name_recipe(path: Path) -> str:
    """Return a recipe as `-c` takes it: a shipped one by its name."""
    from lit_rlhf.commands.recipes import shipped_recipes

    names = {file.resolve(): name for name, file in shipped_recipes().items()}
    return names.get(path.resolve(), show(path))


def show(path: Path) -> str:
    """Return a path relative to the working directory, if it is inside."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)
