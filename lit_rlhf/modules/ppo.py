"""Step 3 of the paper: PPO against a reward model with a per-token KL penalty (§3.5 Eq. 2, App. C.4).

One epoch of the Trainer is one PPO iteration. The steps, in the order of this file:

| step | where |
|---|---|
| 1 generate responses | `generate_and_score` |
| 2 score them | `generate_and_score` |
| 3 log-probs of policy and reference, values | `generate_and_score` |
| 4 KL penalty | `collect_experience` |
| 5 advantages (GAE), 6 whiten | `collect_experience` |
| 7 policy loss | `training_step` |
| 8 value loss | `value_loss`, in `training_step` or `backward` |
| 9 pretraining gradient (PPO-ptx) | `pretraining_step`, called by the callback `PretrainingMix` |
| 10 optimizer step | `on_before_optimizer_step`, then Lightning |

Shapes: `b` prompts and `B` episodes of this rank or of all ranks, `P` prompt, `R` response, `T = P + R`.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from lit_rlhf.checkpoints import Stoppable
from lit_rlhf.data.batches import PretrainingBatch, PromptBatch
from lit_rlhf.data.collation import TokenizedPrompt
from lit_rlhf.data.loader import convert_batch_progress, get_dp_world_size_and_rank
from lit_rlhf.data.own_batches import OwnRows
from lit_rlhf.data.prompts import PromptDataModule, PromptSource
from lit_rlhf.distributed import all_gather_object, gather_rows, raise_on_all_ranks
from lit_rlhf.errors import RankError, UserError
from lit_rlhf.functional import clipped_policy_loss, clipped_value_loss, k1, masked_sum, truncated_importance_weights
from lit_rlhf.generation import CachedGenerator, GenerationOutput, Generator, RemoteGenerator, SamplingParams
from lit_rlhf.generation.sampling import sampling_uniforms
from lit_rlhf.generation.stopping import stop_string_matcher
from lit_rlhf.hyperparameters import save_settings
from lit_rlhf.importing import Function
from lit_rlhf.loggers import ITERATION
from lit_rlhf.models.export import CHECKPOINT_KEY
from lit_rlhf.models.given import ModelSource, TokenizerSource, resolve_model
from lit_rlhf.models.lm_loss import causal_lm_loss
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.scalar_model import ScalarModel, ScalarSource
from lit_rlhf.models.shared_backbone import capture_last_hidden_state
from lit_rlhf.modules.actor_critic import ActorCritic
from lit_rlhf.modules.answers import answer_prompts, collate_answerable
from lit_rlhf.modules.critics import Critic, resolve_critic
from lit_rlhf.modules.ppo_config import PPOConfig
from lit_rlhf.modules.resume import class_path
from lit_rlhf.modules.trainer_settings import check_whole_rollouts
from lit_rlhf.packing.attention_masks import packing_unsupported_reason
from lit_rlhf.packing.packed_batch import PackedBatch
from lit_rlhf.rewards import resolve_reward
from lit_rlhf.rewards.base import Reward, compute_finite_scores
from lit_rlhf.rollout.advantages import GAE, AdvantageEstimator, check_group_size, compute_rewards
from lit_rlhf.rollout.experience import Experience, Trajectories, make_episodes, repeat_prompts, sample_rows
from lit_rlhf.rollout.experience_loader import (
    BatchSizes,
    EpisodeOrder,
    ExperienceLoader,
    PPOIteration,
    check_mid_iteration_state,
    iter_micro_batches,
)
from lit_rlhf.rollout.forward_passes import logprobs_and_entropy, map_in_chunks, packed_logprobs
from lit_rlhf.rollout.kl_controller import FixedKLController, KLController
from lit_rlhf.rollout.metrics import (
    compute_importance_metrics,
    compute_logprob_mismatch,
    compute_rollout_metrics,
    mean_scores_by_column,
    sum_scores_by_column,
)
from lit_rlhf.rollout.overlap import RolloutKey, gather_output, rollout_key, select_output
from lit_rlhf.strategies import (
    broadcast_in_tensor_group,
    data_parallel_group,
    requires_single_backward,
    tensor_parallel_size,
    unsharded_parameters,
)

STOP_TIMEOUT = 5.0  # seconds that a run which was told to stop waits for the responses of its next iteration


class ForwardOutput(NamedTuple):
    """What policy and critic compute of a micro-batch."""

    logprobs: Tensor  # (B, R), of the policy
    values: Tensor | None  # (B, R); None if the critic has a pass of its own in `backward`, and without a critic
    entropy: Tensor | None  # (B, R), of the policy's full distribution; None if not used


class DropNextRollout(Callback):
    """Cancels the responses that are under way when a run fails: Lightning then calls no hook of the module."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """See `DropNextRollout`."""
        assert isinstance(pl_module, PPOModule)
        pl_module.drop_next_rollout()


class PPOModule(ActorCritic, Stoppable):
    """Policy and critic, trained on rollouts of the policy.

    Args:
        model: the SFT model's folder or hub name, from which the policy is initialized; or the SFT model, which is
            trained in place, see `LitModule`.
        reward: scores a response. A function is a `FunctionReward`, a reward model that is an object a
            `RewardModelScorer`.
        sampling: length and distribution of a response.
        ppo: batch sizes and coefficients of the update.
        kl: controller of β.
        advantages: estimator of advantages; by default `GAE`.
        critic: computes values, or what a separate critic is initialized from (an object is copied); by default a
            separate critic from the reward model (App. C.4), or from `model` with a zero head if the reward is no
            model.
        reference: the model that the KL is measured to; by default `model`, of an object a frozen copy from before
            training. With an adapter, the policy's frozen base.
        generator: generation engine.
        optimizer: a callable from parameter groups to an optimizer.
        scheduler: a callable from the optimizer to a scheduler (paper: from a tenth, over 10 iterations, then
            constant).
        adapter: train low-rank adapters of policy and critic instead of all weights.
        loading: how weights and tokenizer are loaded.
        tokenizer: the policy's tokenizer, or the folder of one; by default that of the model's folder.

    Attributes:
        samples: rows of the last rollout: prompt, response, score, kl, and reference where the data has an answer.
        log_ratios: (B, R), log π(y_t) - log π_old(y_t) of the last micro-batch of the update; NaN outside responses.
    """

    prog_bar_metrics = ("reward/score", "reward/kl", "response/length", "policy/entropy_estimate")
    epoch_axis = ITERATION

    def __init__(
        self,
        model: ModelSource | Path,
        reward: Reward | Function | PreTrainedModel | ScalarModel,
        sampling: SamplingParams | None = None,
        ppo: PPOConfig | None = None,
        kl: KLController | None = None,
        advantages: AdvantageEstimator | None = None,
        critic: Critic | ScalarSource | Path | None = None,
        reference: ModelSource | Path | None = None,
        generator: Generator | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-6, betas=(0.9, 0.95), weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
        adapter: LoRA | None = None,
        loading: ModelLoadingConfig | None = None,
        tokenizer: TokenizerSource | None = None,
    ) -> None:
        source = resolve_model(model, "model")
        sampling, ppo, estimator = sampling or SamplingParams(), ppo or PPOConfig(), advantages or GAE()
        super().__init__(
            source,
            source if reference is None else resolve_model(reference, "reference"),
            resolve_critic(critic, estimator),
            resolve_reward(reward),
            ppo.critic_learning_rate,
            sampling,
            optimizer,
            scheduler,
            adapter,
            loading,
            ppo.offload_frozen,
            tokenizer,
        )
        self.ppo, self.advantages = ppo, estimator
        self.num_scoring_passes, self.num_update_passes = int(ppo.old_logprobs == "recompute"), ppo.ppo_epochs
        self.kl: KLController = kl or FixedKLController()
        self.generator: Generator = generator or CachedGenerator()
        self.generator.check(sampling, ppo.old_logprobs)
        self.remote: RemoteGenerator | None = None  # which samples while the update runs
        if ppo.overlap_rollouts:
            if not isinstance(self.generator, RemoteGenerator):
                raise UserError(
                    f"ppo.overlap_rollouts: {type(self.generator).__name__} samples in this process, which computes "
                    "the update; use -c generator/vllm-overlap, or set it to false"
                )
            self.remote = self.generator
            self.remote.check_overlap()
        if ppo.critic_warmup_iterations and self.critic is None:
            raise UserError(
                f"ppo.critic_warmup_iterations: {type(estimator).__name__} has no critic to warm up; leave it at 0"
            )
        self.loader: ExperienceLoader | None = None
        self.num_iterations = self.num_prompts = self.num_episodes = 0  # that were collected
        self.prompts: PromptSource | None = None
        self.log_ratios: Tensor | None = None
        self.mid_iteration_state: dict[str, Any] = {}  # of a checkpoint, until there is a loader that resumes from it
        self.next_rollout: RolloutKey | None = None  # what the generator samples while the update runs
        self.stored_rollout: dict[str, Any] = {}  # of a checkpoint: responses that it had sampled by then
        self.pending_critic_batch: tuple[Experience, PackedBatch] | None = None  # its value loss is due in `backward`
        self.validation_score, self.validation_kl = MeanMetric(), MeanMetric()
        save_settings(self, locals())

    # ---------------------------------------------------------------------------------------------- collect experience

    def call_generator(self, sample: Callable[..., Any], prompts: PromptBatch, uniforms: Tensor) -> Any:
        """Return what a method of the generator returns; it samples from the policy as it is now."""
        was_training = self.policy.training
        self.policy.eval()  # in train mode gradient checkpointing switches the KV cache off
        try:
            with unsharded_parameters(self.policy) if self.generator.needs_full_weights else nullcontext():
                matcher = stop_string_matcher(self.tokenizer, self.sampling)
                return sample(self.policy, prompts, self.sampling, uniforms, matcher)
        finally:
            self.policy.train(was_training)

    def generate_and_score(
        self, prompts: PromptBatch, uniforms: Tensor, training: bool, output: GenerationOutput | None = None
    ) -> tuple[Trajectories, list[dict[str, Any]], dict[str, float]]:
        """Steps 1 to 3: generate, score, compute log-probs and values. Called without gradients.

        Args:
            prompts: b prompts.
            uniforms: (B, R), the sampling noise; B is a multiple of b, the samples of a prompt are consecutive rows.
            training: whether the episodes are trained on.
            output: the responses, if they were sampled before.

        Returns:
            the episodes; rows of the first ones for sample tables; and the seconds that generation and scoring took.
        """
        start, num_samples = time.perf_counter(), len(uniforms) // len(prompts.input_ids)
        prompts = prompts.to(self.device)

        # 1 generate: y ~ π(· | x)
        if output is None:
            output = self.call_generator(self.generator.generate, prompts, uniforms)
        generated = time.perf_counter()

        # 2 score: r(x, y); a response without end token as `sampling.missing_eos` says
        episodes = make_episodes(repeat_prompts(prompts, num_samples), output, self.tokenizer, training)
        input_ids, attention_mask, mask = episodes.input_ids, episodes.attention_mask, output.response_mask  # (B, T)
        in_chunks = partial(
            map_in_chunks,
            input_ids=input_ids,
            attention_mask=attention_mask,
            response_width=mask.shape[1],
            batch_size=self.ppo.forward_batch_size,
        )
        with self.frozen_on_device():
            with raise_on_all_ranks():
                scores = compute_finite_scores(self.reward, episodes, self.trainer.global_step)
            scores = broadcast_in_tensor_group(scores, self.trainer.strategy)
            # 3 log π_ref(y_t | x, y_<t), log π(y_t | x, y_<t), V(x, y_<t)
            ref_logprobs = in_chunks(self.ref_logprobs)
        scores = self.sampling.apply_missing_eos(scores, output.finished)
        recompute = self.ppo.old_logprobs == "recompute"
        old_logprobs = in_chunks(self.policy_logprobs) if recompute else output.logprobs
        values = in_chunks(self.critic_values)

        samples = sample_rows(episodes, scores, (k1(old_logprobs, ref_logprobs) * mask).sum(1))
        trajectories = Trajectories(
            input_ids=input_ids,
            attention_mask=attention_mask,
            response_mask=mask,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
            scores=scores,
            finished=output.finished,
            rollout_logprobs=output.logprobs,
            prompt_index=prompts.index.to(self.device).repeat_interleave(num_samples),
        )
        seconds = {"time/generate": generated - start, "time/score": time.perf_counter() - generated}
        return trajectories, samples, seconds

    def rollout(self, prompts: PromptSource, iteration: int) -> tuple[Trajectories, dict[str, float]]:
        """Steps 1 to 3 on all ranks. Every rank computes its share of the episodes and receives all of them."""
        gather, sizes = partial(gather_rows, group=data_parallel_group(self.trainer.strategy)), self.sizes
        start = time.perf_counter()
        rows = self.next_prompts(prompts)
        batch, uniforms = self.rollout_inputs(prompts, rows, iteration)
        output = None
        if self.remote is not None:
            output = self.finish_next_rollout(self.remote, self.rollout_key(rows, iteration), batch.index)
        waited = time.perf_counter() - start
        own, self.samples, seconds = self.generate_and_score(batch, uniforms, training=True, output=output)
        seconds["time/generate"] += waited
        reward_metrics = {name: float(gather(value).mean()) for name, value in self.reward.metrics().items()}
        sums = sum_scores_by_column(repeat_prompts(batch, sizes.samples_per_prompt).rows, own.scores.tolist())
        reward_metrics |= mean_scores_by_column(all_gather_object(sums, data_parallel_group(self.trainer.strategy)))
        left_padded = ("input_ids", "attention_mask")
        columns = (
            gather(value, name in left_padded, sizes.samples_per_prompt) for name, value in own._asdict().items()
        )
        return Trajectories(*columns), seconds | reward_metrics

    def rollout_inputs(
        self, prompts: PromptSource, rows: list[TokenizedPrompt], iteration: int
    ) -> tuple[PromptBatch, Tensor]:
        """Return this rank's prompts and sampling noise of an iteration, whose prompts over all ranks are `rows`."""
        (world_size, rank), sizes = get_dp_world_size_and_rank(self.trainer), self.sizes
        index = torch.arange(sizes.num_prompts)[rank::world_size]
        batch = prompts.collate([rows[int(i)] for i in index], index)
        # Drawn for all episodes on every rank: a response does not depend on the number of ranks.
        uniforms = sampling_uniforms(sizes.rollout_batch_size, self.sampling.max_new_tokens, self.seed, iteration, 0)
        uniforms = uniforms.view(sizes.num_prompts, sizes.samples_per_prompt, -1)[index].flatten(0, 1)
        return batch, uniforms

    def rollout_key(self, rows: list[TokenizedPrompt], iteration: int) -> RolloutKey:
        """Return what identifies the rollout of an iteration, over all ranks."""
        return rollout_key(iteration, rows, self.sizes.samples_per_prompt, self.sampling, self.seed)

    def start_next_rollout(self, remote: RemoteGenerator, prompts: PromptSource) -> None:
        """Begin to sample the responses of the next iteration, from the policy before this one's update."""
        rows, iteration = self.next_prompts(prompts), self.num_iterations
        batch, uniforms = self.rollout_inputs(prompts, rows, iteration)
        try:
            self.call_generator(remote.start, batch.to(self.device), uniforms)
            self.next_rollout = self.rollout_key(rows, iteration)
        except RankError:
            raise
        except UserError as error:  # on all ranks; this iteration is sampled and counted, so it is trained on
            rank_zero_warn(f"PPO: the responses of iteration {iteration} are not sampled during this update: {error}")

    def finish_next_rollout(self, remote: RemoteGenerator, key: RolloutKey, index: Tensor) -> GenerationOutput | None:
        """Return the responses that were sampled during the last update; None if they are to be sampled now."""
        stored, self.stored_rollout, self.next_rollout = self.stored_rollout, {}, None
        if stored and stored["key"] == list(key):
            return select_output(stored["output"], index, self.sizes.samples_per_prompt, self.device)
        output = remote.finish()
        if output is None and key.iteration:
            rank_zero_info(
                f"PPO: iteration {key.iteration} samples from the current policy: no responses were sampled during the "
                "last update, or with other settings, or the server has lost the weights"
            )
        return output

    def next_prompts(self, prompts: PromptSource) -> list[TokenizedPrompt]:
        """Return the prompts after those of the iterations so far, which may have been of other sizes."""
        count = self.sizes.num_prompts
        block, first = divmod(self.num_prompts, count)
        rows = prompts.get_prompts(block, count)
        return [*rows[first:], *prompts.get_prompts(block + 1, count)[:first]] if first else rows

    def collect_experience(self, prompts: PromptSource) -> PPOIteration:
        """Steps 1 to 6 of an iteration: all data that its update uses. Called before the first micro-batch."""
        iteration = self.num_iterations  # not current_epoch: after a resume, that may be one ahead
        start = time.perf_counter()
        # A dataloader runs outside the autocast of training_step; without it the first ratio would not be 1.
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            trajectories, metrics = self.rollout(prompts, iteration)
        # From here on every rank computes the same numbers from all episodes, without communication.

        # 4 KL penalty: r_t = -β (log π(y_t) - log π_ref(y_t)), plus the score on the last token
        coefficient = self.kl.coefficient
        rewards = compute_rewards(trajectories, coefficient)

        # 5 advantages: GAE, A_t = Σ_l (γλ)^l δ_{t+l} and returns A_t + V_t; 6 whiten A over all tokens of all ranks
        advantages, returns = self.advantages.estimate(rewards, trajectories)

        rollout_metrics = compute_rollout_metrics(trajectories, coefficient, advantages, returns)
        if self.ppo.old_logprobs == "recompute":
            rollout_metrics |= compute_logprob_mismatch(
                trajectories.old_logprobs, trajectories.rollout_logprobs, trajectories.response_mask
            )
        weights = None
        if self.ppo.importance_sampling_cap is not None:
            pair = trajectories.old_logprobs, trajectories.rollout_logprobs
            cap = self.ppo.importance_sampling_cap
            weights = truncated_importance_weights(*pair, trajectories.response_mask, cap)
            rollout_metrics |= compute_importance_metrics(weights, trajectories.response_mask, cap)
        self.kl.update(float(rollout_metrics["reward/kl"]), self.ppo.rollout_batch_size)
        metrics["time/rollout"] = time.perf_counter() - start
        rollout_metrics |= {name: torch.tensor(value) for name, value in metrics.items()}
        self.num_iterations, self.num_prompts = iteration + 1, self.num_prompts + self.sizes.num_prompts
        self.num_episodes += self.sizes.rollout_batch_size
        self.num_tokens += int(trajectories.attention_mask.sum())
        if self.remote is not None:
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                self.start_next_rollout(self.remote, prompts)
        order = EpisodeOrder(self.seed, self.sizes.order_block)
        return PPOIteration(iteration, trajectories, rewards, advantages, returns, rollout_metrics, order, weights)

    # ---------------------------------------------------------------------------------------------------------- update

    def training_step(self, batch: Experience | PretrainingBatch, batch_idx: int) -> Tensor:
        """Step 7: the loss of a micro-batch, normalized by the tokens of its minibatch."""
        if isinstance(batch, PretrainingBatch):
            return self.pretraining_step(batch)
        ppo, output = self.ppo, self.forward_batch(batch)
        logprobs, mask = output.logprobs, batch.response_mask  # (B, R)

        # 7 policy loss: Σ_t max(-A_t ρ_t, -A_t clip(ρ_t, 1 - ε, 1 + ε)), ρ_t = π(y_t) / π_old(y_t)
        policy = clipped_policy_loss(logprobs, batch.old_logprobs, batch.advantages, mask, ppo.clip_range)
        self.epoch_means.add("policy/loss", policy.loss, policy.count)
        self.epoch_means.add("policy/clip_fraction", policy.num_clipped, policy.count)
        self.epoch_means.add("policy/approx_kl", policy.approx_kl, policy.count)
        self.log_ratios = torch.where(mask, logprobs.detach() - batch.old_logprobs, torch.nan)
        loss = policy.loss

        # 8 value loss, if the values came with the policy's pass; otherwise in `backward`
        if output.values is not None:
            loss = loss + self.value_loss(output.values, batch)
        if output.entropy is not None:
            entropy = masked_sum(output.entropy, mask)
            self.epoch_means.add("policy/entropy", entropy, policy.count)
            loss = loss - ppo.entropy_coefficient * entropy

        if batch.rollout_metrics and ppo.old_logprobs == "rollout":  # the weights are still those of the rollout
            mismatch = compute_logprob_mismatch(logprobs.detach(), batch.old_logprobs, mask)
            self.epoch_means.add_values(mismatch)
        self.epoch_means.add_values(batch.rollout_metrics)
        return self.normalize_loss(loss, batch.normalizer)

    def forward_batch(self, batch: Experience) -> ForwardOutput:
        """Return log-probs of the policy, and values of a critic that shares the policy's forward pass.

        Another critic runs after the policy's backward pass, so only one model's activations are alive at a time,
        unless the strategy allows a single backward pass per step.
        """
        packed = self.pack(batch.input_ids, batch.attention_mask, batch.response_mask.shape[1])
        self.epoch_means.add("update/padding_fraction", packed.num_padding, packed.input_ids.numel())
        entropy = None
        with capture_last_hidden_state(self.policy) as hidden:
            if self.ppo.entropy_coefficient > 0:
                logprobs, entropy = logprobs_and_entropy(self.policy, packed, self.sampling)
            else:
                logprobs = packed_logprobs(self.policy, packed, self.sampling)
        values = None
        if self.critic is not None and self.critic.shares_forward_pass:
            values = self.critic.values_from_hidden(hidden[0], self.policy, packed)
        elif self.critic is not None and requires_single_backward(self.trainer.strategy):
            values = self.critic.values(self.policy, packed)
        elif self.critic is not None:
            self.pending_critic_batch = batch, packed
        return ForwardOutput(logprobs, values, entropy)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward pass of the policy, then forward and backward pass of a critic with a pass of its own."""
        super().backward(loss, *args, **kwargs)
        if self.critic is None or self.pending_critic_batch is None:
            return
        (batch, packed), self.pending_critic_batch = self.pending_critic_batch, None
        with self.trainer.precision_plugin.forward_context():
            value_loss = self.value_loss(self.critic.values(self.policy, packed), batch)
            value_loss = self.normalize_loss(value_loss, batch.normalizer)
        # Lightning divides the loss of a training_step by accumulate_grad_batches, but not this one.
        self.trainer.strategy.backward(value_loss / self.trainer.accumulate_grad_batches, None)

    def value_loss(self, values: Tensor, batch: Experience) -> Tensor:
        """Step 8: the clipped value loss times its coefficient, summed over the tokens of a micro-batch."""
        assert batch.returns is not None
        # ½ Σ_t max((V_t - G_t)², (clip(V_t, V_old,t - ε, V_old,t + ε) - G_t)²), G the returns
        value = clipped_value_loss(
            values, batch.old_values, batch.returns, batch.response_mask, self.ppo.value_clip_range
        )
        self.epoch_means.add("value/loss", value.loss, value.count)
        self.epoch_means.add("value/clip_fraction", value.num_clipped, value.count)
        return self.ppo.value_coefficient * value.loss

    def pretraining_step(self, batch: PretrainingBatch) -> Tensor:
        """Step 9: the language-modeling loss, mean over tokens (the γ term of Eq. 2, without γ).

        `PretrainingMix` multiplies it by γ and adds its gradient to that of steps 7 and 8 before the optimizer step.
        """
        total, count = causal_lm_loss(self.policy, batch.input_ids, batch.loss_mask, batch.attention_mask)
        self.epoch_means.add("pretraining/loss", total, count)
        return self.normalize_loss(total, batch.normalizer)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Step 10, before Lightning clips and steps: keep the policy fixed during the critic's warm-up."""
        if self.num_iterations <= self.ppo.critic_warmup_iterations:
            self.drop_policy_gradients()
        super().on_before_optimizer_step(optimizer)

    # ------------------------------------------------------------------------------------------------------ validation

    @torch.no_grad()
    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Steps 1 to 3 on validation prompts, with the same noise every time; log mean score and KL."""
        is_own = batch.index >= 0  # a rank without a prompt left repeats another rank's with index -1
        index = batch.index.cpu().clamp(min=0)
        uniforms = sampling_uniforms(int(index.max()) + 1, self.sampling.max_new_tokens, self.seed, 0, 2)[index]
        trajectories, *_ = self.generate_and_score(batch, uniforms, training=False)
        kl = (k1(trajectories.old_logprobs, trajectories.ref_logprobs) * trajectories.response_mask).sum(1)
        if is_own.any():
            self.validation_score.update(trajectories.scores[is_own])
            self.validation_kl.update(kl[is_own])
        metrics = {"validation/score": self.validation_score, "validation/kl": self.validation_kl}
        self.log_dict({self.metric_name(name): metric for name, metric in metrics.items()}, prog_bar=True)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """See `validation_step`; the metrics are `test/score` and `test/kl`."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return the rows of the prompts, each with a `response`; nothing is scored."""
        return answer_prompts(self, self.generator, self.sampling, batch)

    def collate(self, rows: OwnRows) -> PromptBatch:
        """See `LitModule`: prompts to validate, test or predict on."""
        if self._trainer is not None and self.trainer.training:
            raise UserError(
                "PPO: a training batch is sampled by the policy, not read; give the prompts to a data module: "
                "trainer.fit(module, PromptDataModule(prompts))"
            )
        return collate_answerable(self, rows, self.sampling)

    def sample_responses(self, count: int) -> list[dict[str, Any]]:
        """Return rows of the first `count` prompts, at most 16, with the same noise every time.

        A row has iteration, prompt, reference (the answer in the data, if there is one), response, score and KL.
        """
        assert self.prompts is not None
        prompts = self.prompts.get_prompts(0, self.sizes.num_prompts)[:count]
        batch = self.prompts.collate(prompts, torch.arange(len(prompts)))
        uniforms = sampling_uniforms(len(prompts), self.sampling.max_new_tokens, self.seed, 0, 4)
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            _, samples, _ = self.generate_and_score(batch, uniforms, training=False)
        return [{ITERATION: self.num_iterations, **row} for row in samples]

    def axes(self) -> dict[str, float]:
        """See `LitModule`."""
        return {ITERATION: self.num_iterations, "episodes": self.num_episodes, **super().axes()}

    # ------------------------------------------------------------------------------------------------- setup and resume

    def setup(self, stage: str) -> None:
        """Refuse batch sizes and lengths that do not fit, before any weight is read."""
        super().setup(stage)
        trainer, ppo = self.trainer, self.ppo
        world_size, _ = get_dp_world_size_and_rank(trainer)
        self.sizes = BatchSizes(
            ppo.rollout_batch_size,
            ppo.micro_batch_size,
            trainer.accumulate_grad_batches,
            world_size,
            ppo.ppo_epochs,
            ppo.samples_per_prompt,
        )
        check_group_size(self.advantages, ppo.samples_per_prompt)
        self.check_models()
        self.generator.check_model(self.model_config)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, PromptDataModule) and data.prompts is not None:
            self.check_length(data.prompts)
        self.seed = trainer.strategy.broadcast(torch.initial_seed())
        if isinstance(self.generator, RemoteGenerator) and tensor_parallel_size(trainer.strategy) > 1:
            raise UserError(
                "trainer.strategy.tensor_parallel_size: a generator outside this process may return different "
                "responses to ranks that need the same; set it to 1, or leave out model.generator"
            )
        if stage == "fit":  # a validation after it leaves the position as it is
            check_whole_rollouts(trainer)
            self.num_iterations = self.num_prompts = self.num_episodes = 0
            self.mid_iteration_state, self.pending_critic_batch = {}, None  # of an earlier fit that was interrupted
            self.stored_rollout, self.next_rollout = {}, None

    def check_length(self, prompts: PromptSource) -> None:
        """Refuse prompts that leave no positions for a response."""
        width = self.sampling.max_new_tokens
        what = f"the longest prompt ({prompts.max_length}) with sampling.max_new_tokens ({width})"
        self.check_max_positions(
            prompts.max_length + width, what, "data.max_prompt_length or model.sampling.max_new_tokens"
        )

    def experience_loader(self, prompts: PromptSource) -> ExperienceLoader:
        """Return the training dataloader over `prompts`; `PromptDataModule.train_dataloader` calls it."""
        self.check_length(prompts)
        self.prompts, sizes, (_, rank) = prompts, self.sizes, get_dp_world_size_and_rank(self.trainer)
        self.loader = ExperienceLoader(
            lambda: self.collect_experience(prompts),
            lambda iteration: iter_micro_batches(iteration, sizes, rank, self.seed),
            sizes.num_micro_batches,
            sizes.shape,
        )
        if self.mid_iteration_state:
            self.loader.resume(self.mid_iteration_state, self.device)
            self.mid_iteration_state = {}
        return self.loader

    def configure_callbacks(self) -> list[Callback]:
        """Return a callback that drops responses which no update waits for."""
        return [] if self.remote is None else [DropNextRollout()]

    def teardown(self, stage: str) -> None:
        """Drop responses that no update waits for."""
        self.drop_next_rollout()

    def prepare_stop(self) -> None:
        """See `Stoppable`: responses that are not there soon are dropped, and sampled again after a resume."""
        if self.remote is not None and self.next_rollout is not None and self.remote.ready_output(STOP_TIMEOUT) is None:
            self.drop_next_rollout()

    def drop_next_rollout(self) -> None:
        """Forget responses that are sampled during an update."""
        if self.remote is not None:
            self.remote.cancel()
        self.next_rollout, self.stored_rollout = None, {}

    def on_fit_start(self) -> None:
        """Print the batch sizes, which models are offloaded, and why rows are not packed."""
        rank_zero_info("".join([f"PPO: {self.sizes}", *(f"; in host memory: {name}" for name in self.offloaded)]))
        reason = packing_unsupported_reason(self.policy.config, 0)
        if reason is not None:
            rank_zero_info(f"PPO: every sequence is a row of its own, because {reason}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the states of KL controller and reward, and an iteration that is not finished."""
        super().on_save_checkpoint(checkpoint)
        # there is no loader if nothing was trained: a model that was only validated can be saved
        state = self.loader.mid_iteration_state() if self.loader and not self.trainer.is_last_batch else {}
        if state:
            checkpoint["iteration"] = state | {"samples": self.samples, "distribution": self.sampling.distribution()}
        checkpoint["collected"] = {
            "iterations": self.num_iterations,
            "prompts": self.num_prompts,
            "episodes": self.num_episodes,
        }
        if self.stored_rollout:  # which no iteration has used yet
            checkpoint["next_rollout"] = self.stored_rollout
        elif self.remote is not None and self.next_rollout is not None:
            self.save_next_rollout(self.remote, self.next_rollout, checkpoint)
        checkpoint["kl_controller"] = self.kl.state_dict()
        checkpoint[CHECKPOINT_KEY]["kl_controller"] = class_path(self.kl)
        checkpoint["reward"] = self.reward.state_dict()

    def save_next_rollout(self, remote: RemoteGenerator, key: RolloutKey, checkpoint: dict[str, Any]) -> None:
        """Wait for the responses of the next iteration, and save them: their policy is not in the checkpoint."""
        output = remote.ready_output()
        if output is not None:  # else the iteration samples again, or fails
            group = data_parallel_group(self.trainer.strategy)
            gather = partial(gather_rows, block_size=self.sizes.samples_per_prompt, group=group)
            checkpoint["next_rollout"] = {"key": list(key), "output": gather_output(output, gather)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore also the states of the KL controller and the reward."""
        super().on_load_checkpoint(checkpoint)
        if checkpoint[CHECKPOINT_KEY].get("kl_controller") == class_path(self.kl):  # else the recipe's new one begins
            self.kl.load_state_dict(checkpoint["kl_controller"])
        self.reward.load_state_dict(checkpoint.get("reward", {}))

    def load_training_state(self, checkpoint: dict[str, Any]) -> None:
        """Also restore the position in the prompts, and an iteration that is not finished."""
        super().load_training_state(checkpoint)
        collected = checkpoint["collected"]
        self.num_iterations, self.num_prompts = collected["iterations"], collected["prompts"]
        self.num_episodes = collected["episodes"]
        self.stored_rollout = {} if self.remote is None else checkpoint.get("next_rollout", {})
        self.mid_iteration_state = state = checkpoint.get("iteration", {})
        if not state:
            return
        check_mid_iteration_state(state, self.sizes)
        if state["distribution"] != self.sampling.distribution():
            raise UserError(
                "ckpt_path: the checkpoint is in the middle of an iteration that was sampled with "
                f"{state['distribution']}, and sampling has {self.sampling.distribution()} now; take that of then, or "
                "a checkpoint at the end of an iteration"
            )
        self.samples = state["samples"]
        convert_batch_progress(checkpoint, state["episodes"], state["sizes"], self.sizes.shape)
