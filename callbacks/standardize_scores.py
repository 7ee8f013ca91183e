"""Shift and scale a reward model to mean 0 and standard deviation 1 over a policy's samples (Ziegler et al., 2019)."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_rlhf.callbacks.center_scores import CenterScores
from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.prompts import PromptSource, read_prompts
from lit_rlhf.errors import UserError
from lit_rlhf.generation.generators import CachedGenerator
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig


class StandardizeScores(CenterScores):
    """As `CenterScores`, but to mean 0 and standard deviation 1, so that scores of different models compare.

    The paper shifts only; Ziegler et al. also scale, over 256 samples of the reference policy.

    Args:
        path: prompts for `policy` to answer; without a policy, rows with completions, which are taken as they are.
        policy: a language model's folder, usually the SFT model's, whose samples give the constants.
        samples: responses drawn.
        max_new_tokens: most tokens of a response.
        format: of the rows at `path`.
        template: how their prompts are put into words; the data module's own by default.
        batch_size: rows a forward pass.
        seed: of the samples.
    """

    def __init__(
        self,
        path: str,
        policy: str | None = None,
        samples: int = 256,
        max_new_tokens: int = 64,
        format: str = "auto",
        template: str | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(path, format, template, batch_size)
        if samples < 2:
            raise UserError(f"StandardizeScores: a standard deviation needs samples of 2 or more, got {samples}")
        self.policy, self.samples, self.seed = policy, samples, seed
        self.sampling = SamplingParams(max_new_tokens)

    @property
    def what(self) -> str:
        """The rows, in words."""
        return f"rows of {self.path}" if self.policy is None else f"samples of {self.policy}"

    def constants(self, raw: Tensor, scale: float) -> tuple[float, float]:
        """Return mean and standard deviation."""
        return float(raw.mean()), float(raw.std(correction=0))

    def read(self, trainer: Trainer, pl_module: Any) -> list[list[int]]:
        """Return the given rows, or the policy's samples."""
        if self.policy is None:
            return super().read(trainer, pl_module)
        prompts = self.prompts(trainer, pl_module)
        rows = self.sample(prompts, pl_module.loading, trainer.strategy.root_device) if trainer.is_global_zero else []
        return trainer.strategy.broadcast(rows)  # rounding differs between devices, and samples with it

    def prompts(self, trainer: Trainer, pl_module: Any) -> PromptBatch:
        """Return the prompts to be answered."""
        assert self.policy is not None
        tokenizer = load_tokenizer(self.policy, pl_module.loading)
        if tokenizer.get_vocab() != pl_module.tokenizer.get_vocab():
            raise UserError(f"StandardizeScores: {self.policy!r} has another tokenizer than the reward model")
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        template = PromptTemplate(tokenizer, self.template or data.template)
        tokenised = read_prompts(self.path, self.format, template, data.lengths)
        return PromptSource(tokenised, tokenizer.pad_token_id, self.seed).batch(0, self.samples)

    @torch.no_grad()
    def sample(self, prompts: PromptBatch, loading: ModelLoadingConfig, device: torch.device) -> list[list[int]]:
        """Return the prompts with the policy's responses behind them."""
        assert self.policy is not None
        policy = load_causal_lm(self.policy, load_tokenizer(self.policy, loading), loading).to(device).eval()
        noise = sampling_uniforms(self.samples, self.sampling.max_new_tokens, self.seed)
        rollout = CachedGenerator(self.batch_size).generate(
            policy, prompts.input_ids.to(device), prompts.attention_mask.to(device), noise, self.sampling
        )
        mask = torch.cat([prompts.attention_mask.bool(), rollout.response_mask.cpu()], 1)
        ids = torch.cat([prompts.input_ids, rollout.response_ids.cpu()], 1)
        return [line[real].tolist() for line, real in zip(ids, mask)]
