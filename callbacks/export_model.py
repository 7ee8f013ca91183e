"""Write a transformers folder when training ends."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_rlhf.models.export import export_model, make_directory


class ExportModel(Callback):
    """Exports the module's model and tokenizer at the end of training, for the next stage or plain transformers.

    Args:
        directory: the folder, taken from the Trainer's default_root_dir; created before training starts, so that one
            which cannot be written is refused then.
    """

    def __init__(self, directory: str = "model") -> None:
        self.directory = Path(directory)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Create the folder."""
        if stage == "fit":
            self.directory = Path(trainer.default_root_dir) / self.directory
            if trainer.is_global_zero:
                make_directory(self.directory)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write, on rank zero; under sharded weights `lit-rlhf export` of the checkpoint does it instead."""
        from lit_rlhf.strategies import gathered

        with gathered(pl_module):
            if trainer.is_global_zero:
                export_model(pl_module.exported, pl_module.tokenizer, self.directory)
        trainer.strategy.barrier()
