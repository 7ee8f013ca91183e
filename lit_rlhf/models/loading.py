"""Causal language models and tokenizers from a folder or a hub name, checked before any weight is read."""

from collections.abc import Callable
from contextlib import nullcontext
from difflib import get_close_matches
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
    """Return the model's configuration, with one clear error where there is none."""
    return from_pretrained_quietly(AutoConfig.from_pretrained, model, loading)


def load_tokenizer(model: str, loading: ModelLoadingConfig) -> Tokenizer:
    """Return the tokenizer of `model`, whose padding token differs from its end token.

    Raises:
        UserError: no tokenizer there, no end token, or padding that is missing or equal to the end token.
    """
    tokenizer = from_pretrained_quietly(AutoTokenizer.from_pretrained, model, loading)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer of {model!r} has no end-of-sequence token: set eos_token in its tokenizer_config.json"
        )
    if loading.pad_token is not None and tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": loading.pad_token})  # takes an existing token of that name
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
    """Refuse a tokenizer with ids that the model has no embedding for; an added padding token is no such case."""
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
    """Return the causal language model of `model`, ready to train.

    Args:
        model: a folder or a hub name.
        tokenizer: the tokenizer in use; where it has a token more than the model, the embedding grows by it.
        loading: how to load.
        dropout: residual dropout (InstructGPT's SFT baseline: 0.2); every other dropout is 0.

    Raises:
        UserError: no such model, vocabularies that disagree, or a dropout that this architecture has not.
    """
    config = load_config(model, loading)
    check_vocabulary(tokenizer, config, model, loading)
    set_dropout(config, dropout)
    return finish_loading(load_weights(AutoModelForCausalLM, model, config, loading), tokenizer, loading)


def load_weights(auto: Any, model: str, config: PretrainedConfig, loading: ModelLoadingConfig, **settings: Any) -> Any:
    """Return what the auto class's `from_pretrained` gives, in the type and the quantisation of `loading`.

    Within `torch.device("meta")` the model has its shape and no numbers.
    """
    empty = torch.get_default_device().type == "meta"
    if empty:
        settings["device_map"] = "meta"
    if loading.quantization is not None:
        settings |= quantization_config(config, loading)
    with torch.device("cpu") if empty else nullcontext():  # transformers refuses to load within torch.device("meta")
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
    """Return what `from_pretrained` takes for a 4-bit base.

    Raises:
        UserError: no GPU, and a width that the CPU kernels of bitsandbytes do not know.
    """
    from transformers import BitsAndBytesConfig

    text = config.get_text_config()
    odd = [
        f"{name} {width}"
        for name in ("hidden_size", "intermediate_size")
        if isinstance(width := getattr(text, name, None), int) and width % 64
    ]
    if odd and not torch.cuda.is_available():
        raise UserError(
            f"loading.quantization: on a CPU 4-bit layers need widths that are multiples of 64, this model has "
            f"{' and '.join(odd)}; set loading.quantization to null"
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
    """Grow the embedding for an added padding token, set the special ids, switch on gradient checkpointing."""
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        listed = model.generation_config.eos_token_id
        several = isinstance(listed, list) and tokenizer.eos_token_id in listed  # of a chat model: all end a response
        model.generation_config.eos_token_id = listed if several else tokenizer.eos_token_id
    if loading.gradient_checkpointing:
        checkpoint_activations(model)
    if loading.compile:
        compile_training(model)
    return model.train()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Have the model compute its blocks again in the backward pass instead of keeping what they made."""
    # the second name is older, and warns since transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model.enable_input_require_grads()


def compile_training(model: PreTrainedModel) -> None:
    """Compile the forward pass of every transformer block, where gradients are asked for.

    By the block and not as a whole: all blocks share the compiled code, weights keep their names, and sharding goes
    around them as around any block. Sequence lengths vary from batch to batch, so shapes are dynamic.
    """
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):  # what transformers makes its blocks of
            _compile_block(block)


def _compile_block(block: nn.Module) -> None:
    plain = block.forward
    compiled = torch.compile(plain, dynamic=True)

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    block.forward = forward


def set_dropout(config: PretrainedConfig, residual: float) -> None:
    """Set residual dropout in `config` and every other dropout to 0.

    Raises:
        UserError: `residual` is not 0 and the architecture has no residual dropout (Llama, Qwen, Gemma).
    """
    present = [name for name in RESIDUAL_DROPOUT if hasattr(config, name)]
    if residual and not present:
        raise UserError(
            f"dropout: {residual} asked for, but {config.model_type} has no residual dropout; set dropout: 0"
        )
    for name in present:
        setattr(config, name, residual)
    for name in OTHER_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)


def max_positions(config: PretrainedConfig) -> int | None:
    """Return how many positions the model has, or None where its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def from_pretrained_quietly(load: Callable[..., Any], model: str, loading: ModelLoadingConfig, **settings: Any) -> Any:
    """Call a `from_pretrained`, quietly, with its many ways of failing turned into one line."""
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"model: folder {model!r} has no config.json; it should be one that save_pretrained wrote")
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not folder.is_dir():
        near = get_close_matches(folder.name, [p.name for p in folder.parent.glob("*")], 1)
        hint = f"; did you mean {str(folder.parent / near[0])!r}?" if near else "; run the stage that writes it first"
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
