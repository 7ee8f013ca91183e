"""Settings of the Trainer with which it would train something else, silently."""

from lightning.pytorch import Trainer

from lit_rlhf.errors import UserError

HALF_PRECISION = (
    "trainer.precision: Lightning would round log-probs, advantages and normalizers to half precision with the "
    "weights; use -c precision/bf16-true, which sets model.loading.dtype instead, or -c precision/bf16-mixed"
)
OVERFITS = (
    "trainer.overfit_batches: the order of the rows is another in every epoch, so it would not repeat the same "
    "batches; use a data file with these rows alone"
)
RELOADS = (
    "trainer.reload_dataloaders_every_n_epochs: a new loader would begin again with the order of the first epoch; "
    "set it to 0"
)
LIMITS_ROLLOUT = (
    "trainer.limit_train_batches: an epoch of PPO is one iteration, whose rollout would be dropped in part; set "
    "model.ppo.rollout_batch_size"
)


def check_trainer_settings(trainer: Trainer) -> None:
    """Refuse settings that no module supports.

    Raises:
        UserError: names the setting, and what to use instead.
    """
    for applies, reason in (
        (trainer.precision in ("bf16-true", "16-true"), HALF_PRECISION),
        (bool(trainer.overfit_batches), OVERFITS),  # type: ignore[attr-defined]
        (bool(trainer.reload_dataloaders_every_n_epochs), RELOADS),  # type: ignore[attr-defined]
    ):
        if applies:
            raise UserError(reason)


def check_whole_rollouts(trainer: Trainer) -> None:
    """Refuse an iteration of PPO that `limit_train_batches` ends before all of its rollout is trained on.

    Raises:
        UserError: names what to set instead.
    """
    if limits_training(trainer):
        raise UserError(LIMITS_ROLLOUT)


def check_whole_minibatches(trainer: Trainer) -> None:
    """Refuse an epoch that `limit_train_batches` ends within a minibatch.

    Raises:
        UserError: names both settings.
    """
    batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
    limit = trainer.limit_train_batches
    is_cut = limits_training(trainer) and (not isinstance(limit, int) or batches == limit)
    if is_cut and batches % accumulated:
        raise UserError(
            f"trainer.limit_train_batches: the epoch's {batches} batches end within a minibatch of "
            f"accumulate_grad_batches {accumulated}; set a multiple of it"
        )


def limits_training(trainer: Trainer) -> bool:
    """Whether an epoch may have fewer batches than its loader: a limit of 1.0 is all of them, 1 is one batch.

    A fast_dev_run is a dry run, and may train anything.
    """
    limit = trainer.limit_train_batches
    return not trainer.fast_dev_run and (isinstance(limit, int) or limit < 1.0)  # type: ignore[attr-defined]
