"""Critics: a network of its own, a head on the policy's backbone, or an adapter on the policy's base.

A critic holds the weights that are trained in addition to the policy's; the policy is passed to each call.

Shapes: `B` episodes, `R` response, `L` rows of `W` tokens of a packed batch, `D` hidden size.
"""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models.given import ModelSource, copied, model_name
from lit_rlhf.models.loading import check_same_token_ids, load_config, load_tokenizer
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import adapter_state_dict, add_lora, has_adapter
from lit_rlhf.models.lora_checkpoint import (
    AdapterSource,
    attach_adapter,
    holds_adapter,
    read_scalar_adapter,
    resolve_adapter,
)
from lit_rlhf.models.scalar_model import ScalarModel, ScalarSource, load_scalar_model, resolve_scalar_model
from lit_rlhf.models.shared_backbone import ScalarHead, hidden_states_with_adapter, zero_init_head
from lit_rlhf.packing.packed_batch import PackedBatch
from lit_rlhf.packing.selective_logits import select_positions
from lit_rlhf.rollout.advantages import AdvantageEstimator
from lit_rlhf.rollout.forward_passes import response_values


class CriticInit(NamedTuple):
    """What a critic can be initialized from."""

    model: ModelSource  # the policy's folder, hub name or object
    reward: ScalarSource | None  # the reward model's, or its adapter's checkpoint; None if the reward is no model
    tokenizer: Tokenizer
    loading: ModelLoadingConfig
    adapter: LoRA | None  # of the policy


