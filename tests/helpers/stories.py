"""Convert stories260K of llama2.c, a Llama of 260,032 parameters, to a transformers folder, exactly."""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Array = NDArray[np.float32]

SPECIAL = ("<unk>", "<s>", "</s>")
FIRST_PIECE = 259  # after the special tokens and the 256 bytes


class Checkpoint(NamedTuple):
    """The `.bin` file. Matrices are (layers, out, in); queries and keys rotate ADJACENT pairs of a head's values."""

    dim: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    length: int
    weights: dict[str, Array]

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def read_checkpoint(path: Path) -> Checkpoint:
    """Read seven int32, then float32 weights in the order below."""
    content = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack_from("7i", content)
    half = dim // heads // 2
    shapes = {
        "embedding": (vocabulary, dim),
        "attention_norm": (layers, dim),
        "query": (layers, dim, dim),
        "key": (layers, kv_heads * half * 2, dim),
        "value": (layers, kv_heads * half * 2, dim),
        "output": (layers, dim, dim),
        "feed_forward_norm": (layers, dim),
        "gate": (layers, hidden, dim),
        "down": (layers, dim, hidden),
        "up": (layers, hidden, dim),
        "final_norm": (dim,),
        "cosine": (length, half),
        "sine": (length, half),
    }
    flat = np.frombuffer(content, "<f4", offset=28)
    assert flat.size == sum(int(np.prod(shape)) for shape in shapes.values())
    weights, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        weights[name] = flat[start : start + size].reshape(shape)
        start += size
    return Checkpoint(dim, hidden, layers, heads, kv_heads, vocabulary, length, weights)


def read_pieces(path: Path) -> list[tuple[bytes, float]]:
    """Return bytes and score of each token: int32 longest, then per token float32 score, int32 length, bytes."""
    content, start = path.read_bytes(), 4
    pieces = []
    while start < len(content):
        score, size = struct.unpack_from("fi", content, start)
        pieces.append((content[start + 8 : start + 8 + size], score))
        start += 8 + size
    return pieces


def convert(source: Path, folder: Path) -> Path:
    """Write model and tokenizer of `source` (stories260K.bin, tok512.bin) for plain transformers."""
    build_model(read_checkpoint(source / "stories260K.bin")).save_pretrained(folder)
    build_tokenizer(read_pieces(source / "tok512.bin")).save_pretrained(folder)
    return folder


def build_model(checkpoint: Checkpoint) -> LlamaForCausalLM:
    """Build the transformers model of a checkpoint."""
    config = LlamaConfig(
        vocab_size=checkpoint.vocabulary,
        hidden_size=checkpoint.dim,
        intermediate_size=checkpoint.hidden,
        num_hidden_layers=checkpoint.layers,
        num_attention_heads=checkpoint.heads,
        num_key_value_heads=checkpoint.key_value_heads,
        max_position_embeddings=checkpoint.length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    weights = checkpoint.weights
    state = {"model.embed_tokens.weight": weights["embedding"], "model.norm.weight": weights["final_norm"]}
    for layer in range(checkpoint.layers):
        head = f"model.layers.{layer}."
        state |= {
            head + "input_layernorm.weight": weights["attention_norm"][layer],
            head + "self_attn.q_proj.weight": to_half_split(weights["query"][layer], checkpoint.head_dim),
            head + "self_attn.k_proj.weight": to_half_split(weights["key"][layer], checkpoint.head_dim),
            head + "self_attn.v_proj.weight": weights["value"][layer],
            head + "self_attn.o_proj.weight": weights["output"][layer],
            head + "post_attention_layernorm.weight": weights["feed_forward_norm"][layer],
            head + "mlp.gate_proj.weight": weights["gate"][layer],
            head + "mlp.down_proj.weight": weights["down"][layer],
            head + "mlp.up_proj.weight": weights["up"][layer],
        }
    model = LlamaForCausalLM(config)
    tensors = {name: torch.tensor(value) for name, value in state.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # the head is the embedding
    return model


def to_half_split(rows: Array, head_dim: int) -> Array:
    """Reorder rows (heads * head_dim, in) from adjacent rotary pairs to pairs half a head apart."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])  # (heads, pair, member, in)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def build_tokenizer(pieces: list[tuple[bytes, float]]) -> PreTrainedTokenizerFast:
    """Build a BPE tokenizer whose merges are all splits of a piece in two, best score first, with byte fallback."""
    names = [*SPECIAL, *(piece.decode() for piece, _ in pieces[len(SPECIAL) :])]
    score = dict(zip(names[FIRST_PIECE:], (score for _, score in pieces[FIRST_PIECE:])))
    merges = [
        (piece[:split], piece[split:])
        for piece in sorted(score, key=lambda piece: -score[piece])
        for split in range(1, len(piece))
        if piece[:split] in score and piece[split:] in score
    ]
    vocabulary = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Prepend(" ")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
