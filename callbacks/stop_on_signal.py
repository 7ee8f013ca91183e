"""Stop training at a signal, with a checkpoint at the next optimizer step."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf.checkpoints import Stoppable

CHECKPOINT_NAME = "stopped.ckpt"
REQUEUE_SIGNAL = signal.SIGUSR1


class StoppedBySignal(SystemExit):
    """Training was stopped by a signal.

    Attributes:
        signal: the signal.
        checkpoint: path of the checkpoint; None if none was written.
    """

    def __init__(self, number: int, checkpoint: Path | None) -> None:
        super().__init__(128 + number)
        self.signal, self.checkpoint = signal.Signals(number), checkpoint


class StopOnSignal(Callback):
    """At SIGTERM or Ctrl-C, finish the current optimizer step, write a checkpoint and stop.

    The signal of one rank is enough: the ranks synchronize after every optimizer step and stop at the same one. After a
    signal during a rollout or a validation, training stops at the first step that follows. A second signal stops at
    once, without a checkpoint.

    The requeue signal of SLURM, which Lightning would handle in the middle of a step, is passed to Lightning after it.

    The checkpoint is `stopped.ckpt` in the folder of the first `ModelCheckpoint`; without one none is written.
    """

    def __init__(self) -> None:
        self.received_signal = 0
        self.synchronized_at = -1  # optimizer step
        self.previous_handlers: dict[int, Any] = {}
        self.launcher: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers: Lightning's own for SIGTERM starts a collective call in the middle of a step."""
        self.received_signal, self.synchronized_at = 0, trainer.global_step
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread receives signals
        numbers = [signal.SIGINT, signal.SIGTERM]
        if SLURMEnvironment.detect() and callable(signal.getsignal(REQUEUE_SIGNAL)):
            numbers.append(REQUEUE_SIGNAL)
        self.previous_handlers = {number: signal.signal(number, self.handle_signal) for number in numbers}
        self.launcher = trainer.strategy.launcher

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Store the signal; at a second one, stop at once."""
        if self.received_signal and number != REQUEUE_SIGNAL:
            if self.launcher is not None:
                self.launcher.kill(signal.SIGKILL)  # the other ranks that this process started
            raise StoppedBySignal(number, None)
        self.received_signal = self.received_signal or number
        text = f"{signal.Signals(number).name}: stopping after this optimizer step; once more to stop at once\n"
        os.write(2, text.encode())  # print is not reentrant

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Synchronize after every optimizer step."""
        if trainer.global_step > self.synchronized_at:
            self.stop_if_signaled(trainer)

    def stop_if_signaled(self, trainer: Trainer) -> None:
        """Write a checkpoint and stop all ranks if any received a signal; a collective call.

        Raises:
            StoppedBySignal: some rank received a signal.
        """
        self.synchronized_at = trainer.global_step
        if not trainer.strategy.reduce_boolean_decision(bool(self.received_signal), all=False):
            return
        path = None
        if isinstance(trainer.lightning_module, Stoppable):
            trainer.lightning_module.prepare_stop()
        if self.received_signal == REQUEUE_SIGNAL:
            self.previous_handlers[REQUEUE_SIGNAL](REQUEUE_SIGNAL, None)
        elif not trainer.fast_dev_run and (  # type: ignore[attr-defined]
            folders := [each.dirpath for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
        ):
            path = Path(folders[0] or trainer.default_root_dir) / CHECKPOINT_NAME
            trainer.save_checkpoint(path, weights_only=False)
        raise StoppedBySignal(self.received_signal or signal.SIGTERM, path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the previous handlers."""
        self.restore_handlers()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the previous handlers."""
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}
