"""Shift a reward model so that the labelers' demonstrations score 0 on average (App. C.2)."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_rlhf.callbacks.ema import averaged_weights
from lit_rlhf.checkpoints import set_saved_step
from lit_rlhf.data.demonstrations import tokenize_demonstrations
from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.prompts import get_text_settings
from lit_rlhf.data.records import Demonstration
from lit_rlhf.data.report import DataReader, DatasetReport
from lit_rlhf.data.sources import DataSource, held_rows, read_rows, source_name
from lit_rlhf.errors import UserError
from lit_rlhf.importing import Function
from lit_rlhf.models.scoring import score_rows


class CenterScores(Callback, DataReader):
    """Set the shift of the reward model after every validation and epoch, and at the end of training.

    The loss depends on score differences only, so the shift does not change training; it gives the KL coefficient of
    PPO a fixed meaning and the critic a good start. It is part of exports, of `last.ckpt`, and of checkpoints that are
    written after a validation or an epoch. With `EMA` it is that of the average, which is exported. Loggers get
    `centering/shift` and `centering/scale`.

    Args:
        path: demonstrations: any source of `DemonstrationDataModule`.
        format: their format.
        template: prompt template of the demonstrations; by default that of the data module.
        batch_size: demonstrations per forward pass.
    """

    data_role = "demonstrations for centering"

    def __init__(
        self,
        path: DataSource,
        format: str | Function = "auto",
        template: str | None = None,
        batch_size: int = 64,
    ) -> None:
        self.path, self.format, self.template, self.batch_size = held_rows(path), format, template, batch_size
        self.rows: list[list[int]] | None = None  # token ids, read in `setup`
        self.centered_at = -1  # optimizer step

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Load the rows, once, with the template and length limits of the comparisons."""
        if stage != "fit" or self.rows is not None:
            return
        if sum(isinstance(callback, CenterScores) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise UserError("callbacks: scores are centered in one way; keep one of CenterScores, StandardizeScores")
        self.rows = self.load_rows(trainer, pl_module)

    def load_rows(self, trainer: Trainer, pl_module: Any) -> list[list[int]]:
        """Return the token ids of the rows that define shift and scale."""
        own_template, lengths = get_text_settings(trainer.datamodule)  # type: ignore[attr-defined]
        report = DatasetReport(source_name(self.path))
        records = read_records(read_rows(self.path), "demonstration", Demonstration, self.format, report)
        template = PromptTemplate(pl_module.tokenizer, self.template or own_template)
        rows = tokenize_demonstrations(records, template, lengths, report)
        report.raise_if_empty("demonstration")
        report.print_table()
        self.reports = (report,)
        return [row.input_ids for row in rows]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Keep the checkpoint callback from saving the step again within the next accumulation."""
        if self.centered_at == trainer.global_step:
            set_saved_step(trainer, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Center before the checkpoint callback writes."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.center(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Center, unless a validation did since the last step: the checkpoint callback may write here, too."""
        if self.centered_at != trainer.global_step:
            self.center(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Center before an export."""
        if self.centered_at != trainer.global_step:
            self.center(trainer, pl_module)

    def center(self, trainer: Trainer, pl_module: Any) -> None:
        """Score the rows and set shift and scale of the model."""
        assert self.rows is not None
        model = pl_module.model
        scores = self.compute_scores(trainer, pl_module)  # with the current shift and scale
        raw_scores = scores * float(model.scale) + float(model.shift)
        shift, scale = self.compute_shift_and_scale(raw_scores, float(model.scale))
        model.center(shift, scale)
        self.centered_at = trainer.global_step
        set_saved_step(trainer, -1)  # a checkpoint of this step lacks the new shift
        for logger in trainer.loggers:
            logger.log_metrics({"centering/shift": shift, "centering/scale": scale}, step=trainer.global_step)
        rank_zero_info(
            f"centered: the {len(self.rows):,} {self.describe_rows()} scored {float(scores.mean()):+.4f} on average",
            extra={"brief": ""},  # at every validation
        )

    def describe_rows(self) -> str:
        """Return a description of the rows, for the log."""
        return f"demonstrations of {source_name(self.path)}"

    def compute_shift_and_scale(self, raw_scores: Tensor, scale: float) -> tuple[float, float]:
        """Return shift and scale.

        Args:
            raw_scores: scores of the rows without shift and scale, (n,) float64.
            scale: the current scale of the model.
        """
        return float(raw_scores.mean()), scale

    def compute_scores(self, trainer: Trainer, pl_module: Any) -> Tensor:
        """Return the scores of the rows, (n,) float64."""
        assert self.rows is not None
        with trainer.precision_plugin.forward_context(), averaged_weights(trainer, pl_module):
            return score_rows(pl_module.model, self.rows, pl_module.tokenizer.pad_token_id, self.batch_size).double()
