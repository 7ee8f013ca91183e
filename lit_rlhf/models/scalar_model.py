"""A transformer with a scalar head: the reward model and the critic."""

import copy
import math
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.functional import last_token_index, position_ids
from lit_rlhf.models.given import ModelSource, model_name, resolve_model, without_dropout
from lit_rlhf.models.loading import (
    check_vocabulary,
    finish_loading,
    is_decoder_only,
    is_language_model,
    load_config,
    set_dropout,
)
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.pretrained import load_weights
from lit_rlhf.packing.rankings import RankingInputs, last_hidden_state
from lit_rlhf.packing.selective_logits import select_positions
from lit_rlhf.packing.varlen_attention import PackedSequences

# weights that a scalar model's file may hold: of the language model's head, and the bias of a trained one
UNUSED_HEADS = ("lm_head.", "embed_out.", "output.", "score.bias")


class ScalarModel(nn.Module):
    """A transformer whose `lm_head` is replaced by one output (InstructGPT App. C): reward model or value function.

    It wraps the `…ForSequenceClassification` model of transformers with one label, whose folders transformers loads.
    It adds the centering constants: a score is `(raw - shift) / scale`, where shift is the mean raw score of the
    labelers' demonstrations (App. C.2). They are stored in `config.json` as `score_shift` and `score_scale`;
    transformers ignores them and returns the raw score.

    Shapes: `B` rows, `T` tokens, `D` hidden size, `n` selected tokens, `N` completions.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, model: PreTrainedModel, head_is_new: bool = False) -> None:
        super().__init__()
        self.model, self.head_is_new = model, head_is_new
        constants = getattr(model.config, "score_shift", 0.0), getattr(model.config, "score_scale", 1.0)
        with torch.device("cpu"):  # never meta, also where the weights are
            for name, value in zip(("shift", "scale"), constants):
                self.register_buffer(name, torch.tensor(value, dtype=torch.float32))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "ScalarModel":
        """Keep the constants in float32 when the weights go to half precision: rounded, they would not center."""
        constants = self.shift, self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.shift, self.scale = (
            constant.to(converted.device) if converted.device.type != "meta" else converted
            for constant, converted in zip(constants, (self.shift, self.scale))
        )
        return self

    @property
    def is_centered(self) -> bool:
        """Whether the centering constants were set."""
        return hasattr(self.model.config, "score_shift")

    def center(self, shift: float, scale: float = 1.0) -> None:
        """Set the centering constants, in units of the raw score."""
        if not (math.isfinite(shift) and math.isfinite(scale) and scale > 0):
            raise UserError(f"centering needs a finite shift and a positive scale, got {shift} and {scale}")
        self.shift.fill_(shift)
        self.scale.fill_(scale)
        self.model.config.score_shift = shift
        self.model.config.score_scale = scale

    def uncenter(self) -> None:
        """Remove the centering constants: scores are raw."""
        if self.is_centered:
            self.center(0.0)
            del self.model.config.score_shift, self.model.config.score_scale

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor | None = None,
        token_index: tuple[Tensor, Tensor] | None = None,
        sequences: PackedSequences | None = None,
    ) -> Tensor:
        """Compute the scalar at every token, or at selected ones.

        Args:
            input_ids: (B, T) int64, padded on either side.
            attention_mask: (B, T), 1 = real token; or the mask of a `PackedBatch`.
            positions: (B, T) int64, position ids; by default counted from each row's first real token.
            token_index: Rows and columns of the selected tokens, (n,) int64 each.
            sequences: Of a `PackedBatch`.

        Returns:
            (B, T), or (n,) with `token_index`; float32, centered.
        """
        hidden = self._hidden(input_ids, attention_mask, positions, sequences)
        return self._apply_head(hidden if token_index is None else select_positions(hidden, token_index))

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the scalar at the last real token of each row, by its mask and never by its padding id.

        Args:
            input_ids: (B, T) int64, padded on either side.
            attention_mask: (B, T), 1 = real token.

        Returns:
            (B,) float32, centered.
        """
        hidden = self._hidden(input_ids, attention_mask)
        rows = torch.arange(len(hidden), device=hidden.device)
        return self._apply_head(hidden[rows, last_token_index(attention_mask)])

    def score_rankings(self, rows: RankingInputs, shared_prompt: bool = True) -> Tensor:
        """Compute the score of every completion.

        Args:
            rows: Prompts followed by completions.
            shared_prompt: Compute each prompt once for all its completions, if the model supports it.

        Returns:
            (N,) float32, centered.
        """
        return self._apply_head(last_hidden_state(self.model, rows, shared_prompt))

    def _hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor | None = None,
        sequences: PackedSequences | None = None,
    ) -> Tensor:
        """Return the last layer's output, (B, T, D)."""
        output = self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask) if positions is None else positions,
            use_cache=False,
            **({} if sequences is None else {"sequences": sequences}),
        )
        return cast(Tensor, output[0])

    def _apply_head(self, hidden: Tensor) -> Tensor:
        """Return the centered output of the head on (..., D), as (...) float32."""
        return (apply_head(hidden, cast(nn.Linear, self.model.score)) - self.shift) / self.scale


def apply_head(hidden: Tensor, head: nn.Linear) -> Tensor:
    """Apply a head with one output to (..., D), giving (...) float32."""
    # in float32: scores must not depend on autocast
    with torch.autocast(hidden.device.type, enabled=False):
        raw = (hidden.float() @ head.weight.float().T).squeeze(-1)
        return raw if head.bias is None else raw + head.bias.float()


