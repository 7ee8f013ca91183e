"""Corrections of how Lightning resumes.

At an epoch's last batch Lightning takes the epoch for finished: no validation, no hook of the epoch's end. And it
counts the following epoch as if it had begun before, so that a second such resume loses one of `max_epochs`. The epoch
within which `max_steps` ended a run it takes for finished, too, once the hooks of the epoch's end were called.

Optimizer and scheduler take all settings from the checkpoint, so that those of the recipe would be ignored; so do
`EarlyStopping` (patience) and `ModelCheckpoint` (save_top_k).
"""

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loops.loop import _Loop
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_rlhf.errors import UserError
from lit_rlhf.schedules import TrainerLengthSchedule

ResumePoint = Literal["within", "last batch", "validated", "over"]
"""Where in its epoch a checkpoint was written."""


def find_resume_point(loops: dict[str, Any]) -> ResumePoint:
    """Return where in its epoch a checkpoint was written.

    A checkpoint at the last batch gets that batch marked as completed; one at the end of a run that `max_steps` ended
    within an epoch gets the epoch marked as unfinished.

    Args:
        loops: Lightning's state of its loops; changed in place, before it is loaded.
    """
    batches, epochs = loops["fit_loop"]["epoch_loop.batch_progress"], loops["fit_loop"]["epoch_progress"]["current"]
    if not batches["is_last_batch"]:
        if epochs["processed"] == epochs["started"]:  # Lightning would begin the next epoch
            for progress in loops["fit_loop"]["epoch_progress"].values():
                progress["processed"] = progress["completed"] = progress["started"] - 1
        return "within"
    if epochs["processed"] == epochs["started"]:
        return "over"
    if batches["current"]["completed"] == batches["current"]["processed"]:
        return "validated"
    for progress in (batches["current"], batches["total"]):
        progress["completed"] += 1  # otherwise Lightning does what the module docstring says
    return "last batch"


def remaining_steps(trainer: Trainer, steps_per_epoch: int) -> float:
    """Return how many optimizer steps a run still has; infinite if nothing limits them, or an epoch has no length."""
    loop = trainer.fit_loop
    left = float("inf")
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and math.isfinite(trainer.num_training_batches):
        progress = loop.epoch_loop.batch_progress
        done = 0 if progress.is_last_batch else progress.current.ready // trainer.accumulate_grad_batches
        epochs: int = loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        left = (trainer.max_epochs - epochs) * steps_per_epoch - done
    return left if trainer.max_steps == -1 else min(left, trainer.max_steps - trainer.global_step)


def finish_epoch(trainer: Trainer, point: ResumePoint) -> None:
    """Run the rest of the epoch that a checkpoint was written in, and let the next one begin normally.

    To be called in `on_train_start`, at any point but "within".
    """
    loop = trainer.fit_loop
    inner = loop.epoch_loop
    if isinstance(loop.max_batches, int):  # the checkpoint's epoch may have had more batches, or fewer
        inner.batch_progress.current.ready = loop.max_batches
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


