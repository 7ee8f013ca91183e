"""Refuse a callback that monitors a metric which the run will not log, before the run starts."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lit_rlhf.errors import UserError
from lit_rlhf.suggestions import did_you_mean

COUNTERS = ("step", "epoch")  # which a ModelCheckpoint can monitor as well
TRAINING = ("train/loss", "train/grad_norm", "lr/model", "grad_norm/model")
# class -> the metrics that it logs, as docs/metrics.md defines them
LOGGED_BY: dict[str, tuple[str, ...]] = {
    "SFTModule": (*TRAINING, "validation/loss"),
    "RewardModule": (*TRAINING, "train/accuracy", "validation/loss", "validation/accuracy", "validation/ece"),
    "PPOModule": (
        "train/grad_norm",
        "lr/policy",
        "lr/critic",
        "grad_norm/policy",
        "grad_norm/critic",
        "reward/score",
        "reward/score_std",
        "reward/score_min",
        "reward/score_max",
        "reward/kl",
        "reward/kl_k2",
        "reward/kl_k3",
        "reward/kl_coefficient",
        "reward/kl_penalized_score",
        "advantage/min",
        "advantage/max",
        "prompt/length",
        "prompt/length_max",
        "response/length",
        "response/length_max",
        "response/eos_fraction",
        "response/repeated_trigram_fraction",
        "rollout/logprob_mismatch",
        "rollout/logprob_mismatch_max",
        "rollout/importance_weight",
        "rollout/importance_capped_fraction",
        "policy/entropy_estimate",
        "policy/loss",
        "policy/clip_fraction",
        "policy/approx_kl",
        "policy/entropy",
        "value/explained_variance",
        "value/loss",
        "value/clip_fraction",
        "update/padding_fraction",
        "validation/score",
        "validation/kl",
        "time/generate",
        "time/score",
        "time/rollout",
    ),
    "PretrainingMix": (
        "pretraining/loss",
        "pretraining/grad_norm",
        "policy/grad_norm",
        "pretraining/grad_norm_ratio",
    ),
    "PretrainingValidation": ("validation/pretraining_loss",),
    "GenerateOnValidation": ("validation/reward_score",),
    "RewardModelReport": (
        "reward_model/pairwise_nll",
        "reward_model/length_correlation",
        "reward_model/empty",
        "reward_model/repeated_token",
        "reward_model/repeated_sentence",
        "reward_model/thanks",
        "reward_model/prompt_copied",
        "reward_model/refusal",
    ),
    "CenterScores": ("centering/shift", "centering/scale"),
    "StandardizeScores": ("centering/shift", "centering/scale"),
    "Throughput": (
        "time/update",
        "time/other",
        "throughput/generate_tokens_per_sec",
        "throughput/score_tokens_per_sec",
        "throughput/update_tokens_per_sec",
        "throughput/device_tokens_per_sec",
        "throughput/mfu",
        "memory/peak_gib",
    ),
    "EnsembleReward": ("reward/ensemble_std",),
    "ClippedReward": ("reward/clip_fraction",),
    "SequenceClassifierReward": ("reward/truncated_fraction",),
}
# rewards that log no metrics of their own; a function does if it has parts
NO_METRICS = (
    "RewardModelScorer",
    "FunctionReward",
    "LoRARewardModel",
    "RemoteReward",
    "VLLMRewardModel",
    "ScaledReward",
    "NormalizedReward",
)
OWN = ("lit_rlhf.", "lightning.")


def check_monitors(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuse a `monitor` that names no metric of the run.

    A run with parts of the user's own may log any metric; Lightning then finds out when the metric is first read.

    Args:
        trainer: with its callbacks.
        module: the module.

    Raises:
        UserError: names the callback, and the nearest metric.
    """
    from lit_rlhf.modules.ppo import PPOModule
    from lit_rlhf.rewards import FunctionReward

    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    rewards = list(module.reward.iter_parts()) if isinstance(module, PPOModule) else []
    parts = [module, *callbacks, *rewards]
    if not all(type(part).__module__.startswith(OWN) for part in parts):
        return
    logged = {metric for part in parts for metric in LOGGED_BY.get(type(part).__name__, ())}
    has_named_rewards = any(
        type(part).__name__ not in (*NO_METRICS, *LOGGED_BY) or (isinstance(part, FunctionReward) and part.weights)
        for part in rewards
    )
    for name, metric, counters in iter_monitors(callbacks):
        if metric in logged or metric in counters or metric.startswith("lr-"):
            continue
        if metric.startswith("reward/") and has_named_rewards:
            continue
        if metric.startswith("reward/score_by_") and isinstance(module, PPOModule):  # by a column of the data
            continue
        base = metric.removesuffix("_step").removesuffix("_epoch")
        if base in logged:
            continue
        owners = [owner for owner, metrics in LOGGED_BY.items() if metric in metrics]
        hint = f"; {' or '.join(owners)} logs it" if owners else did_you_mean(metric, logged)
        raise UserError(f"trainer.callbacks: {name} monitors {metric!r}, which this run does not log{hint}")


def iter_monitors(callbacks: list[Any]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield the name of every callback that monitors a metric, the metric, and the counters that it may be."""
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint | EarlyStopping) and callback.monitor:
            counters = COUNTERS if isinstance(callback, ModelCheckpoint) else ()
            yield type(callback).__name__, callback.monitor, counters


def check_validation(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuse a `monitor` of a validation metric without validation data; builds the validation loader.

    Raises:
        UserError: names the callback.
    """
    for name, metric, _ in iter_monitors(trainer.callbacks):  # type: ignore[attr-defined]
        if metric.startswith("validation/") and type(module).__module__.startswith(OWN):
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            if not trainer.enable_validation or not sum(trainer.num_val_batches):
                raise UserError(
                    f"trainer.callbacks: {name} monitors {metric!r}, but there is no validation; set "
                    "data.validation_path or data.validation_fraction, and trainer.limit_val_batches above 0"
                )
