"""A prompt computed once for all its completions: scores and gradients of full rows from fewer tokens; exceptions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, MistralConfig

from lit_rlhf.functional import pad_right, ranking_loss
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.scalar_model import ScalarModel, load_scalar_model
from lit_rlhf.packing import rankings as ranking_passes
from lit_rlhf.packing.rankings import RankingInputs, pack_rankings, prefix_sharing_unsupported_reason
from tests.helpers.varlen_kernel import use_reference_kernel

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]
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


def ranking_inputs(examples) -> RankingInputs:
    ids, mask = pad_right([prompt + each for prompt, completions in examples for each in completions], 0)
    lengths = [len(prompt) for prompt, completions in examples for _ in completions]
    owners = [number for number, (_, completions) in enumerate(examples) for _ in completions]
    return RankingInputs(ids, mask, torch.tensor(lengths), torch.tensor(owners))


@pytest.fixture(scope="module")
def models(model_folders, tokenizer) -> dict[str, ScalarModel]:
    return {name: load_scalar_model(model_folders[name], tokenizer, ModelLoadingConfig()) for name in ARCHITECTURES}


def loss_gradient(model: ScalarModel, rows: RankingInputs, shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores, and the gradient of the K-wise loss as one vector over all parameters."""
    model.zero_grad()
    scores = model.score_rankings(rows, shared)
    ranks = torch.arange(len(scores)) * 7 % 5
    ranking_loss(scores, rows.ranking_index, ranks).loss.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return scores.detach(), torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("worth", [0.0, float("inf")], ids=["packed", "prefix cache"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@given(examples=rankings)
def test_scores_and_gradient_match_full_rows(models, name, worth, examples):
    rows = ranking_inputs([*examples, *RAGGED])
    full, gradient = loss_gradient(models[name], rows, shared=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking_passes, "WORTH_A_PASS", worth)
        shared, shared_gradient = loss_gradient(models[name], rows, shared=True)
    torch.testing.assert_close(shared, full, atol=2e-5, rtol=1e-5)
    assert gradient.norm() > 1e-3, "a zero gradient would show nothing"
    assert (shared_gradient - gradient).norm() < 1e-5 * gradient.norm()


def computed_passes(model: ScalarModel, rows: RankingInputs, shared: bool = True) -> list[tuple[int, int]]:
    """Return rows and width of each pass through the transformer."""
    passes: list[tuple[int, int]] = []
    hook = model.model.base_model.register_forward_pre_hook(
        lambda _, args, inputs: passes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    model.score_rankings(rows, shared)
    hook.remove()
    return passes


def test_full_rows_compute_k_prompts_per_ranking_and_sharing_one(models):
    rows = ranking_inputs(RAGGED)
    assert computed_passes(models["llama"], rows, shared=False) == [tuple(rows.input_ids.shape)] == [(5, 9)]
    assert computed_passes(models["llama"], rows) == [(2, 12)], "5 + 2 + 4 + 1 and 2 + 2 + 7 tokens, one of padding"


def test_long_completions_continue_their_prompt_and_do_not_attend_over_each_other(models):
    completions = [[6] * 60, [7] * 60, [8] * 60]
    assert computed_passes(models["llama"], ranking_inputs([([5], completions)])) == [(1, 61), (2, 60)]
    assert computed_passes(models["llama"], ranking_inputs([([5] * 60, [[6], [7], [8]])])) == [(1, 63)]


def test_gradients_of_adapters_flow_through_the_shared_prompt(llama, tokenizer):
    from lit_rlhf.models.lora import add_lora

    model = load_scalar_model(llama, tokenizer, ModelLoadingConfig())
    add_lora(model.model, LoRA(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    (_, full), (_, shared) = (loss_gradient(model, ranking_inputs(RAGGED), shared=s) for s in (False, True))
    assert (shared - full).norm() < 1e-5 * full.norm()


def test_under_autocast_scores_match_full_rows_up_to_its_rounding(models):
    model, rows = models["llama"], ranking_inputs(RAGGED)
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


def test_a_sliding_window_is_refused_unless_it_covers_all_positions():
    narrow, wide = mistral(sliding_window=4), mistral(sliding_window=64, max_position_embeddings=64)
    assert "slides over 4 tokens" in prefix_sharing_unsupported_reason(narrow.model)
    assert prefix_sharing_unsupported_reason(wide.model) is None
    rows = ranking_inputs(RAGGED)
    for model, passes in ((narrow, [(5, 9)]), (wide, [(2, 12)])):
        assert computed_passes(model, rows) == passes
        torch.testing.assert_close(model.score_rankings(rows), model.score_rankings(rows, False), atol=1e-5, rtol=1e-5)


LONG_PROMPTS = [(prompt * (30 // len(prompt)), completions) for prompt, completions in RAGGED]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen_kernel"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_under_gradient_checkpointing_packed_rankings_match_full_rows(
    name, attention, models, model_folders, tokenizer, request
):
    if attention == "varlen_kernel":
        request.getfixturevalue(attention)
    implementation = "eager" if attention == "eager" else "sdpa"
    model = load_scalar_model(
        model_folders[name],
        tokenizer,
        ModelLoadingConfig(gradient_checkpointing=True, attn_implementation=implementation),
    )
    assert prefix_sharing_unsupported_reason(model.model) is None
    rows = ranking_inputs(LONG_PROMPTS)
    scores, gradient = loss_gradient(model, rows, True)
    expected, expected_gradient = loss_gradient(models[name], rows, False)
    torch.testing.assert_close(scores, expected, atol=2e-5, rtol=1e-5)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


@given(examples=rankings)
def test_packed_rankings_hold_every_token_once(models, examples):
    batch = pack_rankings(models["llama"].model, ranking_inputs(examples))
    prompts = [
        prompt for number, (prompt, _) in enumerate(examples) if number == 0 or examples[number - 1][0] != prompt
    ]
    completions = [(prompt, completion) for prompt, each in examples for completion in each]
    num_tokens = sum(map(len, prompts)) + sum(len(completion) for _, completion in completions)
    assert batch.input_ids.numel() - batch.num_padding == num_tokens
    for (prompt, completion), row, column in zip(completions, *batch.last_token_index, strict=True):
        attended = batch.attention_mask[row, 0, column]
        assert batch.input_ids[row][attended].tolist() == [*prompt, *completion]
        assert batch.position_ids[row][attended].tolist() == list(range(len(prompt) + len(completion)))
    assert batch.response_tokens.tolist() == [token for _, completion in completions for token in completion]


def test_under_gradient_checkpointing_the_cheaper_rows_are_computed(llama, tokenizer, monkeypatch):
    model = load_scalar_model(llama, tokenizer, ModelLoadingConfig(gradient_checkpointing=True))
    assert [rows for rows, _ in computed_passes(model, ranking_inputs(LONG_PROMPTS))] == [2]
    same_prompt = [(LONG_PROMPTS[0][0], completions) for _, completions in RAGGED]
    assert [rows for rows, _ in computed_passes(model, ranking_inputs(same_prompt))] == [1]
    long = [([5], [[6] * 60, [7] * 60, [8] * 60])]  # 181 tokens that attend over 181, or 183 over 61
    assert computed_passes(model, ranking_inputs(long)) == [(3, 61)]
    assert computed_passes(model.eval(), ranking_inputs(long)) == [(1, 61), (2, 60)], "keys and values are cached"
    use_reference_kernel(monkeypatch)
    assert computed_passes(model.train(), ranking_inputs(long)) == [(1, 181)], "each attends to its own 61"
