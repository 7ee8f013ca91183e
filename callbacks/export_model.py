"""Write a transformers folder when training ends."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_rlhf.callbacks.ema import restore_averages
from lit_rlhf.models.export import export_model, export_weights, make_directory
from lit_rlhf.strategies import full_state_dict, is_sharded


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
        """Write, on rank zero, with the weights of all ranks where they are sharded; an average where one is kept."""
        restore_averages(trainer, pl_module)
        model, tokenizer = pl_module.exported, pl_module.tokenizer
        if is_sharded(model):
            weights = full_state_dict(model)  # every rank takes part
            if trainer.is_global_zero:
                export_weights(model, weights, pl_module.adapter, tokenizer, self.directory)
        elif trainer.is_global_zero:
            export_model(model, tokenizer, self.directory)
        trainer.strategy.barrier()
