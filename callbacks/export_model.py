"""Write a transformers folder when training ends."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_rlhf.callbacks.ema import restore_averages
from lit_rlhf.models.export import export_model, export_weights, make_directory
from lit_rlhf.strategies import full_state_dict, is_sharded


class ExportModel(Callback):
    """Export model and tokenizer at the end of training, for the next stage or plain transformers.

    Args:
        directory: output folder, relative to the Trainer's default_root_dir. It is created before training starts, so
            that a folder that cannot be written is refused early.
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
        """Write the weights, or their average if there is one, on rank zero; a collective call with sharded weights."""
        restore_averages(trainer, pl_module)
        model, tokenizer = pl_module.exported_model, pl_module.tokenizer
        if is_sharded(model):
            weights = full_state_dict(model)  # a collective call
            if trainer.is_global_zero:
                export_weights(model, weights, pl_module.adapter, tokenizer, self.directory)
        elif trainer.is_global_zero:
            export_model(model, tokenizer, self.directory)
        trainer.strategy.barrier()
