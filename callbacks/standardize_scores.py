"""Shift and scale a reward model to mean 0 and standard deviation 1 over a policy's samples (Ziegler et al., 2019)."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_rlhf.callbacks.center_scores import CenterScores
from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.prompts import PromptSource, get_text_settings, read_prompts
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import DataSource, source_name
from lit_rlhf.errors import UserError
from lit_rlhf.generation import CachedGenerator
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.importing import Function
from lit_rlhf.lineage.traceable import Traceable
from lit_rlhf.models.given import ModelSource, TokenizerSource, copied, model_name, resolve_model, resolve_tokenizer
from lit_rlhf.models.loading import check_same_token_ids, load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig


class StandardizeScores(CenterScores, Traceable):
    """Like `CenterScores`, but to mean 0 and standard deviation 1, so that scores of different models are comparable.

    The paper only shifts; Ziegler et al. also scale, over 256 samples of the reference policy.

    Args:
        path: prompts for `policy`; without a policy, prompts with completions, which are scored as they are.
        policy: folder of the language model, usually the SFT model, or the model, whose samples define shift and scale.
            Its token ids must be those of the reward model.
        samples: number of sampled responses.
        max_new_tokens: maximum tokens of a response.
        format: format of the rows at `path`.
        template: prompt template of the rows; by default that of the data module.
        batch_size: rows per forward pass.
        seed: seed of the sampling.
        tokenizer: that of `policy`, or the folder of one; by default that of the policy's folder.
    """

    data_role = "prompts for standardizing"

    def __init__(
        self,
        path: DataSource,
        policy: ModelSource | Path | None = None,
        samples: int = 256,
        max_new_tokens: int = 64,
        format: str | Function = "auto",
        template: str | None = None,
        batch_size: int = 64,
        seed: int = 0,
        tokenizer: TokenizerSource | None = None,
    ) -> None:
        super().__init__(path, format, template, batch_size)
        if samples < 2:
            raise UserError(f"StandardizeScores: a standard deviation needs samples of 2 or more, got {samples}")
        self.policy = None if policy is None else resolve_model(policy, "StandardizeScores: policy")
        self.tokenizer = None if self.policy is None else resolve_tokenizer(tokenizer, self.policy)
        self.samples, self.seed = samples, seed
        self.sampling = SamplingParams(max_new_tokens)

    def input_models(self) -> dict[str, str]:
        """See `Traceable.input_models`."""
        return {"policy of the standardized scores": self.policy} if isinstance(self.policy, str) else {}

    def describe_rows(self) -> str:
        """Return a description of the rows, for the log."""
        return f"rows of {source_name(self.path)}" if self.policy is None else f"samples of {model_name(self.policy)}"

    def compute_shift_and_scale(self, raw_scores: Tensor, scale: float) -> tuple[float, float]:
        """Return mean and standard deviation of the raw scores, (n,) float64."""
        return float(raw_scores.mean()), float(raw_scores.std(correction=0))

    def load_rows(self, trainer: Trainer, pl_module: Any) -> list[list[int]]:
        """Return the token ids of the given rows, or of samples of the policy."""
        if self.policy is None:
            return super().load_rows(trainer, pl_module)
        prompts = self.load_prompts(trainer, pl_module)
        device = trainer.strategy.root_device
        rows = self.sample_rows(prompts, pl_module.loading, device) if trainer.is_global_zero else []
        return trainer.strategy.broadcast(rows)  # other devices round differently, and would sample other tokens

    def load_prompts(self, trainer: Trainer, pl_module: Any) -> PromptBatch:
        """Return the prompts to sample from, `samples` rows."""
        assert self.tokenizer is not None
        tokenizer = load_tokenizer(self.tokenizer, pl_module.loading)
        check_same_token_ids(tokenizer, pl_module.tokenizer, "StandardizeScores: the reward model")
        own_template, lengths = get_text_settings(trainer.datamodule)  # type: ignore[attr-defined]
        template = PromptTemplate(tokenizer, self.template or own_template)
        prompts = read_prompts(self.path, self.format, template, lengths)
        self.reports = (DatasetReport(source_name(self.path)),)
        return PromptSource(prompts, tokenizer.pad_token_id, self.seed).get_batch(0, self.samples)

    @torch.no_grad()
    def sample_rows(self, prompts: PromptBatch, loading: ModelLoadingConfig, device: torch.device) -> list[list[int]]:
        """Return the token ids of the prompts, each with a response of the policy."""
        assert self.policy is not None and self.tokenizer is not None
        tokenizer = load_tokenizer(self.tokenizer, loading)
        policy = load_causal_lm(copied(self.policy), tokenizer, loading).to(device).eval()
        noise = sampling_uniforms(self.samples, self.sampling.max_new_tokens, self.seed)
        rollout = CachedGenerator(self.batch_size).generate(policy, prompts.to(device), self.sampling, noise)
        mask = torch.cat([prompts.attention_mask.bool(), rollout.response_mask.cpu()], 1)
        ids = torch.cat([prompts.input_ids, rollout.response_ids.cpu()], 1)
        return [row[keep].tolist() for row, keep in zip(ids, mask)]