class Critic(nn.Module):
    """Base of the critics. A subclass needs `load` and `values`; `load` is called once, after the policy was loaded.

    Attributes:
        shares_forward_pass: whether values come from the policy's own forward pass (`values_from_hidden`). Other
            critics run after the policy's backward pass, so only one model's activations are alive at a time.
    """

    shares_forward_pass = False

    def check(self, init: CriticInit) -> None:
        """Refuse impossible settings, before any weight is read.

        Raises:
            UserError: names the setting.
        """

    def init_path(self, init: CriticInit) -> ScalarSource | None:
        """Return the folder, checkpoint or object that its weights come from; None if they are the policy's or new."""
        return None

    def frozen_base(self, init: CriticInit) -> ScalarSource | None:
        """Return where weights are from that the critic neither trains nor takes from the policy, if there are any."""
        return None

    def load(self, policy: PreTrainedModel, init: CriticInit) -> None:
        """Load or create the weights."""
        raise NotImplementedError

    def models(self) -> list[PreTrainedModel]:
        """Return the models that compute values apart from the policy; a batch is packed such that all support it."""
        return []

    def values(self, policy: PreTrainedModel, batch: PackedBatch) -> Tensor:
        """Return the value before each response token, (B, R) float32.

        Args:
            policy: the causal language model.
            batch: prompts and responses.
        """
        raise NotImplementedError

    def values_from_hidden(self, hidden: Tensor, policy: PreTrainedModel, batch: PackedBatch) -> Tensor:
        """Return the values from the last hidden state of a forward pass of the policy, (L, W, D)."""
        raise NotImplementedError

    def trainable_parameters(self, policy: PreTrainedModel) -> list[nn.Parameter]:
        """Return the parameters that get the critic's learning rate; some may belong to the policy's modules."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


class SeparateCritic(Critic):
    """A network of its own (App. C.4), so that value learning does not disturb the policy (Stiennon 2020, App. G.1).

    Args:
        model: folder, hub name or object to initialize from: a reward model, or a language model, which gets a zero
            head. By default the reward model, and if the reward is none, the policy's model. An object is copied.
    """

    network: ScalarModel

    def __init__(self, model: ScalarSource | Path | None = None) -> None:
        super().__init__()
        # a tuple: a module must not become a part of this one
        self.source = (None if model is None else resolve_scalar_model(model, "critic"),)

    def check(self, init: CriticInit) -> None:
        """See `Critic.check`."""
        path = self.init_path(init)
        if holds_adapter(path):
            raise UserError(
                f"critic: the reward {model_name(path)!r} is an adapter; a separate critic starts from a folder. Set "
                "model.critic to one, or to lit_rlhf.modules.LoRACritic"
            )
        if not isinstance(path, str):
            return
        load_config(path, init.loading)
        if path not in (init.model, init.reward):  # a reward checks its own tokenizer
            check_same_token_ids(init.tokenizer, load_tokenizer(path, init.loading), f"critic: {path!r}")

    def init_path(self, init: CriticInit) -> ScalarSource:
        """See `Critic.init_path`."""
        return next(source for source in (*self.source, init.reward, init.model) if source is not None)

    def frozen_base(self, init: CriticInit) -> ScalarSource | None:
        """See `Critic.frozen_base`: with an adapter, what it was initialized from."""
        return None if init.adapter is None else self.init_path(init)

    def load(self, policy: PreTrainedModel, init: CriticInit) -> None:
        """See `Critic.load`."""
        source = copied(self.init_path(init))
        self.network = load_scalar_model(source, init.tokenizer, init.loading)
        if not isinstance(source, str):
            self.network.requires_grad_(True)  # a reward model may have been frozen by its owner
        if self.network.head_is_new:
            self.network.model.score.weight.data.zero_()
        if init.adapter is not None:
            add_lora(self.network.model, init.adapter)

    def models(self) -> list[PreTrainedModel]:
        """See `Critic.models`."""
        return [self.network.model]

    def values(self, policy: PreTrainedModel, batch: PackedBatch) -> Tensor:
        """See `Critic.values`."""
        return response_values(self.network, batch)


class SharedBackboneCritic(Critic):
    """A zero-initialized head on the policy's last hidden state (Ziegler 2019): one forward pass for policy and value.

    Half the memory and most of the time of a separate critic; but the value loss updates the policy's backbone, so its
    coefficient (`ppo.value_coefficient`) matters: Ziegler et al. take 0.1.
    """

    shares_forward_pass = True
    head: ScalarHead

    def load(self, policy: PreTrainedModel, init: CriticInit) -> None:
        """See `Critic.load`."""
        self.head = zero_init_head(policy)

    def values(self, policy: PreTrainedModel, batch: PackedBatch) -> Tensor:
        """See `Critic.values`."""
        return _apply_head(self.head, hidden_states_with_adapter(policy, None, batch), batch)

    def values_from_hidden(self, hidden: Tensor, policy: PreTrainedModel, batch: PackedBatch) -> Tensor:
        """See `Critic.values_from_hidden`."""
        return _apply_head(self.head, hidden, batch)


class LoRACritic(Critic):
    """An adapter and a head of its own on the policy's frozen base (LoRA runs): a separate critic for little memory.

    Args:
        checkpoint: of a `RewardModule` that was trained with an adapter from the policy's folder, or the `model` of
            such a module. By default that of the reward (`LoRARewardModel`); without one, a new adapter and a zero
            head.
    """

    adapter_name = "critic"
    head: ScalarHead

    def __init__(self, checkpoint: AdapterSource | Path | None = None) -> None:
        super().__init__()
        # a tuple: a module must not become a part of this one
        self.source = (None if checkpoint is None else resolve_adapter(checkpoint, "critic"),)

    def check(self, init: CriticInit) -> None:
        """See `Critic.check`."""
        if init.adapter is None:
            raise UserError("critic: LoRACritic is an adapter on the policy's base; set model.adapter as well")
        if self.source[0] is not None:
            read_scalar_adapter(self.source[0])

    def init_path(self, init: CriticInit) -> AdapterSource | None:
        """See `Critic.init_path`."""
        if self.source[0] is None and isinstance(init.reward, str | ScalarModel) and holds_adapter(init.reward):
            return init.reward
        return self.source[0]

    def load(self, policy: PreTrainedModel, init: CriticInit) -> None:
        """See `Critic.load`."""
        assert init.adapter is not None and has_adapter(policy)
        path = self.init_path(init)
        if path is not None:
            base = model_name(init.model)
            self.head = attach_adapter(read_scalar_adapter(path), policy, base, self.adapter_name)
        else:
            add_lora(policy, init.adapter, self.adapter_name)
            self.head = zero_init_head(policy)

    def values(self, policy: PreTrainedModel, batch: PackedBatch) -> Tensor:
        """See `Critic.values`."""
        return _apply_head(self.head, hidden_states_with_adapter(policy, self.adapter_name, batch), batch)

    def trainable_parameters(self, policy: PreTrainedModel) -> list[nn.Parameter]:
        """See `Critic.trainable_parameters`."""
        weights = adapter_state_dict(policy, self.adapter_name).values()
        return [*super().trainable_parameters(policy), *(w for w in weights if isinstance(w, nn.Parameter))]


def resolve_critic(setting: Critic | ScalarSource | Path | None, estimator: AdvantageEstimator) -> Critic | None:
    """Return the critic of a run: None for an estimator that uses no values.

    Args:
        setting: of the recipe; a folder or a model means a separate critic initialized from it.
        estimator: of the advantages.

    Raises:
        UserError: a critic is set that the estimator would not use.
    """
    if not estimator.uses_critic:
        if setting is not None:
            raise UserError(f"critic: {type(estimator).__name__} reads no values; leave model.critic out")
        return None
    return setting if isinstance(setting, Critic) else SeparateCritic(setting)


def _apply_head(head: ScalarHead, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Return the head's output before each response token, (B, R), from a last hidden state (L, W, D)."""
    return batch.scatter_to_responses(head(select_positions(hidden, batch.predictor_index)))
