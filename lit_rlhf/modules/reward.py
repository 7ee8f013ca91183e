"""Step 2 of the paper: the reward model (§3.5 Eq. 1, App. C.2)."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryCalibrationError
from transformers import PreTrainedModel

from lit_rlhf.data.batches import RankingBatch
from lit_rlhf.data.own_batches import OwnRows, collate_own_rankings, tokenize_own_rankings
from lit_rlhf.functional import PairNormalizer, ranking_loss, ranking_pairs
from lit_rlhf.hyperparameters import save_settings
from lit_rlhf.models.export import CHECKPOINT_KEY
from lit_rlhf.models.given import TokenizerSource
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.scalar_model import ScalarModel, ScalarSource, load_scalar_model, resolve_scalar_model
from lit_rlhf.modules.base import LitModule
from lit_rlhf.packing.rankings import RankingInputs, prefix_sharing_unsupported_reason
from lit_rlhf.strategies import is_sharded, meta_init_except_rank_zero, shard_model


class RewardModule(LitModule):
    """A ranking of K completions is one batch element: K forward passes, C(K, 2) comparisons, one loss term.

    The prompt is computed once for all its completions, whose passes continue from its keys and values.

    Args:
        model: folder or hub name of a language model (SFT, or the base model), or of a reward model to train on; or
            such a model, see `LitModule`: a reward model is trained in place, of a language model a copy.
        optimizer: a callable from parameter groups to an optimizer (paper, 6B: Adam at 9e-6).
        scheduler: a callable from the optimizer to a scheduler (paper: cosine to 10 %).
        head_seed: seed of a new head, drawn from N(0, 1/√(d+1)).
        adapter: train low-rank adapters and the head instead of all weights.
        loading: how weights and tokenizer are loaded.
        pair_normalizer: what Eq. 1 divides the loss of a ranking by: its untied pairs, or all C(K, 2) pairs.
        shared_prompt: compute a prompt once for all its completions if the model supports it, and not K times.
        tokenizer: the model's tokenizer, or the folder of one; by default that of the model's folder.
    """

    export_prefix = "model.model."
    lineage_role = "reward"

    def __init__(
        self,
        model: ScalarSource | Path,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=9e-6, betas=(0.9, 0.95), weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
        head_seed: int = 0,
        adapter: LoRA | None = None,
        loading: ModelLoadingConfig | None = None,
        pair_normalizer: PairNormalizer = "untied_pairs",
        shared_prompt: bool = True,
        tokenizer: TokenizerSource | None = None,
    ) -> None:
        super().__init__(resolve_scalar_model(model, "model"), loading, adapter, optimizer, scheduler, tokenizer)
        self.head_seed, self.pair_normalizer, self.shared_prompt = head_seed, pair_normalizer, shared_prompt
        self.model: ScalarModel
        self.validation_loss, self.validation_accuracy = MeanMetric(), MeanMetric()
        self.calibration = BinaryCalibrationError(n_bins=20, norm="l1")
        save_settings(self, locals())

    @property
    def exported_model(self) -> PreTrainedModel:
        """The sequence-classification model inside."""
        return self.model.model

    def configure_model(self) -> None:
        """Load the model, once."""
        if hasattr(self, "model"):
            return
        with meta_init_except_rank_zero(self.strategy):
            self.model = load_scalar_model(self.sources["model"], self.tokenizer, self.loading, self.head_seed)
            self.add_adapter(self.model.model)
        shard_model(self.model, self.strategy)
        if is_sharded(self.model):
            from torch.distributed.fsdp import register_fsdp_forward_method

            for entry in ("score", "score_rankings"):
                register_fsdp_forward_method(self.model, entry)
        reason = self._prompt_sharing_unsupported_reason()
        how = "once for all completions of its ranking" if reason is None else f"again for every completion: {reason}"
        # as planned: of no interest but to whoever asks
        rank_zero_info(f"prompts: each is computed {how}", extra={"brief": ""} if reason is None else {})

    def _prompt_sharing_unsupported_reason(self) -> str | None:
        if not self.shared_prompt:
            return "shared_prompt is off"
        return prefix_sharing_unsupported_reason(self.model.model)

    def forward(self, batch: RankingBatch) -> Tensor:  # type: ignore[override]
        """Return one score per completion, (N,) float32."""
        rows = RankingInputs(batch.input_ids, batch.attention_mask, batch.prompt_length, batch.ranking_index)
        return self.model.score_rankings(rows, self.shared_prompt)

    def training_step(self, batch: RankingBatch, batch_idx: int) -> Tensor:
        """Return Eq. 1 for the rankings of this batch."""
        result = ranking_loss(self(batch), batch.ranking_index, batch.ranks, self.pair_normalizer)
        self.step_means.add("train/loss", result.loss, result.rankings)
        self.step_means.add("train/accuracy", result.correct, result.pairs)
        self.step_means.add("tokens", batch.attention_mask.sum())
        return self.normalize_loss(result.loss, batch.normalizer)

    def validation_step(self, batch: RankingBatch, batch_idx: int) -> Tensor:
        """Add to loss (per ranking), accuracy (per comparison, ties apart) and calibration of σ(Δ).

        Returns:
            The scores, (N,), for callbacks.
        """
        scores = self(batch)
        result = ranking_loss(scores, batch.ranking_index, batch.ranks, self.pair_normalizer)
        if result.pairs > 0:
            self.validation_loss.update(result.loss / result.rankings, result.rankings)
            self.validation_accuracy.update(result.correct / result.pairs, result.pairs)
            better, worse, _ = ranking_pairs(batch.ranking_index, batch.ranks)
            difference = scores[better] - scores[worse]
            # the probability of the preferred side by the model, and whether the labeler agrees
            self.calibration.update(torch.sigmoid(difference.abs()), (difference > 0).long())
        self.log(self.metric_name("validation/loss"), self.validation_loss, prog_bar=True)
        self.log(self.metric_name("validation/accuracy"), self.validation_accuracy, prog_bar=True)
        self.log(self.metric_name("validation/ece"), self.calibration)
        return scores

    def test_step(self, batch: RankingBatch, batch_idx: int) -> Tensor:
        """See `validation_step`; the metrics are `test/loss`, `test/accuracy` and `test/ece`."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: RankingBatch, batch_idx: int) -> Tensor:
        """Return one score per completion, (N,) float32, in the order of the rows."""
        return self(batch)

    def collate(self, rows: OwnRows) -> RankingBatch:
        """See `LitModule`: rankings; to `predict`, also demonstrations or token ids, whose responses are scored."""
        predicting = self._trainer is not None and self.trainer.predicting
        rankings = tokenize_own_rankings(rows, self.template, predicting)
        length = max(len(each.prompt) + max(map(len, each.completions)) for each in rankings)
        self.check_max_positions(length, "the longest row of a batch", "it")
        return collate_own_rankings(rankings, self.num_averaged_batches, self.tokenizer.pad_token_id)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also restore the centering constants."""
        super().on_load_checkpoint(checkpoint)
        config = json.loads(checkpoint[CHECKPOINT_KEY]["config"])
        if "score_shift" in config:
            self.model.center(config["score_shift"], config["score_scale"])
        else:
            self.model.uncenter()
