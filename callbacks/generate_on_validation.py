"""Generate responses at every validation: samples to read, and a mean score to select checkpoints by (App. C.1)."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.callbacks.log_samples import write_samples
from lit_rlhf.data.base import DataRequirements, TokenizedDataModule
from lit_rlhf.data.collation import TokenizedExample, TokenizedPrompt, collate_prompts
from lit_rlhf.data.loader import get_dp_world_size_and_rank
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.prompts import get_text_settings, read_prompts
from lit_rlhf.data.sources import DataSource, held_rows
from lit_rlhf.distributed import raise_on_all_ranks
from lit_rlhf.errors import UserError
from lit_rlhf.generation import CachedGenerator, Generator
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.generation.stopping import stop_string_matcher
from lit_rlhf.importing import Function
from lit_rlhf.loggers import GrowingTable
from lit_rlhf.models.scalar_model import ScalarModel
from lit_rlhf.rewards import LoRARewardModel, Reward, resolve_reward
from lit_rlhf.rewards.base import compute_finite_scores
from lit_rlhf.rollout.experience import Episodes, make_episodes, read_reference
from lit_rlhf.strategies import unsharded_parameters

COLUMNS = ("step", "prompt", "reference", "response", "score")


class GenerateOnValidation(Callback):
    """Log `validation/reward_score`, the mean score of the model's responses to validation prompts, and samples.

    The paper selects SFT models by this score: validation loss rises after one epoch, while the score and human
    preference keep rising (App. C.1). The samples are the rows of `validation_samples.jsonl`, apart from those of
    `LogSamples`; a WandbLogger also gets them, as one table that grows. A ModelCheckpoint that monitors it keeps the
    best model. Every validation uses the same sampling noise, so that two validations differ by the weights alone.

    Args:
        path: prompts: any source of `PromptDataModule`, or demonstrations, for their prompts. None takes the prompts of
            the data module's validation rows.
        reward: scores the responses; None logs samples only.
        sampling: length and temperature of the responses.
        format: format of the rows at `path`.
        limit: maximum number of prompts.
        batch_size: prompts per batch.
        rows: number of logged samples.
        generator: generates the responses.
        seed: seed of the sampling noise.
    """

    def __init__(
        self,
        path: DataSource | None = None,
        reward: Reward | Function | PreTrainedModel | ScalarModel | None = None,
        sampling: SamplingParams | None = None,
        format: str | Function = "auto",
        limit: int = 256,
        batch_size: int = 64,
        rows: int = 8,
        generator: Generator | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("limit", limit), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"GenerateOnValidation: {name} must be at least 1, got {value}")
        self.path = None if path is None else held_rows(path)
        self.reward = None if reward is None else resolve_reward(reward)
        parts = [] if self.reward is None else self.reward.iter_parts()
        if any(isinstance(part, LoRARewardModel) for part in parts):
            raise UserError(
                "GenerateOnValidation: reward: LoRARewardModel attaches its adapter to PPO's policy, and scores with "
                "it alone; `lit-rlhf export` its checkpoint, and give the folder to RewardModelScorer"
            )
        self.sampling, self.format = sampling or SamplingParams(), format
        self.limit, self.batch_size, self.rows, self.seed = limit, batch_size, rows, seed
        self.generator: Generator = generator or CachedGenerator()
        self.prompts: list[TokenizedPrompt] | None = None  # read in `setup`
        self.table = GrowingTable("validation_samples", COLUMNS)

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Load prompts and reward, once."""
        if stage not in ("fit", "validate") or self.prompts is not None:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        limit = self.rows if self.reward is None else self.limit
        if self.path is None:
            rows = data.validation_rows if isinstance(data, TokenizedDataModule) else []
            prompts = extract_prompts(rows, pl_module.tokenizer)[:limit]
        else:
            own_template, lengths = get_text_settings(data)
            template = PromptTemplate(pl_module.tokenizer, own_template)
            prompts = read_prompts(self.path, self.format, template, lengths)[:limit]
        if isinstance(pl_module, DataRequirements):
            num_tokens = max(len(prompt.input_ids) for prompt in prompts) + self.sampling.max_new_tokens
            what = "GenerateOnValidation: the longest prompt with sampling.max_new_tokens"
            pl_module.check_max_positions(num_tokens, what, "one of them")
        if self.reward is not None:
            self.reward.prepare(pl_module.tokenizer, trainer.strategy.root_device)
        self.prompts = prompts

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Generate, score and log; a collective call."""
        if trainer.sanity_checking:
            return
        assert self.prompts is not None
        world_size, rank = get_dp_world_size_and_rank(trainer)
        # as many on every rank, as generating may be a collective call; the last may be another rank's, not counted
        numbers = torch.arange(-(-len(self.prompts) // world_size)) * world_size + rank
        own = numbers < len(self.prompts)
        total = torch.zeros(2, dtype=torch.float64, device=pl_module.device)  # sum of scores, count
        table: list[dict[str, Any]] = []
        full_weights = (
            unsharded_parameters(pl_module.exported_model) if self.generator.needs_full_weights else nullcontext()
        )
        with trainer.precision_plugin.forward_context(), full_weights:
            for part, is_own in zip(torch.split(numbers, self.batch_size), torch.split(own, self.batch_size)):
                episodes, scores = self.generate_and_score(pl_module, part.clamp(max=len(self.prompts) - 1))
                count = int(is_own.sum())
                rows: list[dict[str, Any]] = [
                    {"prompt": p, **read_reference(row), "response": r}
                    for p, row, r in zip(episodes.prompts[:count], episodes.rows, episodes.responses)
                ]
                if scores is not None:
                    scores = scores[:count].double().cpu()
                    total += torch.tensor([float(scores.sum()), float(count)]).to(total)
                    rows = [row | {"score": float(score)} for row, score in zip(rows, scores)]
                table += rows
        samples, step = table[: self.rows], trainer.global_step
        write_samples(trainer, samples, "validation_samples")
        self.table.add(trainer.loggers, [{"step": step, **row} for row in samples], step)
        if self.reward is not None:
            total = trainer.strategy.reduce(total, reduce_op="sum")
            pl_module.log("validation/reward_score", float(total[0] / total[1]), prog_bar=True, rank_zero_only=False)

    def generate_and_score(self, pl_module: Any, index: Tensor) -> tuple[Episodes, Tensor | None]:
        """Return the episodes of the prompts at `index`, (B,) int64, and their scores, (B,), if there is a reward."""
        assert self.prompts is not None
        tokenizer, model = pl_module.tokenizer, pl_module.exported_model
        batch = collate_prompts([self.prompts[int(i)] for i in index], index.tolist(), tokenizer.pad_token_id)
        noise = sampling_uniforms(len(self.prompts), self.sampling.max_new_tokens, self.seed, 3)[index]
        rollout = self.generator.generate(
            model, batch.to(pl_module.device), self.sampling, noise, stop_string_matcher(tokenizer, self.sampling)
        )
        episodes = make_episodes(batch, rollout, tokenizer, training=False)
        if self.reward is None:
            return episodes, None
        with raise_on_all_ranks():
            scores = compute_finite_scores(self.reward, episodes, pl_module.global_step)
        return episodes, self.sampling.apply_missing_eos(scores, rollout.finished)


def extract_prompts(rows: Sequence[TokenizedExample], tokenizer: Any) -> list[TokenizedPrompt]:
    """Return the distinct prompts of demonstrations: the tokens before the first target.

    Raises:
        UserError: there are no rows.
    """
    if not rows:
        raise UserError(
            "GenerateOnValidation: there are no validation demonstrations to take prompts from; set its path, or "
            "data.validation_path or data.validation_fraction"
        )
    completions: dict[tuple[int, ...], list[int]] = {}  # the first one of each prompt
    for row in rows:
        if any(row.loss_mask):
            start = row.loss_mask.index(True)
            completions.setdefault(tuple(row.input_ids[:start]), row.input_ids[start:])
    return [
        TokenizedPrompt(
            list(ids),
            {"prompt": tokenizer.decode(ids), "completion": tokenizer.decode(completion, skip_special_tokens=True)},
        )
        for ids, completion in completions.items()
        if ids
    ]
