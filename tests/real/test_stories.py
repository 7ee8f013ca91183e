"""The conversion of stories260K is exact: tokens, logits and greedy text equal those of the original."""

import json
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.stories import Checkpoint, build_tokenizer, read_checkpoint, read_pieces

FIRST_BYTE = 3  # id of byte 0
Pieces = list[tuple[bytes, float]]


def encode_by_greedy_merges(text: str, pieces: Pieces) -> list[int]:
    """Encode BOS, a space and one token per character (or its bytes); then merge the best-scored pairs, one by one."""
    index = {piece: i for i, (piece, _) in enumerate(pieces)}
    ids = [1, index[b" "]] if text else [1]
    for character in text:
        code = character.encode()
        ids += [index[code]] if code in index else [byte + FIRST_BYTE for byte in code]
    while True:
        joined = [(index.get(pieces[a][0] + pieces[b][0]), at) for at, (a, b) in enumerate(pairwise(ids))]
        possible = [(pieces[piece][1], -at, piece) for piece, at in joined if piece is not None]
        if not possible:
            return ids
        _, at, piece = max(possible)  # on equal scores the leftmost
        ids[-at : -at + 2] = [piece]


def reference_logits(checkpoint: Checkpoint, ids: list[int]) -> NDArray[np.float64]:
    """Return the logits of a plain forward pass in float64 over the original weights, (T, V)."""
    weights = {name: value.astype(np.float64) for name, value in checkpoint.weights.items()}
    length, size = len(ids), checkpoint.head_dim
    rotation = (weights["cosine"] + 1j * weights["sine"])[:length, None]  # (T, 1, pairs)

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight

    def rotate(x):  # an adjacent pair is a complex number
        pairs = x.reshape(length, -1, size // 2, 2)
        product = (pairs[..., 0] + 1j * pairs[..., 1]) * rotation
        return np.stack([product.real, product.imag], -1).reshape(length, -1, size)

    x = weights["embedding"][ids]
    future = np.triu(np.full((length, length), -np.inf), 1)
    groups = checkpoint.heads // checkpoint.key_value_heads
    for layer in range(checkpoint.layers):
        inside = norm(x, weights["attention_norm"][layer])
        query = rotate(inside @ weights["query"][layer].T)
        key = rotate(inside @ weights["key"][layer].T)
        value = (inside @ weights["value"][layer].T).reshape(length, -1, size)
        attended = []
        for head in range(checkpoint.heads):
            scores = query[:, head] @ key[:, head // groups].T / np.sqrt(size) + future
            weight = np.exp(scores - scores.max(-1, keepdims=True))
            attended.append(weight / weight.sum(-1, keepdims=True) @ value[:, head // groups])
        x = x + np.concatenate(attended, -1) @ weights["output"][layer].T
        inside = norm(x, weights["feed_forward_norm"][layer])
        gate = inside @ weights["gate"][layer].T
        up = inside @ weights["up"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights["down"][layer].T
    return norm(x, weights["final_norm"]) @ weights["embedding"].T


@pytest.fixture(scope="module")
def pieces(stories_source: Path) -> Pieces:
    return read_pieces(stories_source / "tok512.bin")


def test_greedy_text_is_the_known_story(stories: str, stories_source: Path) -> None:
    expected = (stories_source / "stories260K.md").read_text().split("-t 0.0\n")[1].split("\n```")[0]
    assert expected.startswith("Once upon a time, there was a little girl named Lily.")
    tokenizer = AutoTokenizer.from_pretrained(stories)
    model = AutoModelForCausalLM.from_pretrained(stories).eval()
    start = tokenizer("", return_tensors="pt").input_ids
    assert start.tolist() == [[1]]
    output = model.generate(start, max_new_tokens=256, do_sample=False, pad_token_id=2)
    assert tokenizer.decode(output[0], skip_special_tokens=True) == expected
    prompted = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert output[0, : prompted.shape[1]].tolist() == prompted[0].tolist()


def test_logits_are_those_of_a_plain_forward_pass(stories: str, stories_source: Path) -> None:
    checkpoint = read_checkpoint(stories_source / "stories260K.bin")
    ids = np.random.default_rng(0).integers(0, 512, 48).tolist()
    text = AutoTokenizer.from_pretrained(stories)("One day, Lily and Tom went to the park. They saw a big dog.")
    model = AutoModelForCausalLM.from_pretrained(stories).eval()
    for row in (ids, text.input_ids):
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0]
        np.testing.assert_allclose(logits.double().numpy(), reference_logits(checkpoint, row), atol=1e-4, rtol=0)


def test_the_reference_depends_on_the_direction_of_the_rotation(stories_source: Path) -> None:
    checkpoint = read_checkpoint(stories_source / "stories260K.bin")
    ids = [1, 403, 407, 261, 378]
    reversed_rotation = checkpoint._replace(weights={**checkpoint.weights, "sine": -checkpoint.weights["sine"]})
    assert np.abs(reference_logits(checkpoint, ids) - reference_logits(reversed_rotation, ids)).max() > 0.1


def test_real_texts_are_tokenized_as_by_the_reference(pieces: Pieces, real_data: Path) -> None:
    tokenizer = build_tokenizer(pieces)
    rows = json.loads((real_data / "demonstrations" / "small_instructions.json").read_text())
    texts = ["\n".join(row.values()) for row in rows if zlib.crc32(row["instruction"].encode()) % 10 == 0]
    assert len(texts) > 80
    for text in texts:
        assert tokenizer(text).input_ids == encode_by_greedy_merges(text, pieces)
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@given(
    st.text(st.sampled_from("abehinost ,.T\n\t#é漢🙂<>0xA ") | st.characters(exclude_categories=["Cs"]), max_size=30)
)
def test_any_text_is_tokenized_as_by_the_reference(pieces: Pieces, text: str) -> None:
    tokenizer = build_tokenizer(pieces)
    special = ("<unk>", "<s>", "</s>")
    if not any(token in text for token in special):
        assert tokenizer(text).input_ids == encode_by_greedy_merges(text, pieces)
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
