"""How good a reward model is beyond its accuracy, at each validation: numbers, tables, and a page."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_rlhf.distributed import all_gather_object
from lit_rlhf.evaluation.degenerate_answers import DegenerateAnswers
from lit_rlhf.evaluation.reward_model_metrics import ScoredRankings, degenerate_shares, figures_of, summary_of
from lit_rlhf.models.scoring import score_rows
from lit_rlhf.strategies import data_group

PROBES = {
    "empty": "reward_model/empty",
    "repeated_token": "reward_model/repeated_token",
    "repeated_sentence": "reward_model/repeated_sentence",
    "thanks": "reward_model/thanks",
    "prompt_copied": "reward_model/prompt_copied",
    "refusal": "reward_model/refusal",
}
NUMBERS = {"log_loss": "reward_model/pairwise_nll", "length_correlation_within": "reward_model/length_correlation"}
TABLES = ("by_size", "by_margin", "by_length", "degenerate")
EXAMPLES = 5


class RewardModelReport(Callback):
    """Collects the scores of a validation (`RewardModule.validation_step` returns them) and reports on them.

    Logs `quality/…`, which docs/metrics.md explains; a logger with tables and images (WandbLogger) gets accuracy by
    size, margin and length, the degenerate answers and the reliability diagram. `reward_quality.html` and its JSON lie
    in the log folder, with the course over all validations of the run.

    Args:
        probes: prompts whose best completion is compared with degenerate answers; 0 switches that off.
        thanks: the words of an answer that only thanks.
        refusal: the words of a refusal.
        batch_size: answers a forward pass.
    """

    def __init__(
        self,
        probes: int = 64,
        thanks: str = "Thank you!",
        refusal: str = "I am sorry, but I cannot help with that.",
        batch_size: int = 64,
    ) -> None:
        self.probes, self.thanks, self.refusal, self.batch_size = probes, thanks, refusal, batch_size
        self.parts: list[ScoredRankings] = []
        self.history: list[dict[str, Any]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self.parts = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the scores of a batch."""
        if not trainer.sanity_checking:
            length = batch.attention_mask.sum(1) - batch.prompt_length
            self.parts.append(ScoredRankings(*(t.cpu() for t in (outputs, batch.ranking, batch.ranks, length))))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Report on the whole validation set."""
        of_ranks = all_gather_object(self.parts, data_group(trainer.strategy))
        scored = joined([part for parts in of_ranks for part in parts])
        if scored is None:
            return
        report = {"step": trainer.global_step, **figures_of(scored)}
        rows = getattr(trainer.datamodule, "validation_rows", [])  # type: ignore[attr-defined]
        if self.probes and rows:
            report |= self.probe(trainer, pl_module, list(rows))
        summary = {"step": trainer.global_step, **summary_of(report)}
        self.history = [row for row in self.history if row["step"] < trainer.global_step] + [summary]
        for row in report.get("degenerate", []):
            pl_module.log(PROBES[row["kind"]], row["outscores"])
        for name, metric in NUMBERS.items():
            if report.get(name) is not None:
                pl_module.log(metric, report[name])
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is asked of every rank
        if trainer.is_global_zero:
            self.show(trainer, {**report, "history": self.history}, folder)

    def probe(self, trainer: Trainer, pl_module: Any, every: list[Any]) -> dict[str, Any]:
        """Score degenerate answers to prompts of the validation rows against the best real ones.

        Every rank scores all of them: with sharded weights all must make the same passes.
        """
        tokenizer = pl_module.tokenizer
        make = DegenerateAnswers(tokenizer, self.thanks, self.refusal)
        widest = max(len(row.prompt) + len(each) for row in every for each in row.completions)
        chosen = every[:: -(-len(every) // self.probes)]  # spread over the set, the same at every validation
        prompts, bests, answers = [], [], []
        for row in chosen:
            best = row.completions[row.ranks.index(0)]
            prompts.append(row.prompt)
            bests.append(best)
            answers.append(make.to(row.prompt, best, max(widest - len(row.prompt), 1)))
        columns = {"best": bests, **{kind: [each[kind] for each in answers] for kind in PROBES}}
        rows = [prompt + answer for column in columns.values() for prompt, answer in zip(prompts, column)]
        with trainer.precision_plugin.forward_context():
            flat = score_rows(pl_module.model, rows, tokenizer.pad_token_id, self.batch_size)
        scores = dict(zip(columns, flat.view(len(columns), len(prompts))))
        for kind in PROBES:
            same = torch.tensor([answer == best for answer, best in zip(columns[kind], bests)])
            scores[kind] = scores[kind].masked_fill(same, torch.nan)
        shares = degenerate_shares(scores["best"], {kind: scores[kind] for kind in PROBES})
        return {"degenerate": shares, "examples": examples(tokenizer, prompts, columns, scores)}

    def show(self, trainer: Trainer, report: dict[str, Any], folder: Path) -> None:
        """Write the page, and tables and the diagram to loggers that take them."""
        from lit_rlhf.evaluation.reports.reward_model_page import write_quality  # here, for most runs draw nothing
        from lit_rlhf.evaluation.reports.reward_model_plots import reliability_image

        page = write_quality(report, folder)
        if len(report["history"]) == 1:
            rank_zero_info(f"quality of the reward model, at every validation: {page}")
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                for name in TABLES:
                    if report.get(name):
                        columns = list(report[name][0])
                        data = [[row[column] for column in columns] for row in report[name]]
                        logger.log_table(f"reward_quality.{name}", columns=columns, data=data)
            if hasattr(logger, "log_image") and report.get("reliability"):
                logger.log_image("reward_quality.reliability", [reliability_image(report)])

    def state_dict(self) -> dict[str, Any]:
        """The course of the run so far."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self.history = list(state_dict["history"])


def joined(parts: list[ScoredRankings]) -> ScoredRankings | None:
    """Return one table of all parts with rankings numbered through, less those without a pair; None without any.

    A ranking with ties alone is no real one: it fills the batch of a rank that has none left.
    """
    kept: list[tuple[Tensor, ...]] = []
    number = 0
    for part in parts:
        for place in torch.unique(part.ranking):
            own = part.ranking == place
            if len(torch.unique(part.ranks[own])) > 1:
                owner = torch.full_like(part.ranking[own], number)
                kept.append((part.scores[own], owner, part.ranks[own], part.length[own]))
                number += 1
    return ScoredRankings(*(torch.cat(column) for column in zip(*kept))) if kept else None


def examples(
    tokenizer: Any, prompts: list[list[int]], columns: dict[str, list[list[int]]], scores: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """Return the first prompts with every answer's text and score."""
    rows = []
    for place, prompt in enumerate(prompts[:EXAMPLES]):
        answers = [
            {"kind": kind, "text": tokenizer.decode(answers[place]), "score": float(scores[kind][place])}
            for kind, answers in columns.items()
            if not scores[kind][place].isnan()
        ]
        rows.append({"prompt": tokenizer.decode(prompt), "answers": answers})
    return rows
