"""Quality of a reward model beyond its accuracy, at each validation: metrics, tables, and a page."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_rlhf.data.base import TokenizedDataModule
from lit_rlhf.data.collation import TokenizedRanking
from lit_rlhf.distributed import all_gather_object
from lit_rlhf.evaluation.degenerate_answers import DegenerateAnswers
from lit_rlhf.evaluation.reward_model_metrics import (
    ScoredRankings,
    compute_reward_model_metrics,
    degenerate_win_rates,
    summarize_metrics,
)
from lit_rlhf.loggers import log_image, log_page, log_table, media_loggers
from lit_rlhf.models.scoring import score_rows
from lit_rlhf.strategies import data_parallel_group

PROBES = {  # kind of degenerate answer -> metric
    "empty": "reward_model/empty",
    "repeated_token": "reward_model/repeated_token",
    "repeated_sentence": "reward_model/repeated_sentence",
    "thanks": "reward_model/thanks",
    "prompt_copied": "reward_model/prompt_copied",
    "refusal": "reward_model/refusal",
}
REPORT_METRICS = {
    "log_loss": "reward_model/pairwise_nll",
    "length_correlation_within": "reward_model/length_correlation",
}
TABLES = ("by_size", "by_margin", "by_length", "degenerate")
NUM_EXAMPLES = 5


class RewardModelReport(Callback):
    """Report on the scores of a validation, which `RewardModule.validation_step` returns.

    Logs `reward_model/…` (docs/metrics.md); a WandbLogger also gets accuracy by size, margin and length, the degenerate
    answers, the reliability diagram and the page. `reward_quality.html` and `reward_quality.json` in the log folder
    have the history over all validations of the run.

    Args:
        probes: number of prompts whose best completion is compared with degenerate answers; 0: none.
        thanks: text of an answer that only thanks.
        refusal: text of a refusal.
        batch_size: answers per forward pass.
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
        """Clear the scores of the last validation."""
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
        """Store the scores of a batch."""
        if not trainer.sanity_checking:
            length = batch.attention_mask.sum(1) - batch.prompt_length
            self.parts.append(ScoredRankings(*(t.cpu() for t in (outputs, batch.ranking_index, batch.ranks, length))))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Report on the scores of all ranks; a collective call."""
        parts_by_rank = all_gather_object(self.parts, data_parallel_group(trainer.strategy))
        scored = concatenate_rankings([part for parts in parts_by_rank for part in parts])
        if scored is None:
            return
        report = {"step": trainer.global_step, **compute_reward_model_metrics(scored)}
        data = trainer.datamodule  # type: ignore[attr-defined]
        if self.probes and isinstance(data, TokenizedDataModule) and data.validation_rows:
            report |= self.score_degenerate_answers(trainer, pl_module, list(data.validation_rows))
        summary = {"step": trainer.global_step, **summarize_metrics(report)}
        self.history = [row for row in self.history if row["step"] < trainer.global_step] + [summary]
        for row in report.get("degenerate", []):
            pl_module.log(PROBES[row["kind"]], row["outscores"])
        for name, metric in REPORT_METRICS.items():
            if report.get(name) is not None:
                pl_module.log(metric, report[name])
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is a collective call
        if trainer.is_global_zero:
            self.write_report(trainer, {**report, "history": self.history}, folder)

    def score_degenerate_answers(
        self, trainer: Trainer, pl_module: Any, rows: list[TokenizedRanking]
    ) -> dict[str, Any]:
        """Compare the scores of degenerate answers with those of the best completions.

        Every rank scores all of them, as sharded weights require.

        Args:
            trainer: the trainer.
            pl_module: the reward module.
            rows: the validation rows.

        Returns:
            the `degenerate` and `examples` of the report.
        """
        tokenizer = pl_module.tokenizer
        degenerate_answers = DegenerateAnswers(tokenizer, self.thanks, self.refusal)
        max_tokens = max(len(row.prompt) + len(completion) for row in rows for completion in row.completions)
        chosen_rows = rows[:: -(-len(rows) // self.probes)]  # evenly spaced, the same at every validation
        prompts, bests, answers = [], [], []
        for row in chosen_rows:
            best = row.completions[row.ranks.index(0)]
            prompts.append(row.prompt)
            bests.append(best)
            answers.append(degenerate_answers.build(row.prompt, best, max(max_tokens - len(row.prompt), 1)))
        columns = {"best": bests, **{kind: [answer[kind] for answer in answers] for kind in PROBES}}
        token_rows = [prompt + answer for column in columns.values() for prompt, answer in zip(prompts, column)]
        with trainer.precision_plugin.forward_context():
            flat_scores = score_rows(pl_module.model, token_rows, tokenizer.pad_token_id, self.batch_size)
        scores = dict(zip(columns, flat_scores.view(len(columns), len(prompts))))
        for kind in PROBES:
            is_best = torch.tensor([answer == best for answer, best in zip(columns[kind], bests)])
            scores[kind] = scores[kind].masked_fill(is_best, torch.nan)
        win_rates = degenerate_win_rates(scores["best"], {kind: scores[kind] for kind in PROBES})
        return {"degenerate": win_rates, "examples": collect_examples(tokenizer, prompts, columns, scores)}

    def write_report(self, trainer: Trainer, report: dict[str, Any], folder: Path) -> None:
        """Write the page, and log it with its tables and diagram where a logger takes them."""
        from lit_rlhf.evaluation.reports.reward_model_page import write_reward_model_report
        from lit_rlhf.evaluation.reports.reward_model_plots import render_reliability_image

        page = write_reward_model_report(report, folder)
        if len(report["history"]) == 1:
            rank_zero_info(
                f"quality of the reward model, updated at every validation: {page}", extra={"brief": f"report: {page}"}
            )
        loggers, step = media_loggers(trainer.loggers), trainer.global_step
        for name in TABLES:
            log_table(loggers, f"reward_model_report/{name}", report.get(name, []), step)
        if loggers and report.get("reliability"):
            log_image(loggers, "reward_model_report/reliability", render_reliability_image(report), step)
        log_page(loggers, "reward_model_report/page", page, step)

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        self.history = list(state_dict["history"])


def concatenate_rankings(parts: list[ScoredRankings]) -> ScoredRankings | None:
    """Concatenate parts and renumber their rankings; None if none is left.

    Rankings with nothing but ties are dropped: they fill the batches of ranks that have no ranking left.
    """
    columns: list[tuple[Tensor, ...]] = []
    number = 0
    for part in parts:
        for old_number in torch.unique(part.ranking_index):
            rows = part.ranking_index == old_number
            if len(torch.unique(part.ranks[rows])) > 1:
                ranking = torch.full_like(part.ranking_index[rows], number)
                columns.append((part.scores[rows], ranking, part.ranks[rows], part.length[rows]))
                number += 1
    return ScoredRankings(*(torch.cat(column) for column in zip(*columns))) if columns else None


def collect_examples(
    tokenizer: Any, prompts: list[list[int]], columns: dict[str, list[list[int]]], scores: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """Return the first prompts with text and score of every answer.

    Args:
        tokenizer: decodes the token ids.
        prompts: token ids of the prompts.
        columns: kind -> token ids of the answer to each prompt.
        scores: kind -> scores, (P,); NaN for answers to leave out.
    """
    rows = []
    for index, prompt in enumerate(prompts[:NUM_EXAMPLES]):
        answers = [
            {"kind": kind, "text": tokenizer.decode(answers[index]), "score": float(scores[kind][index])}
            for kind, answers in columns.items()
            if not scores[kind][index].isnan()
        ]
        rows.append({"prompt": tokenizer.decode(prompt), "answers": answers})
    return rows
