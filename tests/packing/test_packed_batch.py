"""A packed batch computes the same as separate rows: in float64, for every response token, gradients included."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model
from lit_rlhf.models.shared_backbone import ScalarHead
from lit_rlhf.packing import PackedBatch, length_bucketed_chunks, pack_batch, response_logits
from lit_rlhf.packing.packed_batch import pack_units
from lit_rlhf.packing.selective_logits import select_positions

P, R = 6, 7
SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]


def padded_batch(sizes: list[tuple[int, list[int]]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (B, P + R); `sizes` gives the length of each prompt and of its responses."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, responses in sizes:
        prompt_ids = torch.randint(4, 28, (prompt,), generator=generator)
        for response in responses:
            row = torch.zeros(P + R, dtype=torch.long)
            row[P - prompt : P] = prompt_ids
            row[P : P + response] = torch.randint(4, 28, (response,), generator=generator)
            rows.append(row)
    ids = torch.stack(rows)
    return ids, (ids > 0).long()


RAGGED = padded_batch([(3, [7, 1, 4]), (6, [2]), (1, [5, 5]), (4, [7]), (6, [1])])
FULL = padded_batch([(6, [7])] * 4)


def separate_logits(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the logits of the response tokens, (n, V), each sequence computed by itself without padding."""
    parts = []
    for row, real in zip(ids, mask.bool()):
        response = int(real[P:].sum())
        parts.append(model(row[real][None]).logits[0, -response - 1 : -1])
    return torch.cat(parts)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen_kernel"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_gradients_match_separate_rows(name, attention, model_folders, tokenizer, request):
    if attention == "varlen_kernel":
        request.getfixturevalue(attention)
    loading = ModelLoadingConfig(attn_implementation="eager" if attention == "eager" else "sdpa")
    model = load_causal_lm(model_folders[name], tokenizer, loading).double().eval()
    for ids, mask in (RAGGED, FULL):
        gradients = []
        weight = torch.randn(int(mask[:, P:].sum()), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for logits in (separate_logits(model, ids, mask), response_logits(model, pack_batch(ids, mask, R, model))):
            model.zero_grad()
            (logits.log_softmax(-1) * weight).sum().backward()
            gradients.append((logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        (expected, expected_gradients), (packed, packed_gradients) = gradients
        # the norms of transformers round to float32
        torch.testing.assert_close(packed, expected, atol=1e-6, rtol=1e-6)
        for actual, gradient in zip(packed_gradients, expected_gradients, strict=True):
            torch.testing.assert_close(actual, gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [False, True])
def test_scalars_match_separate_rows(kernel, model_folders, tokenizer, request):
    if kernel:
        request.getfixturevalue("varlen_kernel")
    model = load_scalar_model(model_folders["llama"], tokenizer, ModelLoadingConfig()).double().eval()
    ids, mask = RAGGED
    packed = pack_batch(ids, mask, R, model.model)
    inputs = packed.input_ids, packed.attention_mask, packed.position_ids
    values = packed.scatter_to_responses(model(*inputs, packed.predictor_index, packed.sequences))
    scores = model(*inputs, packed.last_token_index, packed.sequences)
    for row, real in enumerate(mask.bool()):
        separate = model(ids[row][real][None], mask[row][real][None])[0]
        response = int(real[P:].sum())
        torch.testing.assert_close(values[row, :response], separate[-response - 1 : -1], atol=1e-6, rtol=1e-5)
        assert (values[row, response:] == 0).all()
        torch.testing.assert_close(scores[row], separate[-1], atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def own_process() -> Iterator[ProcessPoolExecutor]:
    """A process for OpenMP's threads, which would not survive the forks of later tests."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("scalar", [False, True], ids=["logits", "values"])
def test_gradients_of_a_shared_prompt_are_the_same_from_run_to_run(scalar, own_process):
    """Many responses to a prompt begin after the same token, whose gradients must be added in one order."""
    assert own_process.submit(count_different_gradients, scalar).result() == 0


def count_different_gradients(scalar: bool) -> int:
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(4, 40, (3, 8), generator=generator).repeat_interleave(300, 0)
    ids = torch.cat([prompts, torch.randint(4, 40, (900, 2), generator=generator)], 1)
    model = llama(256)
    packed = pack_batch(ids, torch.ones_like(ids), 2, model)
    hidden = torch.randn(*packed.input_ids.shape, 256, generator=generator).requires_grad_()
    model.model.forward = lambda **_: BaseModelOutputWithPast(last_hidden_state=hidden)  # the indexing alone
    head = ScalarHead(torch.randn(1, 256, generator=generator))

    def gradient() -> torch.Tensor:
        values = head(select_positions(hidden, packed.predictor_index)) if scalar else response_logits(model, packed)
        (result,) = torch.autograd.grad((values * values).sum(), hidden)
        return result

    selected = hidden[packed.predictor_index]
    assert torch.equal(select_positions(hidden, packed.predictor_index), selected)
    first = gradient()
    return sum(not torch.equal(first, gradient()) for _ in range(20))


sizes = st.lists(
    st.tuples(st.integers(1, P), st.lists(st.integers(1, R), min_size=1, max_size=4)), min_size=1, max_size=6
)


def llama(hidden_size: int = 16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL | {"hidden_size": hidden_size}))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 20))
def test_every_token_is_computed_once_and_a_shared_prompt_once_for_all(unit_sizes, seed):
    ids, mask = padded_batch(unit_sizes, seed)
    packed = pack_batch(ids, mask, R, llama())
    num_tokens = packed.input_ids.numel() - packed.num_padding
    prompt_tokens, before = 0, None
    for row in ids[:, :P].tolist():
        prompt_tokens += 0 if row == before else sum(token > 0 for token in row)
        before = row
    assert num_tokens == prompt_tokens + int(mask[:, P:].sum()) or torch.equal(packed.input_ids, ids)
    assert packed.response_tokens.tolist() == ids[:, P:][mask[:, P:].bool()].tolist()
    assert torch.equal(packed.scatter_to_responses(packed.response_tokens), ids[:, P:])
    last = torch.stack([row[row > 0][-1] for row in ids])
    assert torch.equal(packed.input_ids[packed.last_token_index], last)
    before_each = torch.stack([ids[:, P - 1 + step] for step in range(R)], 1)[mask[:, P:].bool()]
    assert torch.equal(packed.input_ids[packed.predictor_index], before_each)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 20))
def test_sequences_of_the_kernel_hold_every_token_once_without_padding(unit_sizes, seed):
    ids, mask = padded_batch(unit_sizes, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_rlhf.packing.packed_batch.can_use_varlen_kernel", lambda *_: True)
        packed = pack_units(ids, mask, R, [llama()], ids.device)
    assert packed.num_padding == 0 and packed.input_ids.shape == (1, sum(packed.sequences.lengths))
    queries, keys, *_ = packed.sequences.kernel_args
    row = packed.input_ids[0]
    of_keys = row if packed.sequences.key_index is None else row[packed.sequences.key_index]
    sequences = [of_keys[start:end].tolist() for start, end in keys.unfold(0, 2, 1).tolist()]
    assert sequences == [each[each > 0].tolist() for each in ids]
    assert packed.input_ids[packed.last_token_index].tolist() == [each[-1] for each in sequences]
    for (start, end), sequence in zip(queries.unfold(0, 2, 1).tolist(), sequences):
        assert row[start:end].tolist() == sequence[start - end :]
        assert packed.position_ids[0, start:end].tolist() == list(range(len(sequence)))[start - end :]


def test_long_tailed_responses_leave_little_padding():
    """64 episodes, a mean response of a third of the limit: the normal range of `update/padding_fraction`."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.empty(64).exponential_(1 / 21, generator=generator).long() + 1).clamp(max=64)
    mask = torch.arange(96) < 32 + lengths[:, None]
    ids = torch.randint(4, 40, (64, 96), generator=generator) * mask
    padding = num_tokens = 0
    model = llama(256)
    for chunk in torch.randperm(64, generator=generator).split(16):
        packed = pack_batch(ids[chunk], mask[chunk].long(), 64, model)
        padding, num_tokens = padding + packed.num_padding, num_tokens + packed.input_ids.numel()
    assert padding / num_tokens < 0.05, padding / num_tokens
    assert 1 - float(mask.float().mean()) > 0.3


def test_an_unsupported_model_gets_separate_rows():
    torch.manual_seed(0)
    sliding = MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4)).double().eval()
    ids, mask = RAGGED
    for models in ((sliding,), (llama(), sliding)):
        packed = pack_batch(ids, mask, R, *models)
        assert torch.equal(packed.input_ids, ids) and packed.attention_mask.ndim == 2
    torch.testing.assert_close(
        response_logits(sliding, packed), separate_logits(sliding, ids, mask), atol=1e-6, rtol=1e-6
    )


def test_chunks_hold_rows_of_similar_length_and_keep_the_samples_of_a_prompt_together():
    ids, mask = RAGGED
    chunks = list(length_bucketed_chunks(ids, mask, R, 2))
    order = torch.cat([rows for rows, _, _ in chunks]).tolist()
    assert sorted(order) == list(range(len(ids)))
    for unit in ([0, 1, 2], [4, 5]):
        indices = [order.index(row) for row in unit]
        assert indices == list(range(indices[0], indices[0] + len(unit)))
    for rows, columns, width in chunks:
        packed: PackedBatch = pack_batch(ids[rows][:, columns], mask[rows][:, columns], width, llama())
        assert int(mask[rows].sum()) == int(mask[rows][:, columns].sum())
        assert packed.response_shape == (len(rows), width)
