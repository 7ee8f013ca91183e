"""Step 1 of the paper: supervised fine-tuning (§3.5, App. C.1)."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from lit_rlhf.data.batches import PretrainingBatch, PromptBatch, TokenBatch
from lit_rlhf.data.own_batches import OwnRows, collate_targets, tokenize_targets
from lit_rlhf.errors import UserError
from lit_rlhf.generation import CachedGenerator, SamplingParams
from lit_rlhf.hyperparameters import save_settings
from lit_rlhf.models.given import ModelSource, TokenizerSource, resolve_model
from lit_rlhf.models.lm_loss import causal_lm_loss
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.pretrained import resolve_attention
from lit_rlhf.modules.answers import answer_prompts, collate_answerable
from lit_rlhf.modules.base import LitModule
from lit_rlhf.packing.varlen_attention import varlen_unsupported_reason
from lit_rlhf.strategies import meta_init_except_rank_zero, shard_model, tensor_parallel_size


class SFTModule(LitModule):
    """Next-token cross-entropy on the target tokens of a batch: completions of demonstrations, or full texts.

    Args:
        model: folder or hub name of a causal language model; or the model, which is trained in place, see `LitModule`.
        optimizer: a callable from parameter groups to an optimizer (paper: Adam, β₁ 0.9, β₂ 0.95).
        scheduler: a callable from the optimizer to a scheduler, stepped every optimizer step.
        dropout: residual dropout (paper: 0.2).
        adapter: train low-rank adapters instead of all weights.
        loading: how weights and tokenizer are loaded.
        tokenizer: the model's tokenizer, or the folder of one; by default that of the model's folder.
        sampling: how `predict_step` answers.
    """

    export_prefix = "model."
    lineage_role = "sft"

    def __init__(
        self,
        model: ModelSource | Path,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
        dropout: float = 0.0,
        adapter: LoRA | None = None,
        loading: ModelLoadingConfig | None = None,
        tokenizer: TokenizerSource | None = None,
        sampling: SamplingParams | None = None,
    ) -> None:
        super().__init__(resolve_model(model, "model"), loading, adapter, optimizer, scheduler, tokenizer)
        self.dropout, self.sampling = dropout, sampling or SamplingParams()
        self.model: PreTrainedModel
        self.validation_loss = MeanMetric()
        save_settings(self, locals())

    @property
    def exported_model(self) -> PreTrainedModel:
        """The language model."""
        return self.model

    def setup(self, stage: str) -> None:
        """See `LitModule`; refuse dropout where tensors are split."""
        super().setup(stage)
        if self.dropout and tensor_parallel_size(self.trainer.strategy) > 1:
            raise UserError(
                "model.dropout: ranks that split tensors would each drop something else; set it to 0, or "
                "trainer.strategy.tensor_parallel_size to 1"
            )

    def check_packing(self, max_tokens: int, setting: str) -> None:
        """Refuse packed rows if the model's attention would cross their sequences.

        Args:
            max_tokens: length of the longest sequence.
            setting: the setting that asks for packing, for the error message.
        """
        config, given = self.model_config, not isinstance(self.sources["model"], str)
        attention = config._attn_implementation if given else resolve_attention(config, self.loading)
        reason = varlen_unsupported_reason(config, max_tokens, attention)
        if reason:
            raise UserError(f"{setting}: {self.model_path!r} takes 'group_by_length', but no packed rows: {reason}")

    def configure_model(self) -> None:
        """Load the model, once."""
        if hasattr(self, "model"):
            return
        with meta_init_except_rank_zero(self.strategy):
            self.model = load_causal_lm(self.sources["model"], self.tokenizer, self.loading, self.dropout)
            self.add_adapter(self.model)
        shard_model(self.model, self.strategy)

    def loss(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Return the sum of the cross-entropy over the batch's targets, in nats, and how many there are."""
        return causal_lm_loss(
            self.model, batch.input_ids, batch.loss_mask, batch.attention_mask, batch.sequence_lengths
        )

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Return the normalized loss; a batch of the pretraining mix is logged under its own name."""
        total, count = self.loss(batch)
        name = "pretraining/loss" if isinstance(batch, PretrainingBatch) else "train/loss"
        self.step_means.add(name, total, count)
        self.step_means.add("tokens", batch.attention_mask.sum())
        return self.normalize_loss(total, batch.normalizer)

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Add to the mean over all tokens of the validation set, of all ranks."""
        total, count = self.loss(batch)
        if count > 0:
            self.validation_loss.update(total / count, count)
        self.log(self.metric_name("validation/loss"), self.validation_loss, prog_bar=True)

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """See `validation_step`; the metric is `test/loss`."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return the rows of the prompts, each with a `response`."""
        return answer_prompts(self, CachedGenerator(), self.sampling, batch)

    def collate(self, rows: OwnRows) -> TokenBatch | PromptBatch:
        """See `LitModule`: demonstrations, texts or token ids; to `predict`, prompts."""
        pad_id: int = self.tokenizer.pad_token_id
        if self._trainer is not None and self.trainer.predicting:
            return collate_answerable(self, rows, self.sampling)
        examples = tokenize_targets(rows, self.template)
        self.check_max_positions(max(len(each.input_ids) for each in examples), "the longest row of a batch", "it")
        return collate_targets(examples, self.num_averaged_batches, pad_id)
