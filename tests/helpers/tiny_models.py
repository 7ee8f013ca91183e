"""Tiny random models of the architectures that the recipes name, each with a tokenizer of its kind."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

POSITIONS = 2304
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer(first: list[str], last: list[str], adds_bos: bool = True, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer like GPT-2's, without merges: special tokens, the bytes, special tokens."""
    words = [*first, *BYTES, *last]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True) for word in (*first, *last)])
    if (
        adds_bos and "bos_token" in special and special["bos_token"] != special["eos_token"]
    ):  # Llama's begins every text
        bos = special["bos_token"]
        template = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B", "special_tokens": [(bos, words.index(bos))]}
        backend.post_processor = processors.TemplateProcessing(**template)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


GPT2_END = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
EXTRA = [f"<|extratoken_{n}|>" for n in range(1, 4)]
LLAMA_ENDS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
GPT2_SIZE: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
SIZE: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
# GPT-J's tokenizer is GPT-2's with more tokens, and its vocabulary has more rows than tokens, as Pythia's has
KINDS: dict[str, tuple[PreTrainedTokenizerFast, PretrainedConfig]] = {
    "gpt2": (byte_tokenizer([], ["<|endoftext|>"], **GPT2_END), GPT2Config(vocab_size=257, **GPT2_SIZE)),
    "gptj": (
        byte_tokenizer([], ["<|endoftext|>", *EXTRA], **GPT2_END),
        GPTJConfig(vocab_size=264, rotary_dim=8, **GPT2_SIZE),
    ),
    "gpt_neox": (
        byte_tokenizer(["<|endoftext|>", "<|padding|>"], [], **GPT2_END),
        GPTNeoXConfig(vocab_size=288, max_position_embeddings=POSITIONS, **SIZE),
    ),
    "llama": (
        byte_tokenizer([], ["<|begin_of_text|>", "<|end_of_text|>"], **LLAMA_ENDS),
        LlamaConfig(vocab_size=258, max_position_embeddings=POSITIONS, num_key_value_heads=2, **SIZE),
    ),
}
# as another recipe's model: with a padding token of its own
KINDS["llama_padded"] = (
    byte_tokenizer([], ["<s>", "</s>", "<pad>"], eos_token="</s>", pad_token="<pad>"),
    LlamaConfig(vocab_size=259, max_position_embeddings=POSITIONS, num_key_value_heads=2, **SIZE),
)
# SmolLM2's: padding is the end token, the chat template begins every conversation with a system turn of its own
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2_SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
KINDS["smollm2"] = (
    byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], [], **SMOLLM2_SPECIAL, pad_token="<|im_end|>", adds_bos=False
    ),
    LlamaConfig(
        vocab_size=259, max_position_embeddings=POSITIONS, num_key_value_heads=2, tie_word_embeddings=True, **SIZE
    ),
)
KINDS["smollm2"][0].chat_template = SMOLLM2_TEMPLATE
HUB_NAMES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2",
    "EleutherAI/gpt-j-6b": "gptj",
    "cerebras/Cerebras-GPT-1.3B": "gpt2",
    "EleutherAI/pythia-14m": "gpt_neox",
    "EleutherAI/pythia-410m": "gpt_neox",
    "meta-llama/Llama-3.1-8B": "llama",
    "meta-llama/Llama-3.2-3B": "llama",
}


def write_tiny_model(kind: str, folder: Path) -> str:
    """Write a model of random weights and its tokenizer, as it is on the hub: without a padding token."""
    tokenizer, config = KINDS[kind]
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
