"""Stop at a signal: a checkpoint at the next optimizer step, then the end."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

FILE = "stopped.ckpt"
REQUEUE = signal.SIGUSR1


class StoppedBySignal(SystemExit):
    """Training was stopped by a signal, in good order.

    Attributes:
        signal: which.
        checkpoint: what was written, if anything was.
    """

    def __init__(self, number: int, checkpoint: Path | None) -> None:
        super().__init__(128 + number)
        self.signal, self.checkpoint = signal.Signals(number), checkpoint


class StopOnSignal(Callback):
    """At SIGTERM or Ctrl-C finishes the optimizer step under way, writes a checkpoint and ends.

    One rank's signal is enough: at every optimizer step the ranks ask each other, and all stop at the same one. A
    signal during a rollout or a validation waits for the first step behind it. A second signal ends at once, without a
    checkpoint.

    SLURM's requeue signal, which Lightning would act on in the middle of a step, is passed on to it at that step.

    The checkpoint is `stopped.ckpt` in the folder of the first `ModelCheckpoint`; without one none is written.
    """

    def __init__(self) -> None:
        self.received = 0
        self.asked_at = -1  # optimizer steps when the ranks asked each other last
        self.before: dict[int, Any] = {}
        self.launcher: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over: Lightning's own handler for SIGTERM starts a collective call wherever a rank is."""
        self.received, self.asked_at = 0, trainer.global_step
        if threading.current_thread() is not threading.main_thread():
            return  # where no signal arrives
        numbers = [signal.SIGINT, signal.SIGTERM]
        if SLURMEnvironment.detect() and callable(signal.getsignal(REQUEUE)):
            numbers.append(REQUEUE)
        self.before = {number: signal.signal(number, self.receive) for number in numbers}
        self.launcher = trainer.strategy.launcher

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Take note; a second signal ends at once."""
        if self.received and number != REQUEUE:
            if self.launcher is not None:
                self.launcher.kill(signal.SIGKILL)  # the other ranks that this process started
            raise StoppedBySignal(number, None)
        self.received = self.received or number
        text = f"{signal.Signals(number).name}: stopping after this optimizer step; once more to stop at once\n"
        os.write(2, text.encode())  # print might be interrupted in the middle of itself

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Ask after every optimizer step."""
        if trainer.global_step > self.asked_at:
            self.stop_if_asked(trainer)

    def stop_if_asked(self, trainer: Trainer) -> None:
        """Every rank must call it, at the same step.

        Raises:
            StoppedBySignal: some rank received a signal.
        """
        self.asked_at = trainer.global_step
        if not trainer.strategy.reduce_boolean_decision(bool(self.received), all=False):
            return
        path = None
        if self.received == REQUEUE:
            self.before[REQUEUE](REQUEUE, None)
        elif folders := [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]:
            path = Path(folders[0] or trainer.default_root_dir) / FILE
            trainer.save_checkpoint(path, weights_only=False)
        raise StoppedBySignal(self.received or signal.SIGTERM, path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self.give_back()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self.give_back()

    def give_back(self) -> None:
        """Set the handlers that were there before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
