"""Tiny random classifiers of the classes of well-known reward models, each with a tokenizer of its kind."""

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLNetConfig,
)

# another order than that of the policy's vocabulary, so that its ids mean other words
WORDS = [f"w{index}" for index in reversed(range(28))]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "[CLS]", "[SEP]"]
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SPREAD = 0.2  # of the weights: with transformers' own, an encoder gives almost the same score to every text
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}w26 {{ m['content'] }}"
    "{% else %} w27 {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w12 w13", "w1 w2", "w3 w1 w4 w1 w5 w9 w2 w6", "w27 w0"]


def word_tokenizer(single: str = "$A", pair: str = "$A $B", **settings: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer with words of its own order.

    Args:
        single: What it makes of a text.
        pair: What it makes of two.
        settings: Special tokens, and others of the tokenizer.
    """
    vocabulary = [*SPECIAL, *WORDS]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, vocabulary.index(word)) for word in SPECIAL]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **settings}
    )


def encoder_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """Return one like BERT's: [CLS] prompt [SEP] response [SEP], with token types."""
    return word_tokenizer(
        "[CLS] $A [SEP]",
        "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        **{"pad_token": "<pad>", "cls_token": "[CLS]", "sep_token": "[SEP]", **settings},
    )


def decoder_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """Return one like Llama's: <s> before a text, a chat template, no padding token."""
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    return word_tokenizer("<s> $A", "<s> $A $B", **{"chat_template": CHAT, **names, **settings})


def config_of(kind: type[PretrainedConfig], **settings: Any) -> PretrainedConfig:
    size = {"vocab_size": len(SPECIAL) + len(WORDS), "num_labels": 1, "max_position_embeddings": 64}
    return kind(**{**size, **SIZES, "initializer_range": SPREAD, **settings})


def gpt2_config() -> PretrainedConfig:
    size = {"vocab_size": len(SPECIAL) + len(WORDS), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2Config(**size, num_labels=1, pad_token_id=2, initializer_range=SPREAD)


def deberta_config() -> PretrainedConfig:
    """Return one of DeBERTa v3's kind: relative positions and no absolute ones."""
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    shared = {"position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True}
    return config_of(DebertaV2Config, pad_token_id=1, type_vocab_size=0, **relative, **shared)


def xlnet_config() -> PretrainedConfig:
    size = {"vocab_size": len(SPECIAL) + len(WORDS), "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
    return XLNetConfig(**size, num_labels=1, pad_token_id=1, initializer_range=SPREAD)


DECODER: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
CLASSIFIERS: dict[str, Callable[[], tuple[PretrainedConfig, PreTrainedTokenizerFast]]] = {
    "deberta": lambda: (deberta_config(), encoder_tokenizer()),
    "bert": lambda: (config_of(BertConfig, pad_token_id=1), encoder_tokenizer()),
    "roberta": lambda: (config_of(RobertaConfig, pad_token_id=1, type_vocab_size=2), encoder_tokenizer()),
    "distilbert": lambda: (
        DistilBertConfig(
            vocab_size=len(SPECIAL) + len(WORDS),
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=64,
            num_labels=1,
            pad_token_id=1,
            initializer_range=SPREAD,
            max_position_embeddings=64,
        ),
        encoder_tokenizer(model_input_names=["input_ids", "attention_mask"]),
    ),
    "xlnet": lambda: (xlnet_config(), encoder_tokenizer(padding_side="left")),
    "llama": lambda: (config_of(LlamaConfig, **DECODER), decoder_tokenizer()),
    "llama, padding equal to end": lambda: (
        config_of(LlamaConfig, pad_token_id=2, **DECODER),
        decoder_tokenizer(pad_token="</s>"),
    ),
    "mistral": lambda: (config_of(MistralConfig, pad_token_id=2, **DECODER), decoder_tokenizer(padding_side="left")),
    "qwen2": lambda: (config_of(Qwen2Config, pad_token_id=1, **DECODER), decoder_tokenizer(pad_token="<pad>")),
    "qwen3": lambda: (config_of(Qwen3Config, pad_token_id=1, **DECODER), decoder_tokenizer(pad_token="<pad>")),
    "gemma2": lambda: (config_of(Gemma2Config, pad_token_id=1, **DECODER), decoder_tokenizer(pad_token="<pad>")),
    "gpt2": lambda: (gpt2_config(), decoder_tokenizer(chat_template=None)),
    "gpt_neox": lambda: (config_of(GPTNeoXConfig, pad_token_id=1), decoder_tokenizer(pad_token="<pad>")),
    "opt": lambda: (
        config_of(OPTConfig, pad_token_id=1, word_embed_proj_dim=32, ffn_dim=64),
        decoder_tokenizer(pad_token="<pad>"),
    ),
}
