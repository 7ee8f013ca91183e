"""Every check of PPOInvariantCheck passes in a correct run, and fails where its invariant is violated."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_rlhf.callbacks import PPOInvariantCheck
from lit_rlhf.callbacks.ppo_invariant_check import HALF_MAX_CLIP_FRACTION
from lit_rlhf.errors import UserError
from lit_rlhf.generation import CachedGenerator
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.loading_config import LoRA
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.rewards import RewardModelScorer
from lit_rlhf.rollout import advantages as estimators
from lit_rlhf.rollout.advantages import GRPOAdvantage
from lit_rlhf.rollout.experience import Episodes
from lit_rlhf.rollout.invariants import check_initial_ratio
from tests.helpers.ppo_fakes import PromptData


def build_module(llama: str, **settings: Any) -> PPOModule:
    """Build a module with two minibatches per iteration, scored by a reward model."""
    ppo = {"rollout_batch_size": 8, "micro_batch_size": 4, **settings.pop("ppo", {})}
    reward = RewardModelScorer(llama, require_centered=False)
    sampling = settings.pop("sampling", SamplingParams(max_new_tokens=6))
    return PPOModule(llama, reward, sampling, PPOConfig(**ppo), **settings)


def fit(make_trainer: Any, module: PPOModule, **settings: Any) -> None:
    """Train two iterations with the callback."""
    make_trainer(max_epochs=2, callbacks=[PPOInvariantCheck()], **settings).fit(module, datamodule=PromptData())


VALID = {
    "plain": {},
    "adapter": {"adapter": LoRA(rank=2)},
    "recompute": {"ppo": {"old_logprobs": "recompute"}},
    "truncated": {"sampling": SamplingParams(max_new_tokens=6, temperature=0.7, top_p=0.8)},
    "groups": {"advantages": GRPOAdvantage(), "ppo": {"samples_per_prompt": 2}},
}


@pytest.mark.parametrize("settings", VALID.values(), ids=VALID)
def test_a_correct_run_passes(settings, llama, make_trainer):
    fit(make_trainer, build_module(llama, **settings))


def test_a_correct_run_passes_in_half_precision(llama, make_trainer):
    fit(make_trainer, build_module(llama), precision="bf16-mixed")


def test_padding_that_is_the_end_token(llama, make_trainer):
    module = build_module(llama)
    module.tokenizer.pad_token = module.tokenizer.eos_token
    with pytest.raises(
        UserError, match=r"PPOInvariantCheck: 'padding' at step 0: expected a padding token that is not the end"
    ):
        fit(make_trainer, module)


def test_dropout_in_the_critic(llama, make_trainer, monkeypatch):
    module, load = build_module(llama), PPOModule.configure_model

    def configure_wrongly(self: PPOModule) -> None:
        if hasattr(self, "policy"):  # Lightning calls it more than once
            return
        load(self)
        self.critic.extra = nn.Dropout(0.1)

    monkeypatch.setattr(PPOModule, "configure_model", configure_wrongly)
    with pytest.raises(UserError, match=r"PPOInvariantCheck: 'dropout'.*observed 1: critic\.extra"):
        fit(make_trainer, module)


class ChangedGenerator(CachedGenerator):
    """Generator whose rollouts are changed by a function."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Return the changed rollout."""
        return self.change(super().generate(*args, **kwargs))


def test_a_gap_in_the_response_mask(llama, make_trainer):
    def gap(rollout: Any) -> Any:
        mask = rollout.response_mask.clone()
        mask[0, 1] = False
        return rollout._replace(response_mask=mask)

    with pytest.raises(UserError, match=r"PPOInvariantCheck: 'actions'.*1 of 8 episodes otherwise, first 0"):
        groups = {"advantages": GRPOAdvantage(), "ppo": {"samples_per_prompt": 2}}
        fit(make_trainer, build_module(llama, generator=ChangedGenerator(gap), **groups))


