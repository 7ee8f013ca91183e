"""Packed segments against separate rows in six architectures; refused architectures; the mask written out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    Qwen3NextConfig,
)

from lit_rlhf.packing import packed_model_inputs, packed_position_ids, packing_unsupported_reason, prefix_tree_mask

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]
# two rows of segments (parent, tokens); the first row has a prompt with two completions, and padding at its end
ROWS = [
    [(-1, [5, 6, 7]), (-1, [8, 9, 10, 11]), (2, [12, 13]), (2, [14, 15, 16]), (-1, [17])],
    [(-1, list(range(4, 20)))],
]


def packed_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, segment ids and parent ids, (2, 16) int64 each."""
    rows = []
    for row in ROWS:
        ids = [token for _, tokens in row for token in tokens]
        segment = [number for number, (_, tokens) in enumerate(row, start=1) for _ in tokens]
        parent = [above for above, tokens in row for _ in tokens]
        padding = 16 - len(ids)
        rows.append((ids + [0] * padding, segment + [0] * padding, parent + [-1] * padding))
    return tuple(torch.tensor(each) for each in zip(*rows))  # type: ignore[return-value]


def separate_logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of every segment's tokens, each sequence in a separate row without a mask."""
    logits = []
    for row in ROWS:
        for above, tokens in row:
            before = [] if above == -1 else row[above - 1][1]
            logits.append(model(torch.tensor([before + tokens]), use_cache=False).logits[0, len(before) :])
    return torch.cat(logits)


def gradient(model: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    weight = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (logits.log_softmax(-1) * weight).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_segments_match_separate_rows(model_folders, name, attn_implementation):
    model = AutoModelForCausalLM.from_pretrained(model_folders[name], attn_implementation=attn_implementation)
    assert packing_unsupported_reason(model.config, 16) is None
    ids, segment, parent = packed_rows()
    inputs = packed_model_inputs(segment, parent, attn_implementation)
    packed = model(ids, use_cache=False, **inputs).logits[segment > 0]
    separate = separate_logits(model)
    torch.testing.assert_close(packed, separate, atol=2e-5, rtol=1e-5)
    expected = gradient(model, separate)
    assert expected.norm() > 1e-3
    assert (gradient(model, packed) - expected).norm() < 1e-5 * expected.norm()


def test_without_parents_segments_do_not_attend_to_each_other():
    segment = torch.tensor([[1, 1, 2, 0]])
    inputs = packed_model_inputs(segment)
    assert inputs["attention_mask"][0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("config", "attn_implementation", "reason"),
    [
        (
            LlamaConfig(),
            "flash_attention_2",
            "takes no mask that keeps packed sequences apart; set model.loading.attn_implementation to 'sdpa'",
        ),
        (MambaConfig(), "sdpa", "mamba has layers that carry a state"),
        (Qwen3NextConfig(), "sdpa", "qwen3_next has layers that carry a state"),
        (BloomConfig(), "sdpa", "bloom is not among the architectures that were checked to apply attention masks"),
        (OpenAIGPTConfig(), "sdpa", "openai-gpt is not among the architectures that were checked"),
        (MistralConfig(sliding_window=99), "sdpa", "slides over 99 tokens, and the longest sequence has 100"),
        (MistralConfig(sliding_window=100), "sdpa", None),
        (MistralConfig(sliding_window=None), "eager", None),
    ],
)
def test_unsupported_architectures_are_refused(config, attn_implementation, reason):
    actual = packing_unsupported_reason(config, 100, attn_implementation)
    assert actual is None if reason is None else reason in actual


def test_mask_of_a_prompt_and_two_completions_by_hand():
    segment = torch.tensor([[1, 1, 2, 2, 3, 0]])
    parent = torch.tensor([[-1, -1, 1, 1, 1, -1]])
    mask = prefix_tree_mask(segment, parent)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert packed_position_ids(mask, segment).tolist() == [[0, 1, 2, 3, 2, 0]]


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(0, 3))
def test_a_token_attends_to_its_own_sequence_alone(groups, padding):
    """Each group is a parent and its children, concatenated; every token knows its sequence."""
    segment, parent, positions = [], [], []
    number = 0
    for root, *children in groups:
        number += 1
        first = number
        for length, above in [(root, -1), *((child, first) for child in children)]:
            offset = 0 if above == -1 else root
            segment += [number] * length
            parent += [above] * length
            positions += list(range(offset, offset + length))
            number += 1
        number -= 1
    segment += [0] * padding
    parent += [-1] * padding
    mask = prefix_tree_mask(torch.tensor([segment]), torch.tensor([parent]))
    for query, (own, above) in enumerate(zip(segment, parent)):
        keys = {key for key in range(len(segment)) if mask[0, 0, query, key]}
        assert keys == {key for key in range(query + 1) if segment[key] == own or segment[key] == above}
        assert query in keys
    assert packed_position_ids(mask, torch.tensor([segment]))[0].tolist() == positions + [0] * padding
