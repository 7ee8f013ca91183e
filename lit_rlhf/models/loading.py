"""Loading of causal language models and tokenizers from a folder or the hub, checked before any weight is read."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from lit_rlhf.errors import UserError
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.suggestions import did_you_mean

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


def load_config(model: str, loading: ModelLoadingConfig) -> PretrainedConfig:
    """Load the configuration of a model.

    Raises:
        UserError: There is no such model.
    """
    return from_pretrained_quietly(AutoConfig.from_pretrained, model, loading)


def load_tokenizer(model: str, loading: ModelLoadingConfig) -> Tokenizer:
    """Load the tokenizer of `model`, whose padding token differs from its end token.

    Raises:
        UserError: No tokenizer, no end token, or padding that is missing or equal to the end token.
    """
    tokenizer = from_pretrained_quietly(AutoTokenizer.from_pretrained, model, loading)
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
    size = config.get_text_config().vocab_size
    added = 1 if loading.pad_token is not None and tokenizer.pad_token_id >= size else 0
    if len(tokenizer) - added > size:
        raise UserError(
            f"tokenizer and model of {model!r} disagree: {len(tokenizer):,} tokens, but a vocabulary of {size:,} in "
            "config.json; use the tokenizer the model was trained with"
        )


def load_causal_lm(
    model: str, tokenizer: Tokenizer, loading: ModelLoadingConfig, dropout: float = 0.0
) -> PreTrainedModel:
    """Load a causal language model, ready to train.

    Args:
        model: A folder or a hub name.
        tokenizer: Its tokenizer; if it has one more token than the model, the embedding grows by one row.
        loading: How to load.
        dropout: Residual dropout (InstructGPT's SFT baseline: 0.2); every other dropout is 0.

    Raises:
        UserError: No such model, vocabularies that disagree, or residual dropout that this architecture lacks.
    """
    config = load_config(model, loading)
    check_vocabulary(tokenizer, config, model, loading)
    set_dropout(config, dropout)
    return finish_loading(load_weights(AutoModelForCausalLM, model, config, loading), tokenizer, loading)


def load_weights(auto: Any, model: str, config: PretrainedConfig, loading: ModelLoadingConfig, **settings: Any) -> Any:
    """Call `from_pretrained` of an auto class with the dtype, attention and quantization of `loading`.

    Within `torch.device("meta")` the model is on the meta device.
    """
    on_meta = torch.get_default_device().type == "meta"
    if on_meta:
        settings["device_map"] = "meta"
    if loading.quantization is not None:
        settings |= quantization_config(config, loading)
    with torch.device("cpu") if on_meta else nullcontext():  # transformers refuses to load within torch.device("meta")
        return from_pretrained_quietly(
            auto.from_pretrained,
            model,
            loading,
            config=config,
            dtype=getattr(torch, loading.dtype),
            attn_implementation=loading.attn_implementation,
            **settings,
        )


def quantization_config(config: PretrainedConfig, loading: ModelLoadingConfig) -> dict[str, Any]:
    """Build the arguments of `from_pretrained` for a 4-bit base.

    Raises:
        UserError: No GPU, and a width that the CPU kernels of bitsandbytes do not support.
    """
    from transformers import BitsAndBytesConfig

    text = config.get_text_config()
    unsupported = [
        f"{name} {width}"
        for name in ("hidden_size", "intermediate_size")
        if isinstance(width := getattr(text, name, None), int) and width % 64
    ]
    if unsupported and not torch.cuda.is_available():
        raise UserError(
            f"loading.quantization: on a CPU 4-bit layers need widths that are multiples of 64, this model has "
            f"{' and '.join(unsupported)}; set loading.quantization to null"
        )
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, loading.dtype),
        )
    }


def finish_loading(model: PreTrainedModel, tokenizer: Tokenizer, loading: ModelLoadingConfig) -> PreTrainedModel:
    """Grow the embedding for an added padding token, set special ids, enable gradient checkpointing and compilation."""
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
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


def from_pretrained_quietly(load: Callable[..., Any], model: str, loading: ModelLoadingConfig, **settings: Any) -> Any:
    """Call a `from_pretrained` without output, and raise `UserError` for the ways in which it fails."""
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"model: folder {model!r} has no config.json; it should be one that save_pretrained wrote")
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not folder.is_dir():
        hint = did_you_mean(folder.name, [path.name for path in folder.parent.glob("*")])
        hint = hint or "; run the stage that writes it first"
        raise UserError(f"model: there is no folder {model!r}{hint}")
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return load(model, revision=loading.revision, trust_remote_code=loading.trust_remote_code, **settings)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model: cannot load {model!r} (neither a folder here nor a reachable hub name): {reason}"
        ) from error
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()
