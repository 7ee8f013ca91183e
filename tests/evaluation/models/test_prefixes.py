"""Few-shot prefixes: in turn, or the best of several by a reward model; the selection in the report."""

import json
from html import escape
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.preference import HuggingFaceJudge
from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel, ModelSpec
from lit_rlhf.evaluation.models.prefixes import BestPrefix
from lit_rlhf.evaluation.reports.evaluation_page import render_page
from lit_rlhf.evaluation.run import Evaluation
from lit_rlhf.evaluation.suites.preference import PairwisePreference
from lit_rlhf.models.loading import load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model

NO_CACHE = Cache(None)
PREFIXES = ["w9 w8 ", "w1 w2 w3 ", "w20 "]
PROMPTS = ["w5", "w6 w7", "w11 w4", "w30", "w2 w2"]
LENGTH = 4


@pytest.fixture
def few(llama, tmp_path, monkeypatch) -> Path:
    """A folder with prefixes, prompts and a reward model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.json").write_text(json.dumps({"prefixes": PREFIXES}))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    tokenizer = load_tokenizer(llama, ModelLoadingConfig())
    load_scalar_model(llama, tokenizer, ModelLoadingConfig(), seed=4).model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return tmp_path


def best(**settings) -> BestPrefix:
    return BestPrefix("reward", "prompts.jsonl", **{"max_new_tokens": LENGTH, "temperature": 0.0, **settings})


@torch.no_grad()
def expected(llama: str) -> list[float]:
    """Mean scores by transformers' own greedy decoding; the reward model sees prompt and answer, no prefix."""
    tokenizer = load_tokenizer(llama, ModelLoadingConfig())
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    reward_model = load_scalar_model(
        "reward", load_tokenizer("reward", ModelLoadingConfig()), ModelLoadingConfig()
    ).eval()
    means = []
    for prefix in PREFIXES:
        scores = []
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer.encode(prefix + prompt)])
            generated = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LENGTH)
            own = generated[0, ids.shape[1] :].tolist()
            text = tokenizer.decode(own, skip_special_tokens=True).strip()
            eos = [tokenizer.eos_token_id] * (tokenizer.eos_token_id in own)
            full = torch.tensor([tokenizer.encode(prompt) + tokenizer.encode(text) + eos])
            scores.append(float(reward_model.score(full, torch.ones_like(full))))
        means.append(sum(scores) / len(scores))
    return means


def test_the_prefix_with_the_highest_mean_score_is_used_for_every_prompt(few, llama) -> None:
    evaluated_model = EvaluatedModel("few", ModelSpec(llama, prefixes="few.json", best_prefix=best()), NO_CACHE)
    scores = expected(llama)
    assert [each.score for each in evaluated_model.scored_prefixes] == pytest.approx(scores, abs=1e-5)
    assert [each[::2] for each in evaluated_model.scored_prefixes] == [(prefix, 5) for prefix in PREFIXES]
    selected = PREFIXES[scores.index(max(scores))]
    assert len(set(scores)) == 3 and selected != PREFIXES[0]
    assert evaluated_model.prepend_prefix(["a", "b", "c"]) == [selected + prompt for prompt in "abc"]
    limited = EvaluatedModel("few", ModelSpec(llama, prefixes="few.json", best_prefix=best(limit=2)), NO_CACHE)
    assert {each.num_prompts for each in limited.scored_prefixes} == {2}


def test_the_report_names_the_prefix_and_all_scores(few, llama) -> None:
    suites = {"preference": PairwisePreference("prompts.jsonl", {"judge": HuggingFaceJudge(llama)}, LENGTH)}
    models = {"base": ModelSpec(llama), "few": ModelSpec(llama, prefixes="few.json", best_prefix=best())}
    report = Evaluation(models, "base", suites, "out", progress=False).run()
    part = report["suites"]["preference"]
    scores = expected(llama)
    table = part["tables"]["few"]["prefixes"]
    assert [row["score"] for row in table] == pytest.approx(scores, abs=1e-5)
    assert [(row["text"], row["selected"]) for row in table] == [
        (p, s == max(scores)) for p, s in zip(PREFIXES, scores)
    ]
    formatted = ", ".join(f"{score:.3f}" for score in scores)
    number = scores.index(max(scores)) + 1
    assert part["notes"]["few"] == [
        f"few-shot prefix {number} of 3 was selected: mean reward scores {formatted} on 5 prompts"
    ]
    assert "prefixes" not in part["tables"]["base"]
    page = render_page(report)
    assert "Few-shot prefixes of few" in page and all(escape(prefix) in page for prefix in PREFIXES)


