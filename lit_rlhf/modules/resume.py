"""Corrections of how Lightning resumes.

At an epoch's last batch Lightning takes the epoch for finished: no validation, no hook of the epoch's end. And it
counts the following epoch as if it had begun before, so that a second such resume loses one of `max_epochs`.

A `ModelCheckpoint` by steps does not know at which step its run was resumed, and writes a checkpoint at the first batch
afterwards: in the middle of an accumulation, whose gradients are in no checkpoint.
"""

from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.loop import _Loop

ResumePoint = Literal["within", "last batch", "validated", "over"]
"""Where in its epoch a checkpoint was written."""


def find_resume_point(loops: dict[str, Any]) -> ResumePoint:
    """Return where in its epoch a checkpoint was written; if at the last batch, mark that batch as completed.

    Args:
        loops: Lightning's state of its loops; changed in place, before it is loaded.
    """
    batches, epochs = loops["fit_loop"]["epoch_loop.batch_progress"], loops["fit_loop"]["epoch_progress"]["current"]
    if not batches["is_last_batch"]:
        return "within"
    if epochs["processed"] == epochs["started"]:
        return "over"
    if batches["current"]["completed"] == batches["current"]["processed"]:
        return "validated"
    for progress in (batches["current"], batches["total"]):
        progress["completed"] += 1  # otherwise Lightning does what the module docstring says
    return "last batch"


def mark_step_as_saved(trainer: Trainer) -> None:
    """Keep every `ModelCheckpoint` from saving the step again at which a run was resumed; call in `on_train_start`."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback._last_global_step_saved = trainer.global_step


def finish_epoch(trainer: Trainer, point: ResumePoint) -> None:
    """Run the rest of the epoch that a checkpoint was written in, and let the next one begin normally.

    To be called in `on_train_start`, at any point but "within".
    """
    loop = trainer.fit_loop
    inner = loop.epoch_loop
    if point == "last batch" and loop._data_fetcher is not None and inner._should_check_val_fx(loop._data_fetcher):
        trainer.validating = True
        inner.val_loop.run()
        trainer.training = True
    if point == "over":
        for progress in (loop.epoch_progress.current, loop.epoch_progress.total):
            progress.completed = progress.processed  # type: ignore[attr-defined]
    else:
        inner._batches_that_stepped += 1
        loop.on_advance_end()
    # The loop's own property stays true forever in a run of max_steps without max_epochs.
    _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
    loop.reset_restart_stage()
    inner.reset_restart_stage()
