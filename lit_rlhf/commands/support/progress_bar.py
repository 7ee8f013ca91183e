"""The progress of a run: a bar that moves in every phase, and one line that stays per iteration or validation."""

import math
import sys
import time
import warnings
from contextlib import ExitStack
from logging import getLogger
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lit_rlhf.commands.support.console import (
    Verbosity,
    fit_fields,
    format_seconds,
    get_verbosity,
    terminal_width,
    wrap_words,
)
from lit_rlhf.modules import PPOModule
from lit_rlhf.progress import progress_listener

BAR_FORMAT = "{desc} |{bar:12}| {percentage:3.0f}%{postfix}"
REFRESH_SECONDS = 0.1
MIN_SECONDS = 0.5  # before a rate is one
# as a person calls them; another metric goes by its full name
LABELS = {
    "reward/score": "score",
    "reward/kl": "KL",
    "response/length": "length",
    "policy/entropy_estimate": "entropy",
}
# metric -> whether more is better: those that a summary names the best value of
IS_BETTER_HIGHER = {
    "validation/loss": False,
    "validation/accuracy": True,
    "validation/score": True,
    "reward/score": True,
}


class StageProgressBar(TQDMProgressBar):
    """Lightning's bar on one line, and lines that stay.

    The bar names the phase: the rollout of an iteration (`report_progress`), its update, an epoch, a validation. Where
    stdout is no terminal there is no bar, and no control character. Rank zero alone prints.

    Attributes:
        best: metric -> its best value, and where: "iteration 12".
    """

    BAR_FORMAT = BAR_FORMAT

    def __init__(self) -> None:
        super().__init__()
        self.keeps_lines = get_verbosity() >= Verbosity.NORMAL
        self.best: dict[str, tuple[float, str]] = {}
        self.metrics: dict[str, float] = {}  # as last read
        self.is_first_rank = True
        self.started = self.line_time = self.refreshed = 0.0  # time.perf_counter()
        self.first_step = self.line_step = self.validation_step = 0
        self.total_steps = math.inf
        # of several within one command: the bar alone says which one runs
        self.stage = self.phase = self.update = ""
        self.stack = ExitStack()
        if not sys.stdout.isatty():
            super().disable()

    def disable(self) -> None:
        """Print nothing: what Lightning calls on every rank but the first."""
        super().disable()
        self.is_first_rank = False

    # ------------------------------------------------------------------------------------------------------ kept lines

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self.started = self.line_time = time.perf_counter()
        self.first_step = self.line_step = trainer.global_step
        self.total_steps = count_steps(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep a line, unless a validation at this step has."""
        if trainer.global_step > self.line_step:
            self.keep_line(trainer, describe_epoch(trainer))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep a line, unless the epoch ends now: its own line says the same."""
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        self.phase = ""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.validation_step = trainer.global_step
        if not is_at_epoch_end(trainer):
            self.keep_line(trainer, describe_step(trainer, self.total_steps))

    def keep_line(self, trainer: L.Trainer, position: str) -> None:
        """Print where the run is, its metrics, the seconds since the last line, and the time that is left."""
        now = time.perf_counter()
        # on every rank: a metric that ranks share is reduced when it is read
        metrics = self.metrics = read_metrics(trainer)
        if self.validation_step < trainer.global_step:  # the values of an earlier line
            metrics = {name: value for name, value in metrics.items() if not name.startswith("validation/")}
        for name, is_higher in IS_BETTER_HIGHER.items():
            sign, value = 1 if is_higher else -1, metrics.get(name, math.nan)
            if sign * value > sign * self.best.get(name, (-sign * math.inf, ""))[0]:  # never true of NaN
                self.best[name] = value, position
        if self.keeps_lines and self.is_first_rank:
            texts = group_metrics(metrics)
            fields = [position, *texts, format_seconds(now - self.line_time), self.format_time_left(trainer)]
            optional = [*(n for n, text in enumerate(texts, 1) if text.startswith("train")), *range(len(texts), 1, -1)]
            self.write(fit_fields(fields, optional, terminal_width(sys.stdout)))
        self.line_time, self.line_step = now, trainer.global_step

    def format_time_left(self, trainer: L.Trainer) -> str:
        """Return "2:07 left", from the steps of this process so far; "" if nothing limits the run."""
        done, left = trainer.global_step - self.first_step, self.total_steps - trainer.global_step
        if not done or left <= 0 or not math.isfinite(left):
            return ""
        return f"{format_seconds((time.perf_counter() - self.started) * left / done)} left"

    # ------------------------------------------------------------------------------------------------------------- bar

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Show phases and keep the log from writing into the bar, until the run ends."""
        super().setup(trainer, pl_module, stage)
        if not self.keeps_lines:
            self.stage = f"{Path(trainer.default_root_dir).name} "
        self.stack.close()
        if self.is_disabled:
            return
        self.stack.enter_context(progress_listener(self.show_phase))
        loggers = [getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
        self.stack.enter_context(logging_redirect_tqdm([each for each in loggers if each.handlers]))
        show_warning = warnings.showwarning

        def show_above_bar(*args: Any, **kwargs: Any) -> None:
            with tqdm.external_write_mode(file=sys.stderr):
                show_warning(*args, **kwargs)

        warnings.showwarning = show_above_bar
        self.stack.callback(setattr, warnings, "showwarning", show_warning)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        self.stack.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the bar away: an error follows."""
        self.stack.close()
        for bar in (self._train_progress_bar, self._val_progress_bar, self._test_progress_bar):
            if bar is not None:
                bar.close()

    def init_train_tqdm(self) -> Tqdm:
        """Return a bar that leaves nothing behind: the kept lines say more."""
        return self.make_bar("training")

    def init_sanity_tqdm(self) -> Tqdm:
        """See `init_train_tqdm`."""
        return self.make_bar("validation")

    def init_validation_tqdm(self) -> Tqdm:
        """Return a bar in the place of the training's."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.clear()
        return self.make_bar("validation")

    def init_test_tqdm(self) -> Tqdm:
        """See `init_train_tqdm`."""
        return self.make_bar("test")

    def make_bar(self, description: str) -> Tqdm:
        """Return a bar on the last line of the terminal."""
        return Tqdm(
            desc=f"{self.stage}{description}",
            position=0,
            leave=False,
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=self.BAR_FORMAT,
        )

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Begin the bar of an epoch."""
        self.begin(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Count batches again after a rollout or a validation."""
        if self.phase:
            self.begin(trainer, "update")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Move the bar, to the metrics of the step."""
        batch_idx: int = args[-1]
        if not self.train_progress_bar.disable and time.perf_counter() - self.refreshed >= REFRESH_SECONDS:
            self.metrics |= read_metrics(trainer)  # now and then: it waits for an accelerator
        self.move(trainer, batch_idx + 1)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Count validation batches."""
        if self.has_dataloader_changed(0):
            total = self.total_val_batches_current_dataloader
            self.val_progress_bar.reset(total if math.isfinite(total) else None)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Move the bar, unless it showed phases within the batch."""
        if not self.phase:
            super().on_validation_batch_end(trainer, *args)

    def begin(self, trainer: L.Trainer, phase: str = "") -> None:
        """Start counting the batches of an epoch, or of its update."""
        self.phase, self.update, bar = "", phase, self.train_progress_bar
        if not bar.disable:
            total = self.total_train_batches
            bar.reset(total if math.isfinite(total) else None)
            bar.initial = 0 if has_epochs(trainer) else trainer.global_step
            self.move(trainer, 0)

    def move(self, trainer: L.Trainer, done: int) -> None:
        """Set the bar to a number of batches; to the optimizer step where steps limit the run."""
        bar, now = self.train_progress_bar, time.perf_counter()
        if bar.disable or (now - self.refreshed < REFRESH_SECONDS and done < (bar.total or 0)):
            return
        self.refreshed, unit = now, "batch"
        if not has_epochs(trainer) and trainer.max_steps >= 0:
            done, bar.total, unit = trainer.global_step, trainer.max_steps, "step"
        bar.n = done
        bar.set_description_str(f"{self.stage}{describe_epoch(trainer)} {self.update}".strip(), refresh=False)
        bar.set_postfix_str(self.format_postfix(trainer, bar, unit))

    def show_phase(self, phase: str, done: float, total: float) -> None:
        """Set the bar to a phase within a step."""
        trainer, now = self.trainer, time.perf_counter()
        bar = self._val_progress_bar if trainer.validating or trainer.sanity_checking else self._train_progress_bar
        is_new = phase != self.phase
        if bar is None or bar.disable or (now - self.refreshed < REFRESH_SECONDS and not is_new):
            return
        if is_new:
            bar.reset(total)
            bar.initial = done
            where = describe_epoch(trainer) if trainer.training else "validation"
            bar.set_description_str(f"{self.stage}{where} {phase}", refresh=False)
        self.phase, self.refreshed, bar.n, bar.total = phase, now, done, total
        bar.set_postfix_str(self.format_postfix(trainer, bar, "row"))

    def format_postfix(self, trainer: L.Trainer, bar: Tqdm, unit: str) -> str:
        """Return what stands behind a bar: the rate, the stage's metric and the time left, as far as it fits."""
        elapsed = time.time() - bar.start_t
        rate = f"{(bar.n - bar.initial) / elapsed:.1f} {unit}/s" if elapsed > MIN_SECONDS and bar.n else ""
        fields = [rate, *group_metrics(self.metrics)]
        fields.append(self.format_time_left(trainer))
        width = (terminal_width(sys.stdout) or 80) - len(str(bar.desc)) - 24
        return fit_fields(fields, [*range(len(fields) - 2, 1, -1), 1, 0], width)

    def write(self, line: str) -> None:
        """Print a line above the bar, or as it is."""
        if self.is_disabled:
            print(line, flush=True)
        else:
            tqdm.write(line, file=sys.stdout)

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print above the bar: what `LightningModule.print` calls."""
        if self.keeps_lines and self.is_first_rank:
            self.write(wrap_words(sep.join(map(str, args)), terminal_width(sys.stdout)))


def read_metrics(trainer: L.Trainer) -> dict[str, float]:
    """Return the metrics that a module logs for the progress bar, in the order of `LABELS`, validation last."""
    metrics: Any = trainer.progress_bar_metrics
    order = {name: place for place, name in enumerate(LABELS)}
    names = sorted(metrics, key=lambda name: (name.startswith("validation/"), order.get(name, len(order))))
    return {name: float(metrics[name]) for name in names}


def group_metrics(metrics: dict[str, float]) -> list[str]:
    """Return texts such as "score 0.612", and "validation: loss 0.553, accuracy 0.712" for metrics of one prefix."""
    groups: dict[str, list[str]] = {}
    for name, value in metrics.items():
        prefix, _, rest = name.rpartition("/")
        label = LABELS.get(name)
        groups.setdefault(label or prefix or name, []).append(f"{label or rest} {format_metric(value)}")
    return [
        ", ".join(texts) if name in LABELS.values() or name in metrics else f"{name}: {', '.join(texts)}"
        for name, texts in groups.items()
    ]


def format_metric(value: float) -> str:
    """Return a value with three significant digits and at most three decimals: 0.612, 12.3, -0.006, 2e-05."""
    if not math.isfinite(value) or (value and not 1e-3 <= abs(value) < 1e6):
        return f"{value:.0e}"
    return f"{value:.{min(max(2 - math.floor(math.log10(abs(value))), 0), 3) if value else 3}f}"


def count_steps(trainer: L.Trainer) -> float:
    """Return the optimizer steps at which the run ends; infinite if nothing limits it."""
    steps = math.inf if trainer.max_steps < 0 else float(trainer.max_steps)
    if has_epochs(trainer) and math.isfinite(trainer.num_training_batches):
        assert trainer.max_epochs is not None
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        # a resumed run may have had other sizes before
        left = (trainer.max_epochs - trainer.current_epoch) * per_epoch
        steps = min(steps, trainer.global_step + left)
    return steps


def has_epochs(trainer: L.Trainer) -> bool:
    """Return whether epochs limit the run."""
    return trainer.max_epochs is not None and trainer.max_epochs >= 0


def describe_epoch(trainer: L.Trainer) -> str:
    """Return "iteration 12/25" for PPO, "epoch 2/4" for other modules, or the step where steps limit the run."""
    if not has_epochs(trainer):
        return describe_step(trainer, math.inf if trainer.max_steps < 0 else trainer.max_steps)
    kind = "iteration" if isinstance(trainer.lightning_module, PPOModule) else "epoch"
    return f"{kind} {trainer.current_epoch + 1}/{trainer.max_epochs}"


def describe_step(trainer: L.Trainer, total: float) -> str:
    """Return "step 650/1,300", or "step 650" if nothing limits the run."""
    return f"step {trainer.global_step:,}/{int(total):,}" if math.isfinite(total) else f"step {trainer.global_step:,}"


def is_at_epoch_end(trainer: L.Trainer) -> bool:
    """Return whether the last batch of an epoch is done, so that `on_train_epoch_end` follows."""
    return trainer.is_last_batch or 0 <= trainer.max_steps <= trainer.global_step