ScalarSource: TypeAlias = ModelSource | ScalarModel
"""A folder or a hub name, or a reward model or language model that was loaded already."""


def load_scalar_model(
    model: ScalarSource, tokenizer: Tokenizer, loading: ModelLoadingConfig, seed: int = 0
) -> ScalarModel:
    """Load a scalar model from a reward model's folder, or from a language model's folder with a new head.

    A reward model that is an object is prepared in place; of a language model the backbone is copied under a new head.

    Raises:
        UserError: No such model, an architecture without a sequence-classification class, more than one label, or a
            head that is not one linear layer named `score`.
    """
    if not isinstance(model, str):
        return _prepare_scalar_model(model, tokenizer, loading, seed)
    config = load_config(model, loading)
    check_vocabulary(tokenizer, config, model, loading)
    set_dropout(config, 0.0)
    trained_head = _has_trained_head(config, model)
    if not is_decoder_only(config):
        raise UserError(f"model: {model!r} is of the architecture {config.model_type}; use a decoder-only one")
    config.num_labels = 1
    new = () if trained_head else ("score.weight",)
    loaded, unused = load_weights(AutoModelForSequenceClassification, model, config, loading, new, UNUSED_HEADS)
    if not isinstance(getattr(loaded, "score", None), nn.Linear):
        raise UserError(f"model: {type(loaded).__name__} has no linear `score` head; use a decoder-only architecture")
    if trained_head and "score.bias" in unused:
        loaded = _load_with_bias(type(loaded), model, loading, config)
    if not trained_head:
        loaded.score.weight.data.copy_(init_head(loaded.score.weight.shape, seed))
    return ScalarModel(finish_loading(loaded, tokenizer, loading), head_is_new=not trained_head)


def resolve_scalar_model(model: Any, setting: str) -> Any:
    """Return what a setting gives where a scalar model is loaded from, see `resolve_model`."""
    return model if isinstance(model, ScalarModel) else resolve_model(model, setting)


def _prepare_scalar_model(
    model: PreTrainedModel | ScalarModel, tokenizer: Tokenizer, loading: ModelLoadingConfig, seed: int
) -> ScalarModel:
    inner = model.model if isinstance(model, ScalarModel) else model
    name, config = model_name(inner), inner.config
    config.architectures = [type(inner).__name__]  # of an object the class decides, not what it was loaded from
    check_vocabulary(tokenizer, config, name, loading)
    trained_head = _has_trained_head(config, name)
    if not is_decoder_only(config):
        raise UserError(f"model: {name!r} is of the architecture {config.model_type}; use a decoder-only one")
    inner = without_dropout(inner if trained_head else _replace_head(inner, seed))
    if not isinstance(getattr(inner, "score", None), nn.Linear):
        raise UserError(f"model: {type(inner).__name__} has no linear `score` head; use a decoder-only architecture")
    finish_loading(inner, tokenizer, loading)
    return model if isinstance(model, ScalarModel) else ScalarModel(inner, head_is_new=not trained_head)


def _replace_head(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Return a sequence-classification model with a copy of a language model's backbone and a new head."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with torch.device("meta"):
        scalar: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    setattr(scalar, scalar.base_model_prefix, copy.deepcopy(model.base_model))
    left = [name for name, weight in scalar.named_parameters() if weight.is_meta and not name.startswith("score.")]
    if left:
        raise UserError(
            f"model: {type(scalar).__name__} has the weight {left[0]!r}, which the model lacks; give a folder"
        )
    weight, backbone = cast(nn.Linear, scalar.score).weight, next(scalar.base_model.parameters())
    head = init_head(weight.shape, seed).to(backbone.device, backbone.dtype)
    scalar.score = nn.Linear(weight.shape[1], 1, bias=False, device="meta")
    scalar.score.weight = nn.Parameter(head)
    scalar.config.architectures = [type(scalar).__name__]
    return scalar


def init_head(shape: torch.Size, seed: int) -> Tensor:
    """Draw the weight of a new head from N(0, 1 / (d + 1)) (Stiennon et al., 2020, App. B.1; code of Ziegler et al.).

    With a generator of its own, so that the head depends on the seed alone.

    Returns:
        (1, d) float32 on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    # explicitly on the CPU, like the generator: in configure_model the default device may be a GPU
    return torch.randn(shape, generator=generator, device="cpu") / math.sqrt(shape[1] + 1)


def _has_trained_head(config: PretrainedConfig, model: str) -> bool:
    """Whether the folder is a reward model's, by the architectures in its configuration.

    An unknown head is refused: it must not be replaced by a new one silently.
    """
    for name in config.architectures or []:
        if name.endswith("ForSequenceClassification"):
            if config.num_labels != 1:
                raise UserError(f"model: {model!r} classifies into {config.num_labels} labels; a reward model has one")
            return True
        if not is_language_model(name):
            raise UserError(
                f"model: {model!r} is a {name}: neither a language model nor an AutoModelForSequenceClassification "
                "with one label; save it as one of these (its head as the linear layer `score`)"
            )
    return False


def _load_with_bias(base_class: Any, model: str, loading: ModelLoadingConfig, config: PretrainedConfig) -> Any:
    """Load again into a head with a bias, which the class of transformers would drop."""

    class Biased(base_class):
        score: nn.Linear

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.score = nn.Linear(self.score.in_features, 1, bias=True)

    loaded, _ = load_weights(Biased, model, config, loading, unused=UNUSED_HEADS)
    loaded.__class__ = base_class
    return loaded
