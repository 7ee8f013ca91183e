"""Segments of one row against rows of their own, in six architectures; and the architectures that are refused."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    Qwen3NextConfig,
)

from lit_rlhf.packing.attention_masks import packed_model_inputs, packing_unsupported_reason

SHAPES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]
# two rows of (parent, tokens); the first row has a prompt with two completions, and padding at its end
LAYOUT = [
    [(-1, [5, 6, 7]), (-1, [8, 9, 10, 11]), (2, [12, 13]), (2, [14, 15, 16]), (-1, [17])],
    [(-1, list(range(4, 20)))],
]


def layout() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, segments and parents, (2, 16)."""
    rows = []
    for row in LAYOUT:
        ids = [token for _, tokens in row for token in tokens]
        segment = [number for number, (_, tokens) in enumerate(row, start=1) for _ in tokens]
        parent = [above for above, tokens in row for _ in tokens]
        gap = 16 - len(ids)
        rows.append((ids + [0] * gap, segment + [0] * gap, parent + [-1] * gap))
    return tuple(torch.tensor(each) for each in zip(*rows))  # type: ignore[return-value]


def apart(model: torch.nn.Module) -> torch.Tensor:
    """Logits of every segment's tokens, each sequence in a row of its own and without a mask."""
    logits = []
    for row in LAYOUT:
        for above, tokens in row:
            before = [] if above == -1 else row[above - 1][1]
            logits.append(model(torch.tensor([before + tokens]), use_cache=False).logits[0, len(before) :])
    return torch.cat(logits)


def gradient(model: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    weight = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (logits.log_softmax(-1) * weight).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHAPES)
def test_segments_are_computed_as_rows_of_their_own(model_folders, name, attention):
    model = AutoModelForCausalLM.from_pretrained(model_folders[name], attn_implementation=attention)
    assert packing_unsupported_reason(model.config, attention, 16) is None
    ids, segment, parent = layout()
    together = model(ids, use_cache=False, **packed_model_inputs(segment, parent, attention)).logits[segment > 0]
    separate = apart(model)
    torch.testing.assert_close(together, separate, atol=2e-5, rtol=1e-5)
    expected = gradient(model, separate)
    assert expected.norm() > 1e-3
    assert (gradient(model, together) - expected).norm() < 1e-5 * expected.norm()


def test_without_parents_every_segment_stands_alone():
    segment = torch.tensor([[1, 1, 2, 0]])
    inputs = packed_model_inputs(segment)
    assert inputs["attention_mask"][0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("config", "attention", "reason"),
    [
        (
            LlamaConfig(),
            "flash_attention_2",
            "takes no mask of who sees whom; set model.loading.attn_implementation to 'sdpa'",
        ),
        (MambaConfig(), "sdpa", "mamba has layers that carry a state"),
        (Qwen3NextConfig(), "sdpa", "qwen3_next has layers that carry a state"),
        (BloomConfig(), "sdpa", "bloom takes no positions"),
        (OpenAIGPTConfig(), "sdpa", "openai-gpt does not take a mask of who sees whom as it is"),
        (MistralConfig(sliding_window=99), "sdpa", "slides over 99 tokens, and the longest sequence has 100"),
        (MistralConfig(sliding_window=100), "sdpa", None),
        (MistralConfig(sliding_window=None), "eager", None),
    ],
)
def test_other_architectures_are_refused(config, attention, reason):
    said = packing_unsupported_reason(config, attention, 100)
    assert said is None if reason is None else reason in said
