"""Write a transformers folder, or a PEFT folder, when training ends."""

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.callbacks.ema import restore_averages
from lit_rlhf.callbacks.lineage import Lineage, find_lineage
from lit_rlhf.errors import UserError
from lit_rlhf.lineage.fingerprints import remember_hashes
from lit_rlhf.lineage.hub import check_push, push_folder
from lit_rlhf.lineage.records import LineageRecord
from lit_rlhf.lineage.writing import finish_export
from lit_rlhf.models.export import (
    check_exportable,
    check_plain_base,
    export_adapter,
    export_checkpoint,
    export_model,
    export_weights,
)
from lit_rlhf.strategies import full_state_dict, is_sharded


class ExportModel(Callback):
    """Export model and tokenizer at the end of training, for the next stage or plain transformers.

    The folder also gets `lineage.json`, which says where the model comes from, and a model card, `README.md`.

    Args:
        directory: output folder, relative to the Trainer's default_root_dir. That it can be written is checked before
            training starts; an earlier one is replaced at the end. A dry run (fast_dev_run) exports nothing.
        weights: "last" weights, or the "best" ones: those of the checkpoint that ModelCheckpoint kept by its monitor.
        push: repository of the Hugging Face hub to push the folder to, OWNER/NAME. That the token may write there is
            checked before training starts.
        private: create the repository as a private one.
        format: of a run with an adapter: "merged" into full weights, or "peft", a folder of the adapter alone, which
            names its base.
    """

    def __init__(
        self,
        directory: str | Path = "model",
        weights: Literal["last", "best"] = "last",
        push: str | None = None,
        private: bool = False,
        format: Literal["merged", "peft"] = "merged",
    ) -> None:
        self.given_directory = self.directory = Path(directory)
        self.weights, self.push, self.private, self.format = weights, push, private, format

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse settings that cannot work: an unwritable folder, "best" weights or an adapter of none, a push."""
        if stage != "fit":
            return
        if self.weights == "best" and not selecting_checkpoints(trainer):
            raise UserError(
                "ExportModel: weights is 'best', but no ModelCheckpoint has a monitor; add one, or set 'last'"
            )
        module: Any = pl_module
        if self.format == "peft" and module.adapter is None:
            raise UserError("ExportModel: format is 'peft', but model.adapter is null; set one, or format to 'merged'")
        if self.format == "peft" and not module.has_base_folder:
            raise UserError("ExportModel: format is 'peft', but the base is an object, which no folder can name")
        if self.format == "peft":
            check_plain_base(module.model_path, module.loading)
        self.directory = Path(trainer.default_root_dir) / self.given_directory
        if trainer.is_global_zero:
            if self.push is not None:
                check_push(self.push)
            check_exportable(self.directory)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the weights, or their average if there is one, on rank zero; a collective call with sharded weights."""
        restore_averages(trainer, pl_module)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        best = self.best_checkpoint(trainer) if self.weights == "best" else None
        model, tokenizer = pl_module.exported_model, pl_module.tokenizer
        lineage = find_lineage(trainer)
        record = (lineage or Lineage()).finish(trainer, pl_module, "best" if best else "")  # a collective call
        written: list[LineageRecord] = []

        def finish(folder: Path) -> None:
            assert record is not None
            written.append(finish_export(record, folder, self.directory, name=self.push))

        weights = full_state_dict(model) if best is None and is_sharded(model) else None  # a collective call
        if trainer.is_global_zero:
            if best is not None:
                export_checkpoint(best, self.directory, finish=finish, format=self.format)
            elif self.format == "peft":
                base, named = (pl_module.model_path, pl_module.loading), weights or dict(model.named_parameters())
                export_adapter(model, named, pl_module.adapter, base, tokenizer, self.directory, finish)
            elif weights is not None:
                export_weights(model, weights, pl_module.adapter, tokenizer, self.directory, finish)
            else:
                export_model(model, tokenizer, self.directory, finish)
            remember_hashes(self.directory, written[0].files)
            if lineage is not None:
                lineage.mirror(trainer, written[0], self.directory)
            if self.push is not None:
                rank_zero_info(f"pushed to {push_folder(self.directory, self.push, self.private, 'Export')}")
        trainer.strategy.barrier()

    def best_checkpoint(self, trainer: Trainer) -> Path | None:
        """Return the checkpoint with the best metric, or None if training ended before one was written; say which."""
        checkpoint = selecting_checkpoints(trainer)[0]
        path = trainer.strategy.broadcast(checkpoint.best_model_path)
        score = checkpoint.best_model_score
        value = "" if score is None else f" ({checkpoint.monitor} {float(score):.4g})"
        rank_zero_info(f"ExportModel: exports {path or 'the last weights, as no checkpoint was selected'}{value}")
        return Path(path) if path else None


def selecting_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """Return the callbacks that keep a checkpoint by a metric."""
    found = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return [callback for callback in found if callback.monitor is not None]
