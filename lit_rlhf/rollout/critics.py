"""Where the critic's value comes from: a network of its own, the policy's trunk, or an adapter on the policy's base.

A critic is a module with the weights that are trained for it beside the policy's; the policy is given to each call.
"""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models.adapters import adapter_weights, add_lora, has_adapter
from lit_rlhf.models.layout import Layout
from lit_rlhf.models.loading import load_config
from lit_rlhf.models.lora_checkpoint import put_on, read_scalar_adapter
from lit_rlhf.models.options import LoRA, ModelOptions
from lit_rlhf.models.riding import RidingHead, hidden_under, zero_head
from lit_rlhf.models.scalar import ScalarModel, load_scalar_model
from lit_rlhf.rollout.advantages import AdvantageEstimator
from lit_rlhf.rollout.passes import response_values


class CriticStart(NamedTuple):
    """What a critic may start from."""

    model: str  # the policy's folder or hub name
    reward: str | None  # the reward model's, or the checkpoint of its adapter; None where the reward is no model
    tokenizer: Tokenizer
    options: ModelOptions
    adapter: LoRA | None  # of the policy


class Critic(nn.Module):
    """Base of the critics. `load` is called once, after the policy was loaded.

    Attributes:
        beside_policy: whether values come out of the policy's own pass (`values_beside`). Those of every other critic
            are computed when the policy's backward pass is done: so activations are held of one of them at a time.
    """

    beside_policy = False

    def check(self, start: CriticStart) -> None:
        """Refuse what cannot be, before any weight is read."""

    def load(self, policy: PreTrainedModel, start: CriticStart) -> None:
        """Load or make the weights."""
        raise NotImplementedError

    def models(self) -> list[PreTrainedModel]:
        """Return what computes besides the policy: a batch is laid out so that all of them can."""
        return []

    def values(self, policy: PreTrainedModel, layout: Layout) -> Tensor:
        """Return the value before each response token, (B, R) float32.

        Args:
            policy: the causal language model.
            layout: the batch.
        """
        raise NotImplementedError

    def values_beside(self, hidden: Tensor, policy: PreTrainedModel, layout: Layout) -> Tensor:
        """Return the same of a policy that has just passed over the tokens; `hidden` is its last layer, (L, W, D)."""
        raise NotImplementedError

    def trained(self, policy: PreTrainedModel) -> list[nn.Parameter]:
        """Return the weights that get the critic's learning rate; some may stand in the policy."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


class SeparateCritic(Critic):
    """A network of its own (App. C.4). It keeps value learning from disturbing the policy (Stiennon 2020, App. G.1).

    Args:
        model: folder or hub name to start from: a reward model, or a language model, which gets a zero head. By
            default the reward model, and where the reward is none, the policy's model.
    """

    network: ScalarModel

    def __init__(self, model: str | None = None) -> None:
        super().__init__()
        self.path = model

    def check(self, start: CriticStart) -> None:
        """See `Critic.check`."""
        path = self._start(start)
        if Path(path).is_file():
            raise UserError(
                f"critic: the reward {path!r} is an adapter; a separate critic starts from a folder. Set model.critic "
                "to one, or to lit_rlhf.rollout.critics.AdapterCritic"
            )
        load_config(path, start.options)

    def _start(self, start: CriticStart) -> str:
        return self.path or start.reward or start.model

    def load(self, policy: PreTrainedModel, start: CriticStart) -> None:
        """See `Critic.load`."""
        self.network = load_scalar_model(self._start(start), start.tokenizer, start.options)
        if self.network.fresh_head:
            self.network.model.score.weight.data.zero_()
        if start.adapter is not None:
            add_lora(self.network.model, start.adapter)

    def models(self) -> list[PreTrainedModel]:
        """See `Critic.models`."""
        return [self.network.model]

    def values(self, policy: PreTrainedModel, layout: Layout) -> Tensor:
        """See `Critic.values`."""
        return response_values(self.network, layout)


class SharedTrunkCritic(Critic):
    """A head on the policy's own last layer, 0 at the start (Ziegler 2019): one forward pass for policy and value.

    Half the memory and most of the time of a separate critic; but the value loss moves the policy's trunk, so its
    weight (`ppo.value_coefficient`) now matters: Ziegler et al. take 0.1.
    """

    beside_policy = True
    head: RidingHead

    def load(self, policy: PreTrainedModel, start: CriticStart) -> None:
        """See `Critic.load`."""
        self.head = zero_head(policy)

    def values(self, policy: PreTrainedModel, layout: Layout) -> Tensor:
        """See `Critic.values`."""
        return _read(self.head, hidden_under(policy, None, layout), layout)

    def values_beside(self, hidden: Tensor, policy: PreTrainedModel, layout: Layout) -> Tensor:
        """See `Critic.values_beside`: no pass of its own."""
        return _read(self.head, hidden, layout)


class AdapterCritic(Critic):
    """An adapter and a head of its own on the policy's frozen base (LoRA runs): a network of its own for little memory.

    Args:
        checkpoint: of a `RewardModule` that was trained with an adapter from the policy's folder. By default that of
            the reward (`AdapterReward`); where there is none, a fresh adapter, and a head that is 0 at the start.
    """

    name = "critic"
    head: RidingHead

    def __init__(self, checkpoint: str | None = None) -> None:
        super().__init__()
        self.path = checkpoint

    def check(self, start: CriticStart) -> None:
        """See `Critic.check`."""
        if start.adapter is None:
            raise UserError("critic: AdapterCritic is an adapter on the policy's base; set model.adapter as well")
        if self.path is not None:
            read_scalar_adapter(self.path)

    def load(self, policy: PreTrainedModel, start: CriticStart) -> None:
        """See `Critic.load`."""
        assert start.adapter is not None and has_adapter(policy)
        rides = start.reward is not None and Path(start.reward).is_file()
        path = self.path or (start.reward if rides else None)
        if path is not None:
            self.head = put_on(read_scalar_adapter(path), policy, start.model, self.name)
        else:
            add_lora(policy, start.adapter, self.name)
            self.head = zero_head(policy)

    def values(self, policy: PreTrainedModel, layout: Layout) -> Tensor:
        """See `Critic.values`."""
        return _read(self.head, hidden_under(policy, self.name, layout), layout)

    def trained(self, policy: PreTrainedModel) -> list[nn.Parameter]:
        """See `Critic.trained`."""
        own = [weight for weight in adapter_weights(policy, self.name).values() if isinstance(weight, nn.Parameter)]
        return [*super().trained(policy), *own]


def critic_of(setting: Critic | str | None, estimator: AdvantageEstimator) -> Critic | None:
    """Return the critic of a run: none for an estimator that reads no values.

    Args:
        setting: of the recipe; a folder means a separate critic from there.
        estimator: of the advantages.

    Raises:
        UserError: a critic was asked for that nothing would read.
    """
    if not estimator.uses_critic:
        if setting is not None:
            raise UserError(f"critic: {type(estimator).__name__} reads no values; leave model.critic out")
        return None
    return setting if isinstance(setting, Critic) else SeparateCritic(setting)


def _read(head: RidingHead, hidden: Tensor, layout: Layout) -> Tensor:
    """Return the head's output before each response token, (B, R), of a last layer (L, W, D)."""
    return layout.spread(head(hidden[layout.predictors]))
