"""Step 3 of the paper: PPO against the reward model with a per-token KL penalty (§3.5 Eq. 2, App. C.4)."""

import time
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from lit_rlhf.data.batches import PretrainingBatch, PromptBatch
from lit_rlhf.data.loader import data_ranks
from lit_rlhf.errors import UserError
from lit_rlhf.functional import clipped_policy_loss, clipped_value_loss, k1, masked_sum
from lit_rlhf.gather import gather_rows
from lit_rlhf.models.options import LoRA, ModelOptions
from lit_rlhf.models.text_loss import text_loss
from lit_rlhf.modules.actors import ActorCritic
from lit_rlhf.modules.ppo_settings import PPOSettings
from lit_rlhf.rewards.source import RewardSource, finite_scores, load_source_state, source_details, source_state
from lit_rlhf.rollout.advantages import GAE, AdvantageEstimator, check_groups, rewards_of
from lit_rlhf.rollout.critics import Critic, critic_of
from lit_rlhf.rollout.endings import text_ends
from lit_rlhf.rollout.experience import Experience, Trajectories, episodes_of, repeated, sample_rows
from lit_rlhf.rollout.generation import CachedGenerator, Generator, checked
from lit_rlhf.rollout.kl_control import FixedKL, KLController
from lit_rlhf.rollout.loader import (
    ExperienceLoader,
    Iteration,
    Prompts,
    Sizes,
    cut,
    logprob_mismatch,
    rollout_statistics,
)
from lit_rlhf.rollout.passes import in_chunks
from lit_rlhf.rollout.sampling import Sampling, draw_noise
from lit_rlhf.strategies import agreed, data_group, gathered


