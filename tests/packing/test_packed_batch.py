"""A batch laid out is the batch: in float64 every response token as in a row of its own, gradients included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model
from lit_rlhf.packing.packed_batch import PackedBatch, length_bucketed_chunks, pack_batch, response_logits

P, R = 6, 7
SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]


def batch(sizes: list[tuple[int, list[int]]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, P + R): prompts of a length, each with responses of some lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, responses in sizes:
        words = torch.randint(4, 28, (prompt,), generator=generator)
        for response in responses:
            row = torch.zeros(P + R, dtype=torch.long)
            row[P - prompt : P] = words
            row[P : P + response] = torch.randint(4, 28, (response,), generator=generator)
            rows.append(row)
    ids = torch.stack(rows)
    return ids, (ids > 0).long()


RAGGED = batch([(3, [7, 1, 4]), (6, [2]), (1, [5, 5]), (4, [7]), (6, [1])])
FULL = batch([(6, [7])] * 4)


def separate(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of the response tokens, (n, V), each row by itself without padding."""
    parts = []
    for row, real in zip(ids, mask.bool()):
        response = int(real[P:].sum())
        parts.append(model(row[real][None]).logits[0, -response - 1 : -1])
    return torch.cat(parts)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_separate_rows(name, attention, model_folders, tokenizer):
    model = (
        load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig(attn_implementation=attention))
        .double()
        .eval()
    )
    for ids, mask in (RAGGED, FULL):
        gradients = []
        weight = torch.randn(int(mask[:, P:].sum()), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for logits in (separate(model, ids, mask), response_logits(model, pack_batch(ids, mask, R, model))):
            model.zero_grad()
            (logits.log_softmax(-1) * weight).sum().backward()
            gradients.append((logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        (one, ones), (other, others) = gradients
        # the norms of transformers round to float32
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-6)
        for mine, theirs in zip(others, ones, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_scalars_are_read_where_they_belong(model_folders, tokenizer):
    model = load_scalar_model(model_folders["llama"], tokenizer, ModelLoadingConfig()).double().eval()
    ids, mask = RAGGED
    layout = pack_batch(ids, mask, R, model.model)
    inputs = layout.input_ids, layout.attention_mask, layout.position_ids
    values, scores = (
        layout.scatter_to_responses(model(*inputs, layout.predictor_index)),
        model(*inputs, layout.last_token_index),
    )
    for row, real in enumerate(mask.bool()):
        whole = model(ids[row][real][None], mask[row][real][None])[0]
        response = int(real[P:].sum())
        torch.testing.assert_close(values[row, :response], whole[-response - 1 : -1], atol=1e-6, rtol=1e-5)
        assert (values[row, response:] == 0).all()
        torch.testing.assert_close(scores[row], whole[-1], atol=1e-6, rtol=1e-5)


sizes = st.lists(
    st.tuples(st.integers(1, P), st.lists(st.integers(1, R), min_size=1, max_size=4)), min_size=1, max_size=6
)


def llama(hidden_size: int = 16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL | {"hidden_size": hidden_size}))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 20))
def test_every_token_stands_once_and_a_shared_prompt_once_for_all(of, seed):
    ids, mask = batch(of, seed)
    layout = pack_batch(ids, mask, R, llama())
    real = layout.input_ids.numel() - layout.num_padding
    runs, before = 0, None
    for row in ids[:, :P].tolist():
        runs += 0 if row == before else sum(token > 0 for token in row)
        before = row
    assert real == runs + int(mask[:, P:].sum()) or torch.equal(layout.input_ids, ids)
    assert layout.response_tokens.tolist() == ids[:, P:][mask[:, P:].bool()].tolist()
    assert torch.equal(layout.scatter_to_responses(layout.response_tokens), ids[:, P:])
    last = torch.stack([row[row > 0][-1] for row in ids])
    assert torch.equal(layout.input_ids[layout.last_token_index], last)
    before_each = torch.stack([ids[:, P - 1 + step] for step in range(R)], 1)[mask[:, P:].bool()]
    assert torch.equal(layout.input_ids[layout.predictor_index], before_each)


def test_long_tailed_responses_leave_little_padding():
    """64 episodes, a mean response of a third of the limit: what `update/padding_fraction` is meant to be."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.empty(64).exponential_(1 / 21, generator=generator).long() + 1).clamp(max=64)
    mask = torch.arange(96) < 32 + lengths[:, None]
    ids = torch.randint(4, 40, (64, 96), generator=generator) * mask
    padding = size = 0
    model = llama(256)
    for chunk in torch.randperm(64, generator=generator).split(16):
        layout = pack_batch(ids[chunk], mask[chunk].long(), 64, model)
        padding, size = padding + layout.num_padding, size + layout.input_ids.numel()
    assert padding / size < 0.05, padding / size
    assert 1 - float(mask.float().mean()) > 0.3


def test_a_model_that_would_let_segments_see_each_other_gets_rows_of_their_own():
    torch.manual_seed(0)
    sliding = MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4)).double().eval()
    ids, mask = RAGGED
    for models in ((sliding,), (llama(), sliding)):
        layout = pack_batch(ids, mask, R, *models)
        assert torch.equal(layout.input_ids, ids) and layout.attention_mask.ndim == 2
    torch.testing.assert_close(response_logits(sliding, layout), separate(sliding, ids, mask), atol=1e-6, rtol=1e-6)


def test_chunks_hold_rows_of_like_length_and_the_samples_of_a_prompt_together():
    ids, mask = RAGGED
    chunks = list(length_bucketed_chunks(ids, mask, R, 2))
    order = torch.cat([rows for rows, _, _ in chunks]).tolist()
    assert sorted(order) == list(range(len(ids)))
    for run in ([0, 1, 2], [4, 5]):
        places = [order.index(row) for row in run]
        assert places == list(range(places[0], places[0] + len(run)))
    for rows, columns, width in chunks:
        kept: PackedBatch = pack_batch(ids[rows][:, columns], mask[rows][:, columns], width, llama())
        assert int(mask[rows].sum()) == int(mask[rows][:, columns].sum())
        assert kept.response_mask.shape == (len(rows), width)
