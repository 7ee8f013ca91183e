"""A prompt computed once for all its completions: scores and gradients of whole rows, fewer tokens, and where not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, MistralConfig

from lit_rlhf.functional import pad_right, ranking_loss
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.scalar_model import ScalarModel, load_scalar_model
from lit_rlhf.packing.rankings import RankingInputs, pack_rankings, prefix_sharing_unsupported_reason

SHAPES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]
token = st.integers(2, 31)
# rankings of 1 to 5 completions, ragged: [(prompt, [completion, ...]), ...]
rankings = st.lists(
    st.tuples(
        st.lists(token, min_size=1, max_size=9),
        st.lists(st.lists(token, min_size=1, max_size=7), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=3,
)
RAGGED = [([5, 6, 7, 8, 9], [[4, 1], [10, 11, 12, 1], [13]]), ([14, 15], [[16, 1], [17, 18, 19, 20, 21, 22, 1]])]


def batch(written) -> RankingInputs:
    ids, mask = pad_right([prompt + each for prompt, completions in written for each in completions], 0)
    lengths = [len(prompt) for prompt, completions in written for _ in completions]
    owners = [number for number, (_, completions) in enumerate(written) for _ in completions]
    return RankingInputs(ids, mask, torch.tensor(lengths), torch.tensor(owners))


@pytest.fixture(scope="module")
def models(model_folders, tokenizer) -> dict[str, ScalarModel]:
    return {name: load_scalar_model(model_folders[name], tokenizer, ModelLoadingConfig()) for name in SHAPES}


def loss_gradient(model: ScalarModel, rows: RankingInputs, shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores, and the gradient of the K-wise loss with every parameter in one vector."""
    model.zero_grad()
    scores = model.score_rankings(rows, shared)
    ranks = torch.arange(len(scores)) * 7 % 5
    ranking_loss(scores, rows.ranking_index, ranks).loss.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return scores.detach(), torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("name", SHAPES)
@given(written=rankings)
def test_scores_and_gradient_are_those_of_whole_rows(models, name, written):
    rows = batch([*written, *RAGGED])
    whole, gradient = loss_gradient(models[name], rows, shared=False)
    shared, its_gradient = loss_gradient(models[name], rows, shared=True)
    torch.testing.assert_close(shared, whole, atol=2e-5, rtol=1e-5)
    assert gradient.norm() > 1e-3, "a gradient of nought would show nothing"
    assert (its_gradient - gradient).norm() < 1e-5 * gradient.norm()


def seen_by(model: ScalarModel, rows: RankingInputs, shared: bool) -> tuple[int, int]:
    """Rows and tokens, padding apart, that went through the transformer."""
    passes: list[torch.Tensor] = []

    def note(module, args, inputs):
        width = inputs["input_ids"].shape[1]
        passes.append(inputs["attention_mask"][:, -width:])

    hook = model.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    model.score_rankings(rows, shared)
    hook.remove()
    return sum(len(each) for each in passes), sum(int(each.sum()) for each in passes)


def test_k_rows_a_ranking_and_the_prompt_once(models):
    rows = batch(RAGGED)
    completions = sum(len(each) for _, every in RAGGED for each in every)
    assert seen_by(models["llama"], rows, shared=False) == (5, int(rows.attention_mask.sum()))
    assert seen_by(models["llama"], rows, shared=True) == (5, completions + 5 + 2)


def test_adapters_learn_through_the_shared_prompt(llama, tokenizer):
    from lit_rlhf.models.lora import add_lora

    model = load_scalar_model(llama, tokenizer, ModelLoadingConfig())
    add_lora(model.model, LoRA(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    (_, whole), (_, shared) = (loss_gradient(model, batch(RAGGED), shared=s) for s in (False, True))
    assert (shared - whole).norm() < 1e-5 * whole.norm()


def test_under_autocast_the_scores_are_those_of_whole_rows_up_to_its_rounding(models):
    model, rows = models["llama"], batch(RAGGED)
    exact = model.score_rankings(rows)
    with torch.autocast("cpu", torch.bfloat16):
        for shared in (False, True):
            scores = model.score_rankings(rows, shared)
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, exact, atol=0.1, rtol=0.05)


SIZE = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}


def mistral(**settings) -> ScalarModel:
    config = MistralConfig(**SIZE, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, **settings)
    config.num_labels = 1
    return ScalarModel(AutoModelForSequenceClassification.from_config(config))


def test_a_window_over_the_tokens_is_refused_and_one_over_all_of_them_is_not():
    narrow, wide = mistral(sliding_window=4), mistral(sliding_window=64, max_position_embeddings=64)
    assert "slides over 4 tokens" in prefix_sharing_unsupported_reason(narrow.model)
    assert prefix_sharing_unsupported_reason(wide.model) is None
    rows = batch(RAGGED)
    for model, passes in ((narrow, int(rows.attention_mask.sum())), (wide, 23)):
        assert seen_by(model, rows, shared=True) == (5, passes)
        torch.testing.assert_close(model.score_rankings(rows), model.score_rankings(rows, False), atol=1e-5, rtol=1e-5)


LONG_PROMPTS = [([5, 6, 7, 8, 9] * 6, each) for _, each in RAGGED]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHAPES)
def test_under_gradient_checkpointing_a_ranking_lies_in_one_row(name, attention, models, model_folders, tokenizer):
    model = load_scalar_model(
        model_folders[name], tokenizer, ModelLoadingConfig(gradient_checkpointing=True, attn_implementation=attention)
    )
    assert prefix_sharing_unsupported_reason(model.model) is None
    rows = batch(LONG_PROMPTS)
    scores, gradient = loss_gradient(model, rows, True)
    expected, its_gradient = loss_gradient(models[name], rows, False)
    torch.testing.assert_close(scores, expected, atol=2e-5, rtol=1e-5)
    assert (gradient - its_gradient).norm() < 1e-5 * its_gradient.norm()


@given(written=rankings)
def test_one_row_holds_every_token_once(written):
    layout = pack_rankings(batch(written))
    for row, (prompt, completions) in enumerate(written):
        real = layout.segment[row] > 0
        assert layout.input_ids[row][real].tolist() == [*prompt, *(token for each in completions for token in each)]
        numbers = [1] * len(prompt) + [2 + place for place, each in enumerate(completions) for _ in each]
        assert layout.segment[row][real].tolist() == numbers
        assert layout.parent[row][real].tolist() == [-1 if number == 1 else 1 for number in numbers]
    ends = [each[-1] for _, completions in written for each in completions]
    assert layout.input_ids[layout.line, layout.column].tolist() == ends


def lines_of(model: ScalarModel, rows: RankingInputs) -> int:
    """How many rows one pass has."""
    lines: list[int] = []
    hook = model.model.base_model.register_forward_pre_hook(
        lambda _, args, inputs: lines.append(len(inputs["input_ids"])), with_kwargs=True
    )
    model.score_rankings(rows)
    hook.remove()
    assert len(lines) == 1
    return lines[0]


def test_under_gradient_checkpointing_the_cheaper_layout_is_taken(llama, tokenizer):
    model = load_scalar_model(llama, tokenizer, ModelLoadingConfig(gradient_checkpointing=True))
    assert lines_of(model, batch(LONG_PROMPTS)) == 2
    long = [([5], [[6] * 60, [7] * 60, [8] * 60])]  # 181 tokens that attend over 181, or 183 over 61
    assert lines_of(model, batch(long)) == 3
    assert seen_by(model.eval(), batch(RAGGED), shared=True)[0] == 5, "in evaluation the keys are kept"