def restore_callback_settings(trainer: Trainer, callback_states: dict[str, Any]) -> None:
    """Keep the recipe's settings of Lightning's callbacks from being replaced by those of the checkpoint.

    Args:
        trainer: the trainer.
        callback_states: of the checkpoint; changed in place, before they are loaded.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        state = callback_states.get(callback.state_key)
        if isinstance(callback, EarlyStopping) and state is not None:
            state["patience"] = callback.patience
        if isinstance(callback, ModelCheckpoint) and state is not None and callback.save_top_k > 0:
            kept = sorted(state["best_k_models"].items(), key=lambda item: item[1], reverse=callback.mode == "max")
            if len(kept) > callback.save_top_k:  # the files of the others stay; Lightning would delete none any more
                kept = kept[: callback.save_top_k]
                state |= {"best_k_models": dict(kept), "kth_best_model_path": kept[-1][0], "kth_value": kept[-1][1]}


def describe_optimizer(optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
    """Return what a recipe makes of an optimizer and a scheduler before their first step, as plain values."""
    groups = [{**settings, "size": len(group["params"])} for settings, group in iter_settings(optimizer)]
    schedule = None if scheduler is None else {**scheduler.state_dict(), "class": class_path(scheduler)}
    return deepcopy({"class": class_path(optimizer), "groups": groups, "scheduler": schedule})


def class_path(instance: object) -> str:
    """Return module and name of an object's class."""
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def iter_settings(optimizer: Optimizer) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the settings of every parameter group, and the group.

    Settings are what the optimizer's constructor takes and what a scheduler adds; anything else in a group, such as the
    step count of a schedule-free optimizer, is state.
    """
    parameters = inspect.signature(type(optimizer)).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    state = set() if takes_any else optimizer.defaults.keys() - parameters.keys()
    ignored = {"params", "param_names", *state}
    return [
        ({name: value for name, value in group.items() if name not in ignored}, group)
        for group in optimizer.param_groups
    ]


def regroup_parameters(
    state: dict[str, Any], groups: Sequence[dict[str, Any]], alternatives: Sequence[Sequence[dict[str, Any]]]
) -> None:
    """Convert the state of an optimizer to other parameter groups of the same parameters.

    Args:
        state: a state dict of the optimizer; changed in place.
        groups: the parameter groups of now.
        alternatives: the parameter groups that it can be of.

    Raises:
        UserError: it is of none of them.
    """
    sizes = [len(group["params"]) for group in state["param_groups"]]
    matching = next((each for each in alternatives if [len(group["params"]) for group in each] == sizes), None)
    if matching is None:
        raise UserError(
            f"ckpt_path: the checkpoint's optimizer has {sum(sizes)} parameters in groups of {sizes}, which are not "
            "those of this recipe; take the recipe of the checkpoint, or start a new run from `lit-rlhf export`"
        )
    saved = {
        parameter: (number, group)
        for group, current in zip(state["param_groups"], matching)
        for number, parameter in zip(group["params"], current["params"])
    }
    state["param_groups"] = [
        {**saved[group["params"][0]][1], "params": [saved[parameter][0] for parameter in group["params"]]}
        for group in groups
    ]


def restore_recipe(optimizer: Optimizer, scheduler: Any, recipe: dict[str, Any], steps: int) -> None:
    """Give an optimizer that was loaded from a checkpoint the settings of the recipe; its state stays.

    Args:
        optimizer: the optimizer.
        scheduler: a new scheduler of it, or None; it gets the state of a run that had it from the beginning.
        recipe: what `describe_optimizer` returned before the checkpoint was loaded.
        steps: optimizer steps of the checkpoint.

    Raises:
        UserError: the scheduler has no further step.
    """
    for (_, group), settings in zip(iter_settings(optimizer), recipe["groups"]):
        group.update({name: deepcopy(value) for name, value in settings.items() if name != "size"})
    optimizer.load_state_dict(optimizer.state_dict())  # step counts are on the device that `fused` needs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer took no step before the scheduler
        try:
            if scheduler is not None:
                step_scheduler(scheduler, steps)
        except ValueError as problem:
            raise UserError(
                f"scheduler: the run is at step {steps:,}, and {class_path(scheduler)}: {problem}"
            ) from None


def step_scheduler(scheduler: Any, steps: int) -> None:
    """Bring a new scheduler to where it is after `steps` steps."""
    # a factor of the step alone; other schedules compute a rate from the one before, or count
    if steps and (type(scheduler) is LambdaLR or isinstance(scheduler, TrainerLengthSchedule)):
        scheduler.last_epoch, scheduler._step_count, steps = steps - 1, steps, 1
    for _ in range(steps):
        scheduler.step()


def check_optimizer_state(optimizer: Optimizer, make_optimizer: Callable[[Any], Optimizer]) -> None:
    """Refuse a state that lacks what the settings of an optimizer need, such as `amsgrad`.

    Args:
        optimizer: after a checkpoint was loaded.
        make_optimizer: makes one with the same settings.

    Raises:
        UserError: names what is missing.
    """
    states = [(parameter, state) for parameter, state in optimizer.state.items() if state]
    if not states:
        return
    probe = torch.nn.Parameter(torch.zeros(1, device=states[0][0].device))
    probe.grad = torch.zeros_like(probe)
    other = make_optimizer([{"params": [probe]}])
    other.step(lambda: 0.0)
    missing = {name for _, state in states for name in other.state[probe].keys() - state.keys()}
    if missing:
        raise UserError(
            f"ckpt_path: the checkpoint's {type(optimizer).__name__} has no {min(missing)}, which its settings need "
            "now; take the settings of the checkpoint, or start a new run from `lit-rlhf export`"
        )
