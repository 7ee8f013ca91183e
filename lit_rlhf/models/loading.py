"""Loading of causal language models and tokenizers from a folder or the hub, checked before any weight is read.

A model that is given as an object is checked and prepared in the same way, in place.
"""

from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from lit_rlhf.errors import UserError
from lit_rlhf.models.given import ModelSource, model_name, without_dropout
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.lora import fill_added_rows
from lit_rlhf.models.model_files import find_commit, holds_file
from lit_rlhf.models.peft_folder import find_adapter
from lit_rlhf.models.pretrained import from_pretrained_quietly, load_weights

RESIDUAL_DROPOUT = ("resid_pdrop", "hidden_dropout", "dropout", "resid_dropout")
OTHER_DROPOUT = (
    "attn_pdrop",
    "embd_pdrop",
    "attention_dropout",
    "activation_dropout",
    "embd_dropout",
    "summary_first_dropout",
    "classifier_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "layerdrop",
)


def load_config(model: ModelSource, loading: ModelLoadingConfig) -> PretrainedConfig:
    """Load the configuration of a model; that of an object is its own, that of a PEFT folder the merged model's.

    Raises:
        UserError: There is no such model.
    """
    if isinstance(model, PreTrainedModel):
        return model.config
    adapter = find_adapter(model, loading)
    if adapter is None:
        config = from_pretrained_quietly(AutoConfig.from_pretrained, model, loading)
        config._commit_hash = find_commit(model, "config.json", loading)  # which transformers 5.23 leaves out
        return config
    return adapter.apply_to_config(load_config(adapter.base, adapter.base_loading))


def load_stored_tokenizer(model: str | Tokenizer, loading: ModelLoadingConfig) -> Tokenizer:
    """Load the tokenizer of `model` as it is stored; of a PEFT folder without one, the base's; an object as it is.

    Raises:
        UserError: There is none.
    """
    if isinstance(model, Tokenizer):
        return model
    adapter = find_adapter(model, loading)
    if adapter is None:
        return from_pretrained_quietly(AutoTokenizer.from_pretrained, model, loading)
    if not holds_file(model, "tokenizer_config.json", loading):
        return load_stored_tokenizer(adapter.base, adapter.base_loading)
    config = load_config(model, loading)  # which AutoTokenizer would look for in the folder
    return from_pretrained_quietly(AutoTokenizer.from_pretrained, model, loading, config=config)