class PPOModule(ActorCritic):
    """Policy and critic, trained on rollouts of the policy. One epoch of the Trainer is one PPO iteration.

    Args:
        model: the SFT model's folder or hub name: start of the policy.
        reward: what scores a response.
        sampling: length and temperature of a response.
        ppo: the numbers of the update.
        kl: controller of β.
        advantages: estimator of advantages; by default `GAE`.
        critic: where values come from, or the folder that a separate critic starts from; by default a separate critic
            from the reward model (App. C.4), or from `model` with a zero head where the reward is no model.
        reference: what the KL is measured against; by default `model`. With an adapter, the policy's own frozen base.
        generator: rollout engine.
        optimizer: a callable from parameter groups to an optimizer.
        scheduler: a callable from the optimizer to a scheduler (paper: from a tenth, over 10 iterations, then
            constant).
        adapter: train low-rank adapters of policy and critic instead of all weights.
        options: how weights and tokenizer are loaded.

    Attributes:
        samples: rows of the last rollout for sample tables: prompt, response, score, kl.
    """

    shown = ("reward/score", "reward/kl")

    def __init__(
        self,
        model: str,
        reward: RewardSource,
        sampling: Sampling | None = None,
        ppo: PPOSettings | None = None,
        kl: KLController | None = None,
        advantages: AdvantageEstimator | None = None,
        critic: Critic | str | None = None,
        reference: str | None = None,
        generator: Generator | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-6, betas=(0.9, 0.95), weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
        adapter: LoRA | None = None,
        options: ModelOptions | None = None,
    ) -> None:
        sampling, ppo, estimator = sampling or Sampling(), ppo or PPOSettings(), advantages or GAE()
        super().__init__(
            model,
            reference or model,
            critic_of(critic, estimator),
            reward,
            ppo.critic_learning_rate,
            sampling,
            optimizer,
            scheduler,
            adapter,
            options,
            ppo.offload_frozen,
        )
        self.ppo, self.advantages = ppo, estimator
        self.kl: KLController = kl or FixedKL()
        self.generator = checked(generator or CachedGenerator(), sampling, ppo.logprobs)
        if ppo.critic_warmup and self.critic is None:
            raise UserError(f"ppo.critic_warmup: {type(estimator).__name__} has no critic to warm up; leave it at 0")
        self.loader: ExperienceLoader | None = None
        self.unfinished: dict[str, Any] = {}  # of a checkpoint in the middle of an iteration, until there is a loader
        self.validation_score, self.validation_kl = MeanMetric(), MeanMetric()

    def setup(self, stage: str) -> None:
        """Refuse sizes and lengths that do not fit, before any weight is read."""
        super().setup(stage)
        trainer, ppo = self.trainer, self.ppo
        accumulate, (world, _) = trainer.accumulate_grad_batches, data_ranks(trainer)
        self.sizes = Sizes(ppo.rollout_batch, ppo.micro_batch, accumulate, world, ppo.epochs, ppo.samples_per_prompt)
        check_groups(self.advantages, ppo.samples_per_prompt)
        self.check_models()
        prompts = getattr(trainer.datamodule, "prompts", None)  # type: ignore[attr-defined]
        if prompts is not None:
            self.check_length(prompts)
        self.seed = trainer.strategy.broadcast(torch.initial_seed())

    def check_length(self, prompts: Prompts) -> None:
        """Refuse prompts that leave no room for a response."""
        width = self.sampling.response_length
        what = f"the longest prompt ({prompts.longest}) with sampling.response_length ({width})"
        self.require_positions(
            prompts.longest + width, what, "data.max_prompt_length or model.sampling.response_length"
        )

    def experience(self, prompts: Prompts) -> ExperienceLoader:
        """Return the training loader over `prompts`; called by the prompt data module."""
        self.check_length(prompts)
        sizes, (_, rank) = self.sizes, data_ranks(self.trainer)
        self.loader = ExperienceLoader(
            lambda: self.collect(prompts), lambda iteration: cut(iteration, sizes, rank, self.seed), sizes.batches
        )
        if self.unfinished:
            self.loader.resume(self.unfinished, self.device)
            self.unfinished = {}
        return self.loader

    def collect(self, prompts: Prompts) -> Iteration:
        """Steps 1 to 6 of an iteration, all that its micro-batches are cut from."""
        # Counted in steps: after a resume current_epoch may be one ahead.
        iteration = self.trainer.global_step // self.sizes.steps
        start = time.perf_counter()
        # A loader runs outside the autocast of training_step; without this the first ratio is not 1.
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            trajectories, seconds = self.roll_out(prompts, iteration)
        coefficient = self.kl.coefficient
        # 4 per-token KL penalty, score on the last action token
        rewards = rewards_of(trajectories, coefficient)
        # 5 advantages · 6 whiten
        advantages, returns = self.advantages.estimate(rewards, trajectories)
        statistics = rollout_statistics(trajectories, coefficient, returns)
        if self.ppo.logprobs == "recomputed":
            statistics |= logprob_mismatch(trajectories.logprobs, trajectories.drawn, trajectories.response_mask)
        self.kl.update(float(statistics["reward/kl"]), self.ppo.rollout_batch)
        seconds["time/rollout"] = time.perf_counter() - start
        statistics |= {name: torch.tensor(value) for name, value in seconds.items()}
        return Iteration(iteration, trajectories, rewards, advantages, returns, statistics)

    def roll_out(self, prompts: Prompts, iteration: int) -> tuple[Trajectories, dict[str, float]]:
        """Return the iteration's trajectories and figures. Every rank answers its share of the prompts and gets all."""
        (world, rank), sizes = data_ranks(self.trainer), self.sizes
        gather = partial(gather_rows, group=data_group(self.trainer.strategy))
        index = torch.arange(sizes.prompts)[rank::world]
        rows = prompts.rows(iteration, sizes.prompts)
        batch = prompts.collate([rows[int(i)] for i in index], index)
        noise = draw_noise(sizes.rollout_batch, self.sampling.response_length, self.seed, iteration, 0)
        mine, figures = self.answer(batch, noise.view(sizes.prompts, sizes.samples, -1)[index].flatten(0, 1))
        figures |= {name: float(gather(each).mean()) for name, each in source_details(self.reward).items()}
        padded_left, columns = ("input_ids", "attention_mask"), mine._asdict().items()
        return Trajectories(*(gather(each, name in padded_left, sizes.samples) for name, each in columns)), figures

    def answer(self, batch: PromptBatch, noise: Tensor) -> tuple[Trajectories, dict[str, float]]:
        """Steps 1 to 3: generate, score, log-probs and values.

        Args:
            batch: b prompts.
            noise: (B, R); B is a multiple of b, and the samples of a prompt are consecutive rows.
        """
        start, width = time.perf_counter(), self.sampling.response_length
        ids, mask = batch.input_ids.to(self.device), batch.attention_mask.to(self.device)
        # 1 generate
        training = self.policy.training
        self.policy.eval()  # in train mode gradient checkpointing switches the cache off
        with gathered(self.policy):
            stops = text_ends(self.tokenizer, self.sampling)
            rollout = self.generator.generate(self.policy, ids, mask, noise, self.sampling, stops)
        self.policy.train(training)
        generated = time.perf_counter()
        # 2 score, log-probs of the reference
        episodes = episodes_of(repeated(batch, len(noise) // len(ids)), rollout, self.tokenizer, self.trainer.training)
        input_ids, attention_mask = episodes.input_ids, episodes.attention_mask  # (B, T)
        compute = partial(
            in_chunks, input_ids=input_ids, attention_mask=attention_mask, response_width=width, rows=self.ppo.chunk
        )
        with self.frozen_on_device():
            scores = agreed(finite_scores(self.reward, episodes, self.trainer.global_step), self.trainer.strategy)
            reference = compute(self.reference_logprobs)
        scores = self.sampling.final_scores(scores, rollout.ended)
        # 3 log-probs of the policy (as they were drawn), values
        logprobs = rollout.logprobs if self.ppo.logprobs == "sampled" else compute(self.logprobs)
        values = compute(self.values)
        self.samples = sample_rows(episodes, scores, (k1(logprobs, reference) * rollout.response_mask).sum(1))
        trajectories = Trajectories(
            input_ids=input_ids,
            attention_mask=attention_mask,
            response_mask=rollout.response_mask,
            logprobs=logprobs,
            reference=reference,
            values=values,
            scores=scores,
            ended=rollout.ended,
            drawn=rollout.logprobs,
            group=batch.index.to(self.device).repeat_interleave(len(noise) // len(ids)),
        )
        return trajectories, {"time/generate": generated - start, "time/score": time.perf_counter() - generated}

    def training_step(self, batch: Experience | PretrainingBatch, batch_idx: int) -> Tensor:
        """Return the clipped policy loss, or the loss of a batch of the pretraining mix.

        The clipped value loss is added where values come with the policy's pass; else `backward` sees to it.
        """
        if isinstance(batch, PretrainingBatch):
            return self.pretraining_step(batch)
        ppo, seen = self.ppo, self.evaluate(batch, self.ppo.entropy_coefficient > 0)
        logprobs = seen.logprobs  # (B, R)
        policy = clipped_policy_loss(logprobs, batch.logprobs, batch.advantages, batch.response_mask, ppo.clip)
        self.tally.add("policy/loss", policy.loss, policy.count)
        self.tally.add("policy/clip_fraction", policy.clipped, policy.count)
        self.tally.add("policy/approx_kl", policy.approx_kl, policy.count)
        if batch.statistics and ppo.logprobs == "sampled":  # the weights are still those that were sampled from
            for name, figure in logprob_mismatch(logprobs.detach(), batch.logprobs, batch.response_mask).items():
                self.tally.add(name, figure)
        for name, figure in batch.statistics.items():
            self.tally.add(name, figure)
        loss = policy.loss if seen.values is None else policy.loss + self.value_loss(seen.values, batch)
        if seen.entropy is not None:
            entropy = masked_sum(seen.entropy, batch.response_mask)
            self.tally.add("policy/full_entropy", entropy, policy.count)
            loss = loss - ppo.entropy_coefficient * entropy
        return self.normalised(loss, batch.normalizer)

    def value_loss(self, values: Tensor, batch: Experience) -> Tensor:
        """Return the clipped value loss with its weight, summed over the tokens of a micro-batch."""
        assert batch.returns is not None
        value = clipped_value_loss(values, batch.values, batch.returns, batch.response_mask, self.ppo.value_clip)
        self.tally.add("value/loss", value.loss, value.count)
        self.tally.add("value/clip_fraction", value.clipped, value.count)
        return self.ppo.value_coefficient * value.loss

    def pretraining_step(self, batch: PretrainingBatch) -> Tensor:
        """Return the language-modelling loss of the policy, mean over tokens (the γ term of Eq. 2, without γ)."""
        total, count = text_loss(self.policy, batch.input_ids, batch.loss_mask, batch.attention_mask)
        self.tally.add("pretraining/loss", total, count)
        return self.normalised(total, batch.normalizer)

    @torch.no_grad()
    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answer the validation prompts, with the same noise every time, and log mean score and KL."""
        counted = batch.index >= 0  # a rank without a prompt left repeats another rank's with index -1
        index = batch.index.cpu().clamp(min=0)
        noise = draw_noise(int(index.max()) + 1, self.sampling.response_length, self.seed, 0, 2)[index]
        trajectories, _ = self.answer(batch, noise)
        kl = (k1(trajectories.logprobs, trajectories.reference) * trajectories.response_mask).sum(1)
        if counted.any():
            self.validation_score.update(trajectories.scores[counted])
            self.validation_kl.update(kl[counted])
        self.log_dict({"validation/score": self.validation_score, "validation/kl": self.validation_kl})

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient's norm; let the critic alone move in its warm-up."""
        if self.trainer.global_step // self.sizes.steps < self.ppo.critic_warmup:
            self.hold_policy()
        super().on_before_optimizer_step(optimizer)

    def on_fit_start(self) -> None:
        """Print the sizes once, and what lies in host memory."""
        self.print(f"PPO: {self.sizes}", *(f"; in host memory: {name}" for name in self.offloaded), sep="")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the states of the KL controller and of the reward source, and the iteration under way."""
        super().on_save_checkpoint(checkpoint)
        # there is no loader where nothing was trained: a model that was only validated can be saved
        if unfinished := self.loader.unfinished() if self.loader else {}:
            figures = self.tally.over_ranks(self.sum_over_ranks)
            checkpoint["iteration"] = unfinished | {"figures": figures, "samples": self.samples}
        checkpoint["kl_controller"] = self.kl.state_dict()
        checkpoint["reward"] = source_state(self.reward)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back."""
        super().on_load_checkpoint(checkpoint)
        self.kl.load_state_dict(checkpoint["kl_controller"])
        load_source_state(self.reward, checkpoint.get("reward", {}))
        self.unfinished = checkpoint.get("iteration", {})
        if self.unfinished:
            self.samples = self.unfinished["samples"]
            self.tally.load(self.unfinished["figures"], first_rank=data_ranks(self.trainer)[1] == 0)