def test_log_probs_of_another_temperature(llama, make_trainer):
    def scale_logprobs(rollout: Any) -> Any:
        return rollout._replace(logprobs=rollout.logprobs * 0.9)

    with pytest.raises(UserError, match=r"PPOInvariantCheck: 'reference' at step 0: expected a KL of 0"):
        fit(make_trainer, build_module(llama, generator=ChangedGenerator(scale_logprobs)))
    module = build_module(
        llama, generator=ChangedGenerator(scale_logprobs), reference=f"{llama}/."
    )  # not known to be the same model
    with pytest.raises(UserError, match=r"PPOInvariantCheck: 'ratio' at step 0.*log-probs of another distribution"):
        fit(make_trainer, module)


def test_a_reference_with_other_weights(llama, make_trainer, monkeypatch):
    load = PPOModule.configure_model

    def configure_wrongly(self: PPOModule) -> None:
        if hasattr(self, "policy"):  # Lightning calls it more than once
            return
        load(self)
        self.frozen["reference"].lm_head.weight.data.mul_(1.1)

    monkeypatch.setattr(PPOModule, "configure_model", configure_wrongly)
    with pytest.raises(UserError, match=r"PPOInvariantCheck: 'reference'.*other weights"):
        fit(make_trainer, build_module(llama))


def test_a_score_on_another_token(llama, make_trainer, monkeypatch):
    original = estimators.kl_penalized_rewards

    def first_token(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
        return original(scores, kl, mask, coefficient).flip(1)

    monkeypatch.setattr(estimators, "kl_penalized_rewards", first_token)
    with pytest.raises(UserError, match=r"PPOInvariantCheck: 'last action'.*on another token"):
        fit(make_trainer, build_module(llama))


def test_padding_in_a_mean(llama, make_trainer, monkeypatch):
    original = estimators.moments
    monkeypatch.setattr(estimators, "moments", lambda values, mask: original(values, torch.ones_like(mask)))
    module = build_module(llama, sampling=SamplingParams(max_new_tokens=40))
    with pytest.raises(UserError, match=r"PPOInvariantCheck: 'whitening'.*prompt or padding tokens were counted"):
        fit(make_trainer, module)


def test_a_ratio_that_is_not_one_in_a_later_iteration(llama, make_trainer):
    """The weights change between a rollout and its first minibatch, as with a loader without a length."""

    class ChangeWeights(CachedGenerator):
        calls = 0

        def generate(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            rollout = super().generate(model, *args, **kwargs)
            self.calls += 1
            if self.calls == 2:
                model.lm_head.weight.data.mul_(1.2)
            return rollout

    with pytest.raises(UserError, match=r"PPOInvariantCheck: 'ratio' at step 2"):
        fit(make_trainer, build_module(llama, generator=ChangeWeights()))


@pytest.mark.parametrize("fraction, passes", [(0.004, (False, True)), (0.06, (False, False))])
def test_a_few_tokens_may_be_clipped_in_half_precision_alone(fraction, passes):
    limits = 0.0, HALF_MAX_CLIP_FRACTION
    assert tuple(check_initial_ratio(fraction, 0.0, 0.05, limit) is None for limit in limits) == passes


@pytest.mark.parametrize("precision, passes", [("32-true", False), ("bf16-mixed", True)])
def test_the_limit_of_clipped_tokens_is_that_of_the_precision(llama, make_trainer, monkeypatch, precision, passes):
    from lit_rlhf.callbacks import ppo_invariant_check

    limits = []
    monkeypatch.setattr(
        ppo_invariant_check.invariants, "check_initial_ratio", lambda *args: limits.append(args[-1]) and None
    )
    fit(make_trainer, build_module(llama), precision=precision)
    assert {limit > 0 for limit in limits} == {passes}


def test_a_reward_model_that_reads_padding(llama, make_trainer, monkeypatch):
    def last_column(self: RewardModelScorer, episodes: Episodes) -> Tensor:
        return self.model.score(episodes.input_ids, torch.ones_like(episodes.attention_mask))

    monkeypatch.setattr(RewardModelScorer, "score", last_column)
    with pytest.raises(UserError, match=r"PPOInvariantCheck: 'score'.*with and without padding"):
        fit(make_trainer, build_module(llama))


def test_other_stages_are_refused(llama, make_trainer):
    from lit_rlhf.modules import SFTModule

    with pytest.raises(UserError, match="PPOInvariantCheck checks PPO"):
        PPOInvariantCheck().on_train_start(make_trainer(), SFTModule(llama))