def load_tokenizer(model: str | Tokenizer, loading: ModelLoadingConfig) -> Tokenizer:
    """Load the tokenizer of `model`, whose padding token differs from its end token.

    Args:
        model: A folder or a hub name; or a tokenizer, which is checked, and gets the padding token of `loading`.
        loading: How to load.

    Raises:
        UserError: No tokenizer, no end token, or padding that is missing or equal to the end token.
    """
    tokenizer = load_stored_tokenizer(model, loading)
    if not isinstance(model, str):
        model = str(model.name_or_path or type(model).__name__)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer of {model!r} has no end-of-sequence token: set eos_token in its tokenizer_config.json"
        )
    if loading.pad_token is not None and tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": loading.pad_token})  # reuses an existing token of that name
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        what = (
            "no padding token"
            if tokenizer.pad_token_id is None
            else f"padding equal to its end token {tokenizer.eos_token!r}"
        )
        raise UserError(
            f"tokenizer of {model!r} has {what}: the end token is trained and padding is not, so they must differ; "
            "set model.loading.pad_token (for example '<|pad|>', which is added to the vocabulary)"
        )
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, config: PretrainedConfig, model: str, loading: ModelLoadingConfig) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for, other than an added padding token."""
    adapter = find_adapter(model, loading)
    size = max(config.get_text_config().vocab_size, 0 if adapter is None else adapter.vocab_size)
    grows = loading.pad_token is not None or adapter is not None  # it was added in the training of the adapter
    added = 1 if grows and (tokenizer.pad_token_id or 0) >= size else 0
    if len(tokenizer) - added > size:
        raise UserError(
            f"tokenizer and model of {model!r} disagree: {len(tokenizer):,} tokens, but a vocabulary of {size:,} in "
            "config.json; use the tokenizer the model was trained with"
        )


def check_same_token_ids(
    tokenizer: Tokenizer, other: Tokenizer, what: str, remedy: str = "use one trained from the same family"
) -> None:
    """Refuse a model that gets token ids of `tokenizer` and was trained with another one, whose ids differ.

    Every token must have the same id in both. Tokens that only the other has do no harm, as it never gets them; nor
    does the padding token, which loading may have added, and which the attention mask hides.

    Args:
        tokenizer: The policy's.
        other: That of a reward model, critic or reference.
        what: The model, in words.
        remedy: What to do instead.
    """
    ids = other.get_vocab()
    for token, index in tokenizer.get_vocab().items():
        if token != tokenizer.pad_token and ids.get(token) != index:
            has = f"{ids[token]:,}" if token in ids else "none"
            raise UserError(
                f"{what} has another tokenizer than the policy: the token {token!r} has the id {index:,} in the "
                f"policy's and {has} in its own, so ids would mean other words; {remedy}"
            )


def load_causal_lm(
    model: ModelSource, tokenizer: Tokenizer, loading: ModelLoadingConfig, dropout: float = 0.0
) -> PreTrainedModel:
    """Load a causal language model, ready to train.

    Args:
        model: A folder or a hub name; or a model, which is prepared in place.
        tokenizer: Its tokenizer; if it has one more token than the model, the embedding grows by one row.
        loading: How to load.
        dropout: Residual dropout (InstructGPT's SFT baseline: 0.2); every other dropout is 0.

    Raises:
        UserError: No such model or one of another kind, weights that are not the model's, vocabularies that disagree,
            or residual dropout that this architecture lacks.
    """
    config = load_config(model, loading)
    check_causal_lm(config, model_name(model))
    check_vocabulary(tokenizer, config, model_name(model), loading)
    if isinstance(model, PreTrainedModel):
        return finish_loading(without_dropout(model, dropout), tokenizer, loading)
    set_dropout(config, dropout)
    loaded, _ = load_weights(AutoModelForCausalLM, model, config, loading)
    return finish_loading(loaded, tokenizer, loading)


def check_causal_lm(config: PretrainedConfig, model: str) -> None:
    """Refuse a model that does not predict the next token; reads its configuration alone.

    Raises:
        UserError: A head of another kind, such as a reward model's, or an encoder.
    """
    for name in config.architectures or []:
        if name.endswith("ForSequenceClassification"):
            raise UserError(f"model: {model!r} is a {name}: it scores text and generates none; give a language model")
        if not is_language_model(name):
            raise UserError(f"model: {model!r} is a {name}, not a causal language model")
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map")
    if not (known and is_decoder_only(config)):
        raise UserError(f"model: {model!r} is of the architecture {config.model_type}, no causal language model")


def is_decoder_only(config: PretrainedConfig) -> bool:
    """Whether each token attends to earlier ones alone; an encoder's architecture is known by its masked LM."""
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return not (is_encoder or config.is_encoder_decoder)


def is_language_model(architecture: str) -> bool:
    """Whether the name of a class is that of a language model, or of a model without a head."""
    plain = architecture.endswith("Model") and not any(word in architecture for word in ("Reward", "Value", "Score"))
    return plain or architecture.endswith(("ForCausalLM", "ForConditionalGeneration", "WithLMHead", "Decoder"))


def finish_loading(model: PreTrainedModel, tokenizer: Tokenizer, loading: ModelLoadingConfig) -> PreTrainedModel:
    """Grow the embedding for an added padding token, set special ids, enable gradient checkpointing and compilation."""
    vocab_size = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        fill_added_rows(model, vocab_size)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        eos = model.generation_config.eos_token_id
        # chat models list several, all of which end a response
        keep = isinstance(eos, list) and tokenizer.eos_token_id in eos
        model.generation_config.eos_token_id = eos if keep else tokenizer.eos_token_id
    if loading.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if loading.compile:
        compile_blocks(model)
    return model.train()


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute blocks in the backward pass instead of saving their activations."""
    # the second name is the old one, deprecated since transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model.enable_input_require_grads()


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile the forward pass with gradients of every transformer block.

    Per block: all blocks share the compiled code, weights keep their names, and FSDP2 wraps them like any block.
    Sequence lengths vary from batch to batch, so shapes are dynamic.
    """
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):  # the base class of the blocks in transformers
            _compile_block(block)


def _compile_block(block: nn.Module) -> None:
    eager = block.forward
    compiled = torch.compile(eager, dynamic=True)

    @wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else eager)(*args, **kwargs)

    block.forward = forward


def set_dropout(config: PretrainedConfig, residual: float) -> None:
    """Set residual dropout in `config` and every other dropout to 0.

    Raises:
        UserError: `residual` is not 0 and the architecture has no residual dropout, like Llama, Qwen and Gemma.
    """
    present = [name for name in RESIDUAL_DROPOUT if hasattr(config, name)]
    if residual and not present:
        raise UserError(
            f"dropout: {residual} is impossible, {config.model_type} has no residual dropout; set dropout: 0"
        )
    for name in present:
        setattr(config, name, residual)
    for name in OTHER_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the number of positions of a model, or None if its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
