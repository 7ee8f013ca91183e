"""Loss on held-out text: what following instructions costs in language modeling (the paper's alignment tax)."""

from collections.abc import Iterator, Sequence

import torch

from lit_rlhf.data.pretraining import TextBlock, collate_blocks, load_text_blocks
from lit_rlhf.data.sources import DataSource, held_rows, source_name, stream_rows
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import hash_texts
from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel
from lit_rlhf.evaluation.results import MetricValue, Suite, SuiteResult, compute_paired_metric
from lit_rlhf.models.lm_loss import causal_lm_loss
from lit_rlhf.models.loading import load_config, max_positions


class TextLoss(Suite):
    """Mean next-token loss on text, in nats per token: of the text in blocks of equal length, as in pretraining.

    Few-shot prefixes and best-of-n do not apply. Losses of models with other tokenizers are not comparable.

    Args:
        paths: name -> text in any format that `PretrainingDataModule` reads, and that no model was trained on.
        seq_len: tokens per block; each but the first is a target.
        limit: use the first so many blocks of each text; None for all.
    """

    def __init__(self, paths: dict[str, DataSource], seq_len: int = 512, limit: int | None = None) -> None:
        if not paths or seq_len < 2 or (limit is not None and limit < 1):
            raise UserError(f"text loss: it needs a text, seq_len of 2 or more and a limit of 1 or more, got {limit}")
        self.paths, self.seq_len, self.limit = {name: held_rows(path) for name, path in paths.items()}, seq_len, limit

    def check(self, models: Sequence[EvaluatedModel]) -> None:
        """See `Suite.check`; blocks must fit the positions of every model."""
        for path in self.paths.values():
            stream_rows(path)
        for model in models:
            limit = max_positions(load_config(model.source, model.spec.loading))
            if limit is not None and self.seq_len > limit:
                raise UserError(
                    f"text loss: seq_len {self.seq_len:,} exceeds the {limit:,} positions of model {model.name!r}; "
                    "lower seq_len"
                )

    def run(self, model: EvaluatedModel, baseline: EvaluatedModel) -> SuiteResult:
        """See `Suite.run`."""
        metrics: dict[str, MetricValue] = {}
        for name, path in self.paths.items():
            blocks = load_text_blocks(path, model.tokenizer, self.seq_len)[: self.limit]
            losses = self._compute_losses(model, blocks, source_name(path))
            metrics[name] = compute_paired_metric(losses, "nats", "lower")
        return SuiteResult(metrics, sum(metric.count for metric in metrics.values()))

    def _compute_losses(self, model: EvaluatedModel, blocks: Sequence[TextBlock], name: str) -> list[float]:
        """Return the mean loss of each block."""
        ids = [block.input_ids.tolist() for block in blocks]
        key = {"text loss": model.fingerprint, "of": hash_texts([tuple(row) for row in ids])}

        def compute(missing: list[int]) -> Iterator[tuple[int, float]]:
            for index in missing:  # one at a time: a batch would not be faster, and its logits are large
                tensors = collate_blocks([blocks[index]], 1.0)[:3]
                input_ids, attention_mask, loss_mask = (each.to(model.model.device) for each in tensors)
                with torch.no_grad():
                    loss, targets = causal_lm_loss(model.model, input_ids, loss_mask, attention_mask)
                yield index, float(loss / targets)

        return model.cache.get_or_compute_rows(f"{model.name}: loss on {name}", key, len(ids), compute)
