"""Tiny random models that vLLM can serve on a CPU, whose attention there takes heads of 32 numbers or more."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

VOCAB_SIZE, POSITIONS = 32, 4096
SIZE: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 2, "intermediate_size": 128, "max_position_embeddings": POSITIONS}
IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
GPT2: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZE, **IDS, num_key_value_heads=1),
    "llama-tied": LlamaConfig(**SIZE, **IDS, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZE, **IDS, num_key_value_heads=1),
    "qwen2-tied": Qwen2Config(**SIZE, **IDS, num_key_value_heads=1, tie_word_embeddings=True),
    "gpt2": GPT2Config(**GPT2, **IDS),
    "gpt_neox": GPTNeoXConfig(**SIZE, **IDS),
    "gemma": GemmaConfig(**SIZE, **IDS, num_key_value_heads=1, head_dim=32),
}


def write_model(name: str, folder: Path, tokenizer: Any, scale: float = 3.0) -> str:
    """Write a model and its tokenizer.

    Args:
        name: key of `CONFIGS`.
        folder: that is written.
        tokenizer: of `VOCAB_SIZE` tokens.
        scale: factor of the matrices; large enough that differences show.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