def test_the_selection_is_cached(few, llama, monkeypatch) -> None:
    spec = ModelSpec(llama, prefixes="few.json", best_prefix=best(temperature=1.0))
    first = EvaluatedModel("few", spec, Cache(few / "cache", progress=False)).scored_prefixes
    monkeypatch.setattr(
        "lit_rlhf.evaluation.models.evaluated_model.load_causal_lm", lambda *_: pytest.fail("a model was loaded")
    )
    monkeypatch.setattr(
        "lit_rlhf.evaluation.models.reward_scorer.load_scalar_model", lambda *_: pytest.fail("and this one")
    )
    assert EvaluatedModel("few", spec, Cache(few / "cache", progress=False)).scored_prefixes == first


def test_few_shot_prefixes_go_in_front_of_the_prompts_in_turn(few, llama) -> None:
    evaluated_model = EvaluatedModel("few", ModelSpec(llama, prefixes="few.json"), NO_CACHE)
    assert evaluated_model.prepend_prefix(list("abcd")) == [PREFIXES[i % 3] + prompt for i, prompt in enumerate("abcd")]
    assert evaluated_model.scored_prefixes == []
    assert EvaluatedModel("one", ModelSpec(llama, prefix="w9 "), NO_CACHE).prepend_prefix(["a"]) == ["w9 a"]
    with pytest.raises(UserError, match="has prefix and prefixes"):
        EvaluatedModel("both", ModelSpec(llama, prefix="a", prefixes="b"), NO_CACHE)
    (few / "few.json").write_text("[]")
    with pytest.raises(UserError, match="must hold a list of texts"):
        EvaluatedModel("none", ModelSpec(llama, prefixes="few.json"), NO_CACHE)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prefixes": None}, "'few' has best_prefix and no prefixes to choose from"),
        ({"prefixes": "fw.json"}, "prefixes: cannot read 'fw.json'"),
        ({"best_prefix": BestPrefix("reward", "promts.jsonl")}, r"no data file 'promts.jsonl' \(did you mean 'prompts"),
        ({"best_prefix": BestPrefix("./no", "prompts.jsonl")}, "there is no folder './no'"),
    ],
)
def test_the_selection_is_checked_before_a_model_is_loaded(settings, message, few, llama) -> None:
    with pytest.raises(UserError, match=message):
        EvaluatedModel("few", ModelSpec(llama, **{"prefixes": "few.json", "best_prefix": best(), **settings}), NO_CACHE)


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"limit": 0}])
def test_invalid_settings_are_refused(settings) -> None:
    with pytest.raises(UserError, match="best_prefix: max_new_tokens and limit must be 1 or more"):
        best(**settings)


def test_prompts_that_are_skipped_or_doubtful_are_noted(few, llama) -> None:
    (few / "prompts.jsonl").write_text('{"prompt": "w5"}\n{"prompt": " "}\n{"prompt": "w6", "weight": 2}\n')
    spec = ModelSpec(llama, prefixes="few.json", best_prefix=best())
    model = EvaluatedModel("few", spec, NO_CACHE)
    suite = PairwisePreference("prompts.jsonl", {"judge": HuggingFaceJudge(llama)}, LENGTH)
    notes = ["1 rows skipped: empty prompt", "1 rows: column 'weight' is not read by the format"]
    found = suite.run(model, model).notes
    assert found[:2] == notes and found[-2:] == [f"prompts of the few-shot prefixes: {note}" for note in notes]
