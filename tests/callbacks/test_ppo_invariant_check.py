"""Every check of PPOInvariantCheck: silent in a sound run, and loud where what it guards is broken."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_rlhf.callbacks import PPOInvariantCheck
from lit_rlhf.errors import UserError
from lit_rlhf.generation import CachedGenerator
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.loading_config import LoRA
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.rewards import RewardModelScorer
from lit_rlhf.rollout import advantages as estimators
from lit_rlhf.rollout.advantages import GRPOAdvantage
from lit_rlhf.rollout.experience import Episodes
from tests.helpers.ppo_fakes import PromptData


def module_of(llama: str, **settings: Any) -> PPOModule:
    """Two iterations of two minibatches, scored by a reward model."""
    ppo = {"rollout_batch_size": 8, "micro_batch_size": 4, **settings.pop("ppo", {})}
    reward = RewardModelScorer(llama, require_centered=False)
    sampling = settings.pop("sampling", SamplingParams(max_new_tokens=6))
    return PPOModule(llama, reward, sampling, PPOConfig(**ppo), **settings)


def fit(trainer_of: Any, module: PPOModule, **settings: Any) -> None:
    """Run it under the callback."""
    trainer_of(max_epochs=2, callbacks=[PPOInvariantCheck()], **settings).fit(module, datamodule=PromptData())


SOUND = {
    "plain": {},
    "adapter": {"adapter": LoRA(rank=2)},
    "recomputed": {"ppo": {"logprobs": "recomputed"}},
    "truncated": {"sampling": SamplingParams(max_new_tokens=6, temperature=0.7, top_p=0.8)},
    "groups": {"advantages": GRPOAdvantage(), "ppo": {"samples_per_prompt": 2}},
}


@pytest.mark.parametrize("settings", SOUND.values(), ids=SOUND)
def test_a_sound_run_passes(settings, llama, trainer_of):
    fit(trainer_of, module_of(llama, **settings))


def test_a_sound_run_passes_in_half_precision(llama, trainer_of):
    fit(trainer_of, module_of(llama), precision="bf16-mixed")


def test_padding_that_is_the_end_token(llama, trainer_of):
    module = module_of(llama)
    module.tokenizer.pad_token = module.tokenizer.eos_token
    with pytest.raises(
        UserError, match=r"self-check 'padding' at step 0: expected a padding token that is not the end"
    ):
        fit(trainer_of, module)


def test_dropout_in_the_critic(llama, trainer_of, monkeypatch):
    module, load = module_of(llama), PPOModule.configure_model

    def careless(self: PPOModule) -> None:
        if hasattr(self, "policy"):  # Lightning asks more than once
            return
        load(self)
        self.critic.extra = nn.Dropout(0.1)

    monkeypatch.setattr(PPOModule, "configure_model", careless)
    with pytest.raises(UserError, match=r"self-check 'dropout'.*seen 1: critic\.extra"):
        fit(trainer_of, module)


class Changed(CachedGenerator):
    """A generator whose rollouts are altered by a function."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function makes of a sound rollout."""
        return self.change(super().generate(*args, **kwargs))


def test_a_gap_in_the_response_mask(llama, trainer_of):
    def gap(rollout: Any) -> Any:
        mask = rollout.response_mask.clone()
        mask[0, 1] = False
        return rollout._replace(response_mask=mask)

    with pytest.raises(UserError, match=r"self-check 'actions'.*1 of 8 episodes otherwise, first 0"):
        groups = {"advantages": GRPOAdvantage(), "ppo": {"samples_per_prompt": 2}}
        fit(trainer_of, module_of(llama, generator=Changed(gap), **groups))


def test_log_probs_of_another_temperature(llama, trainer_of):
    def warmer(rollout: Any) -> Any:
        return rollout._replace(logprobs=rollout.logprobs * 0.9)

    with pytest.raises(UserError, match=r"self-check 'reference' at step 0: expected a KL of 0"):
        fit(trainer_of, module_of(llama, generator=Changed(warmer)))
    module = module_of(llama, generator=Changed(warmer), reference=f"{llama}/.")  # not known to be the same model
    with pytest.raises(UserError, match=r"self-check 'ratio' at step 0.*log-probs of another distribution"):
        fit(trainer_of, module)


def test_a_reference_with_other_weights(llama, trainer_of, monkeypatch):
    load = PPOModule.configure_model

    def careless(self: PPOModule) -> None:
        if hasattr(self, "policy"):  # Lightning asks more than once
            return
        load(self)
        self.frozen["reference"].lm_head.weight.data.mul_(1.1)

    monkeypatch.setattr(PPOModule, "configure_model", careless)
    with pytest.raises(UserError, match=r"self-check 'reference'.*other weights"):
        fit(trainer_of, module_of(llama))


def test_a_score_on_another_token(llama, trainer_of, monkeypatch):
    sound = estimators.kl_penalized_rewards

    def first_token(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
        return sound(scores, kl, mask, coefficient).flip(1)

    monkeypatch.setattr(estimators, "kl_penalized_rewards", first_token)
    with pytest.raises(UserError, match=r"self-check 'last action'.*on another token"):
        fit(trainer_of, module_of(llama))


def test_padding_in_a_mean(llama, trainer_of, monkeypatch):
    sound = estimators.moments
    monkeypatch.setattr(estimators, "moments", lambda values, mask: sound(values, torch.ones_like(mask)))
    module = module_of(llama, sampling=SamplingParams(max_new_tokens=40))
    with pytest.raises(UserError, match=r"self-check 'whitening'.*prompt or padding tokens were counted"):
        fit(trainer_of, module)


def test_a_ratio_that_is_not_one_in_a_later_iteration(llama, trainer_of):
    """The weights move between a rollout and its first minibatch: what an unsized loader does."""

    class Meddling(CachedGenerator):
        calls = 0

        def generate(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            rollout = super().generate(model, *args, **kwargs)
            self.calls += 1
            if self.calls == 2:
                model.lm_head.weight.data.mul_(1.2)
            return rollout

    with pytest.raises(UserError, match=r"self-check 'ratio' at step 2"):
        fit(trainer_of, module_of(llama, generator=Meddling()))


def test_a_reward_model_that_reads_padding(llama, trainer_of, monkeypatch):
    def last_column(self: RewardModelScorer, episodes: Episodes) -> Tensor:
        return self.model.score(episodes.input_ids, torch.ones_like(episodes.attention_mask))

    monkeypatch.setattr(RewardModelScorer, "score", last_column)
    with pytest.raises(UserError, match=r"self-check 'score'.*with and without padding"):
        fit(trainer_of, module_of(llama))


def test_other_stages_are_refused(llama, trainer_of):
    from lit_rlhf.modules import SFTModule

    with pytest.raises(UserError, match="PPOInvariantCheck checks PPO"):
        PPOInvariantCheck().on_train_start(trainer_of(), SFTModule(llama))
