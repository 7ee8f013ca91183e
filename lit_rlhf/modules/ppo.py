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
from lit_rlhf.distributed import gather_rows
from lit_rlhf.errors import UserError
from lit_rlhf.functional import clipped_policy_loss, clipped_value_loss, k1, masked_sum
from lit_rlhf.generation.generators import CachedGenerator, Generator, checked
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.generation.stopping import stop_string_matcher
from lit_rlhf.models.lm_loss import causal_lm_loss
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.modules.actor_critic import ActorCritic
from lit_rlhf.modules.critics import Critic, resolve_critic
from lit_rlhf.modules.ppo_config import PPOConfig
from lit_rlhf.rewards.base import Reward, load_source_state, require_finite_scores, source_details, source_state
from lit_rlhf.rollout.advantages import GAE, AdvantageEstimator, check_group_size, compute_rewards
from lit_rlhf.rollout.experience import Experience, Trajectories, make_episodes, repeat_prompts, sample_rows
from lit_rlhf.rollout.experience_loader import (
    BatchSizes,
    ExperienceLoader,
    PPOIteration,
    Prompts,
    iter_micro_batches,
    logprob_mismatch,
    rollout_metrics,
)
from lit_rlhf.rollout.forward_passes import map_in_chunks
from lit_rlhf.rollout.kl_controller import FixedKLController, KLController
from lit_rlhf.strategies import broadcast_in_tensor_group, data_group, unsharded_parameters


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
        loading: how weights and tokenizer are loaded.

    Attributes:
        samples: rows of the last rollout for sample tables: prompt, response, score, kl.
    """

    prog_bar_metrics = ("reward/score", "reward/kl")

    def __init__(
        self,
        model: str,
        reward: Reward,
        sampling: SamplingParams | None = None,
        ppo: PPOConfig | None = None,
        kl: KLController | None = None,
        advantages: AdvantageEstimator | None = None,
        critic: Critic | str | None = None,
        reference: str | None = None,
        generator: Generator | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-6, betas=(0.9, 0.95), weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
        adapter: LoRA | None = None,
        loading: ModelLoadingConfig | None = None,
    ) -> None:
        sampling, ppo, estimator = sampling or SamplingParams(), ppo or PPOConfig(), advantages or GAE()
        super().__init__(
            model,
            reference or model,
            resolve_critic(critic, estimator),
            reward,
            ppo.critic_learning_rate,
            sampling,
            optimizer,
            scheduler,
            adapter,
            loading,
            ppo.offload_frozen,
        )
        self.ppo, self.advantages = ppo, estimator
        self.kl: KLController = kl or FixedKLController()
        self.generator = checked(generator or CachedGenerator(), sampling, ppo.old_logprobs)
        if ppo.critic_warmup_iterations and self.critic is None:
            raise UserError(
                f"ppo.critic_warmup_iterations: {type(estimator).__name__} has no critic to warm up; leave it at 0"
            )
        self.loader: ExperienceLoader | None = None
        self.mid_iteration_state: dict[
            str, Any
        ] = {}  # of a checkpoint in the middle of an iteration, until there is a loader
        self.validation_score, self.validation_kl = MeanMetric(), MeanMetric()

    def setup(self, stage: str) -> None:
        """Refuse sizes and lengths that do not fit, before any weight is read."""
        super().setup(stage)
        trainer, ppo = self.trainer, self.ppo
        accumulate, (world, _) = trainer.accumulate_grad_batches, data_ranks(trainer)
        self.sizes = BatchSizes(
            ppo.rollout_batch_size, ppo.micro_batch_size, accumulate, world, ppo.ppo_epochs, ppo.samples_per_prompt
        )
        check_group_size(self.advantages, ppo.samples_per_prompt)
        self.check_models()
        prompts = getattr(trainer.datamodule, "prompts", None)  # type: ignore[attr-defined]
        if prompts is not None:
            self.check_length(prompts)
        self.seed = trainer.strategy.broadcast(torch.initial_seed())

    def check_length(self, prompts: Prompts) -> None:
        """Refuse prompts that leave no room for a response."""
        width = self.sampling.max_new_tokens
        what = f"the longest prompt ({prompts.longest}) with sampling.max_new_tokens ({width})"
        self.check_max_positions(
            prompts.longest + width, what, "data.max_prompt_length or model.sampling.max_new_tokens"
        )

    def experience_loader(self, prompts: Prompts) -> ExperienceLoader:
        """Return the training loader over `prompts`; called by the prompt data module."""
        self.check_length(prompts)
        sizes, (_, rank) = self.sizes, data_ranks(self.trainer)
        self.loader = ExperienceLoader(
            lambda: self.collect_experience(prompts),
            lambda iteration: iter_micro_batches(iteration, sizes, rank, self.seed),
            sizes.num_micro_batches,
        )
        if self.mid_iteration_state:
            self.loader.resume(self.mid_iteration_state, self.device)
            self.mid_iteration_state = {}
        return self.loader

    def collect_experience(self, prompts: Prompts) -> PPOIteration:
        """Steps 1 to 6 of an iteration, all that its micro-batches are cut from."""
        # Counted in steps: after a resume current_epoch may be one ahead.
        iteration = self.trainer.global_step // self.sizes.num_optimizer_steps
        start = time.perf_counter()
        # A loader runs outside the autocast of training_step; without this the first ratio is not 1.
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            trajectories, seconds = self.rollout(prompts, iteration)
        coefficient = self.kl.coefficient
        # 4 per-token KL penalty, score on the last action token
        rewards = compute_rewards(trajectories, coefficient)
        # 5 advantages · 6 whiten
        advantages, returns = self.advantages.estimate(rewards, trajectories)
        statistics = rollout_metrics(trajectories, coefficient, returns)
        if self.ppo.old_logprobs == "recomputed":
            statistics |= logprob_mismatch(
                trajectories.old_logprobs, trajectories.rollout_logprobs, trajectories.response_mask
            )
        self.kl.update(float(statistics["reward/kl"]), self.ppo.rollout_batch_size)
        seconds["time/rollout"] = time.perf_counter() - start
        statistics |= {name: torch.tensor(value) for name, value in seconds.items()}
        return PPOIteration(iteration, trajectories, rewards, advantages, returns, statistics)

    def rollout(self, prompts: Prompts, iteration: int) -> tuple[Trajectories, dict[str, float]]:
        """Return the iteration's trajectories and figures. Every rank answers its share of the prompts and gets all."""
        (world, rank), sizes = data_ranks(self.trainer), self.sizes
        gather = partial(gather_rows, group=data_group(self.trainer.strategy))
        index = torch.arange(sizes.num_prompts)[rank::world]
        rows = prompts.rows(iteration, sizes.num_prompts)
        batch = prompts.collate([rows[int(i)] for i in index], index)
        noise = sampling_uniforms(sizes.rollout_batch_size, self.sampling.max_new_tokens, self.seed, iteration, 0)
        mine, figures = self.generate_and_score(
            batch, noise.view(sizes.num_prompts, sizes.samples_per_prompt, -1)[index].flatten(0, 1)
        )
        figures |= {name: float(gather(each).mean()) for name, each in source_details(self.reward).items()}
        padded_left, columns = ("input_ids", "attention_mask"), mine._asdict().items()
        return Trajectories(
            *(gather(each, name in padded_left, sizes.samples_per_prompt) for name, each in columns)
        ), figures

    def generate_and_score(self, batch: PromptBatch, noise: Tensor) -> tuple[Trajectories, dict[str, float]]:
        """Steps 1 to 3: generate, score, log-probs and values.

        Args:
            batch: b prompts.
            noise: (B, R); B is a multiple of b, and the samples of a prompt are consecutive rows.
        """
        start, width = time.perf_counter(), self.sampling.max_new_tokens
        ids, mask = batch.input_ids.to(self.device), batch.attention_mask.to(self.device)
        # 1 generate
        training = self.policy.training
        self.policy.eval()  # in train mode gradient checkpointing switches the cache off
        with unsharded_parameters(self.policy):
            stops = stop_string_matcher(self.tokenizer, self.sampling)
            rollout = self.generator.generate(self.policy, ids, mask, noise, self.sampling, stops)
        self.policy.train(training)
        generated = time.perf_counter()
        # 2 score, log-probs of the reference
        episodes = make_episodes(
            repeat_prompts(batch, len(noise) // len(ids)), rollout, self.tokenizer, self.trainer.training
        )
        input_ids, attention_mask = episodes.input_ids, episodes.attention_mask  # (B, T)
        compute = partial(
            map_in_chunks,
            input_ids=input_ids,
            attention_mask=attention_mask,
            response_width=width,
            batch_size=self.ppo.forward_batch_size,
        )
        with self.frozen_on_device():
            scores = broadcast_in_tensor_group(
                require_finite_scores(self.reward, episodes, self.trainer.global_step), self.trainer.strategy
            )
            reference = compute(self.reference_logprobs)
        scores = self.sampling.apply_missing_eos(scores, rollout.finished)
        # 3 log-probs of the policy (as they were drawn), values
        logprobs = rollout.logprobs if self.ppo.old_logprobs == "sampled" else compute(self.logprobs)
        values = compute(self.values)
        self.samples = sample_rows(episodes, scores, (k1(logprobs, reference) * rollout.response_mask).sum(1))
        trajectories = Trajectories(
            input_ids=input_ids,
            attention_mask=attention_mask,
            response_mask=rollout.response_mask,
            old_logprobs=logprobs,
            ref_logprobs=reference,
            values=values,
            scores=scores,
            finished=rollout.finished,
            rollout_logprobs=rollout.logprobs,
            prompt_index=batch.index.to(self.device).repeat_interleave(len(noise) // len(ids)),
        )
        return trajectories, {"time/generate": generated - start, "time/score": time.perf_counter() - generated}

    def training_step(self, batch: Experience | PretrainingBatch, batch_idx: int) -> Tensor:
        """Return the clipped policy loss, or the loss of a batch of the pretraining mix.

        The clipped value loss is added where values come with the policy's pass; else `backward` sees to it.
        """
        if isinstance(batch, PretrainingBatch):
            return self.pretraining_step(batch)
        ppo, seen = self.ppo, self.forward_batch(batch, self.ppo.entropy_coefficient > 0)
        logprobs = seen.logprobs  # (B, R)
        policy = clipped_policy_loss(
            logprobs, batch.old_logprobs, batch.advantages, batch.response_mask, ppo.clip_range
        )
        self.epoch_means.add("policy/loss", policy.loss, policy.count)
        self.epoch_means.add("policy/clip_fraction", policy.num_clipped, policy.count)
        self.epoch_means.add("policy/approx_kl", policy.approx_kl, policy.count)
        if (
            batch.rollout_metrics and ppo.old_logprobs == "sampled"
        ):  # the weights are still those that were sampled from
            for name, figure in logprob_mismatch(logprobs.detach(), batch.old_logprobs, batch.response_mask).items():
                self.epoch_means.add(name, figure)
        for name, figure in batch.rollout_metrics.items():
            self.epoch_means.add(name, figure)
        loss = policy.loss if seen.values is None else policy.loss + self.value_loss(seen.values, batch)
        if seen.entropy is not None:
            entropy = masked_sum(seen.entropy, batch.response_mask)
            self.epoch_means.add("policy/entropy", entropy, policy.count)
            loss = loss - ppo.entropy_coefficient * entropy
        return self.normalize_loss(loss, batch.normalizer)

    def value_loss(self, values: Tensor, batch: Experience) -> Tensor:
        """Return the clipped value loss with its weight, summed over the tokens of a micro-batch."""
        assert batch.returns is not None
        value = clipped_value_loss(
            values, batch.old_values, batch.returns, batch.response_mask, self.ppo.value_clip_range
        )
        self.epoch_means.add("value/loss", value.loss, value.count)
        self.epoch_means.add("value/clip_fraction", value.num_clipped, value.count)
        return self.ppo.value_coefficient * value.loss

    def pretraining_step(self, batch: PretrainingBatch) -> Tensor:
        """Return the language-modelling loss of the policy, mean over tokens (the γ term of Eq. 2, without γ)."""
        total, count = causal_lm_loss(self.policy, batch.input_ids, batch.loss_mask, batch.attention_mask)
        self.epoch_means.add("pretraining/loss", total, count)
        return self.normalize_loss(total, batch.normalizer)

    @torch.no_grad()
    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answer the validation prompts, with the same noise every time, and log mean score and KL."""
        counted = batch.index >= 0  # a rank without a prompt left repeats another rank's with index -1
        index = batch.index.cpu().clamp(min=0)
        noise = sampling_uniforms(int(index.max()) + 1, self.sampling.max_new_tokens, self.seed, 0, 2)[index]
        trajectories, _ = self.generate_and_score(batch, noise)
        kl = (k1(trajectories.old_logprobs, trajectories.ref_logprobs) * trajectories.response_mask).sum(1)
        if counted.any():
            self.validation_score.update(trajectories.scores[counted])
            self.validation_kl.update(kl[counted])
        self.log_dict({"validation/score": self.validation_score, "validation/kl": self.validation_kl})

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient's norm; let the critic alone move in its warm-up."""
        if self.trainer.global_step // self.sizes.num_optimizer_steps < self.ppo.critic_warmup_iterations:
            self.drop_policy_gradients()
        super().on_before_optimizer_step(optimizer)

    def on_fit_start(self) -> None:
        """Print the sizes once, and what lies in host memory."""
        self.print(f"PPO: {self.sizes}", *(f"; in host memory: {name}" for name in self.offloaded), sep="")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the states of the KL controller and of the reward source, and the iteration under way."""
        super().on_save_checkpoint(checkpoint)
        # there is no loader where nothing was trained: a model that was only validated can be saved
        if unfinished := self.loader.mid_iteration_state() if self.loader else {}:
            figures = self.epoch_means.over_ranks(self.sum_over_ranks)
            checkpoint["iteration"] = unfinished | {"figures": figures, "samples": self.samples}
        checkpoint["kl_controller"] = self.kl.state_dict()
        checkpoint["reward"] = source_state(self.reward)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back."""
        super().on_load_checkpoint(checkpoint)
        self.kl.load_state_dict(checkpoint["kl_controller"])
        load_source_state(self.reward, checkpoint.get("reward", {}))
        self.mid_iteration_state = checkpoint.get("iteration", {})
        if self.mid_iteration_state:
            self.samples = self.mid_iteration_state["samples"]
            self.epoch_means.load(self.mid_iteration_state["figures"], first_rank=data_ranks(self.trainer)[1] == 0)
