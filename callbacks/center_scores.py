"""Shift a reward model so that the labelers' demonstrations score 0 on average (App. C.2)."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_rlhf.data.demonstrations import tokenize_demonstrations
from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.records import Demonstration
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows
from lit_rlhf.errors import UserError
from lit_rlhf.models.scoring import score_rows


class CenterScores(Callback):
    """Sets the module's centring constants after every validation and epoch, and at the end of training.

    The loss reads differences of scores only, so the shift changes nothing in training; it gives the KL coefficient of
    PPO a fixed meaning and the critic a sensible start. Exports hold it, and checkpoints written after a validation or
    an epoch. Loggers get `centering/shift` and `centering/scale`.

    Args:
        path: demonstrations: any source of `DemonstrationDataModule`.
        format: their format.
        template: how their prompts are put into words; the data module's own by default.
        batch_size: demonstrations a forward pass.
    """

    def __init__(self, path: str, format: str = "auto", template: str | None = None, batch_size: int = 64) -> None:
        self.path, self.format, self.template, self.batch_size = path, format, template, batch_size
        self.rows: list[list[int]]
        self.centred_at = -1  # optimizer step

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Read the rows, once, with the template and length limits of the comparisons."""
        if stage != "fit" or hasattr(self, "rows"):
            return
        if sum(isinstance(each, CenterScores) for each in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise UserError("callbacks: scores can be centred in one way; keep one of CenterScores, StandardizeScores")
        self.rows = self.read(trainer, pl_module)

    def read(self, trainer: Trainer, pl_module: Any) -> list[list[int]]:
        """Return the token rows that the constants are taken from."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        report = DatasetReport(self.path)
        records = read_records(read_rows(self.path), "demonstration", Demonstration, self.format, report)
        template = PromptTemplate(pl_module.tokenizer, self.template or data.template)
        rows = tokenize_demonstrations(records, template, data.lengths, report)
        report.require_some("demonstration")
        report.show()
        return [row.input_ids for row in rows]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Centre before the checkpoint callback writes."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.center(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Centre, where no validation did since the last step: the checkpoint callback may write here too."""
        if self.centred_at != trainer.global_step:
            self.center(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Centre before an export."""
        if self.centred_at != trainer.global_step:
            self.center(trainer, pl_module)

    def center(self, trainer: Trainer, pl_module: Any) -> None:
        """Score the rows and set the module's constants."""
        model = pl_module.model
        scores = self.scores(trainer, pl_module)  # by the constants so far
        shift, scale = self.constants(scores * float(model.scale) + float(model.shift), float(model.scale))
        model.centre(shift, scale)
        self.centred_at = trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics({"centering/shift": shift, "centering/scale": scale}, step=trainer.global_step)
        rank_zero_info(f"centred: the {len(self.rows):,} {self.what} scored {float(scores.mean()):+.4f} on average")

    @property
    def what(self) -> str:
        """The rows, in words."""
        return f"demonstrations of {self.path}"

    def constants(self, raw: Tensor, scale: float) -> tuple[float, float]:
        """Return shift and scale.

        Args:
            raw: the rows' scores without constants, (n,) float64.
            scale: the model's so far.
        """
        return float(raw.mean()), scale

    def scores(self, trainer: Trainer, pl_module: Any) -> Tensor:
        """Return the rows' scores, (n,) float64."""
        with trainer.precision_plugin.forward_context():
            return score_rows(pl_module.model, self.rows, pl_module.tokenizer.pad_token_id, self.batch_size).double()
