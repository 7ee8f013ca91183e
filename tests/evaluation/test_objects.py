"""Judges, suites and evaluated models from memory give what their folders and files give, and change nothing."""

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation import (
    Benchmark,
    Benchmarks,
    BestOf,
    BestPrefix,
    Claim,
    HuggingFaceJudge,
    HuggingFaceTruthJudge,
    KeywordToxicity,
    ModelSpec,
    PairwisePreference,
    RewardModelJudge,
    ToxicityClassifier,
    Winogender,
)
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.judging_types import CompletionPair
from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel, compute_log_odds
from lit_rlhf.evaluation.models.generation import Completion
from lit_rlhf.evaluation.models.reward_scorer import RewardScorer, ScoredText
from lit_rlhf.evaluation.run import Evaluation
from lit_rlhf.evaluation.tasks import readers
from lit_rlhf.generation import SamplingParams
from lit_rlhf.models import ModelLoadingConfig
from lit_rlhf.models.loading import load_tokenizer
from lit_rlhf.models.scalar_model import load_scalar_model

NO_CACHE, LOADING = Cache(None), ModelLoadingConfig()
PROMPTS = [{"prompt": f"w{n} w{n + 1}"} for n in range(5)]
PAIRS = [CompletionPair(f"w{n}", {}, Completion(f"w{n + 1} w3", True, 3), Completion("w4", n > 2, 2)) for n in range(5)]
CLAIMS = [Claim(f"w{n} w2", f"w{n + 3}", ["w1"], ["w2"]) for n in range(4)]


def nameless(model: Any) -> Any:
    """Return a model that is from no folder, as one that was built from its configuration."""
    model.name_or_path = model.config._name_or_path = ""
    return model


@pytest.fixture
def reward(llama: str, tmp_path: Path) -> str:
    """A reward model's folder."""
    tokenizer = load_tokenizer(llama, LOADING)
    load_scalar_model(llama, tokenizer, LOADING, seed=4).model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


def reward_object(folder: str) -> Any:
    return nameless(AutoModelForSequenceClassification.from_pretrained(folder))


def evaluate(spec: ModelSpec, cache: Cache = NO_CACHE) -> Any:
    model = EvaluatedModel("m", spec, cache)
    completions = model.generate([row["prompt"] for row in PROMPTS], SamplingParams(5))
    return completions, model.compute_loglikelihoods([("w1 w2", " w3"), ("w4", " w5 w6")])


def test_a_model_answers_as_its_folder_does_and_stays_as_it_is(llama, tokenizer, tmp_path, monkeypatch) -> None:
    given, own = nameless(AutoModelForCausalLM.from_pretrained(llama)), copy.deepcopy(tokenizer)
    own.pad_token = None
    config = given.config.to_dict()
    cache = Cache(tmp_path / "cache", progress=False)
    found = evaluate(ModelSpec(given, tokenizer=own), cache)
    assert found == evaluate(ModelSpec(llama))
    assert given.config.to_dict() == config and own.pad_token is None
    with monkeypatch.context() as patch:
        patch.setattr(type(given), "forward", lambda *args, **kwargs: pytest.fail("it was computed again"))
        assert evaluate(ModelSpec(given, tokenizer=own), cache) == found
    with torch.no_grad():  # other rows, with the sum of all weights as it was
        given.lm_head.weight.copy_(given.lm_head.weight.roll(1, 0))
    assert EvaluatedModel("m", ModelSpec(given, tokenizer=own), cache).fingerprint not in (
        EvaluatedModel("m", ModelSpec(copy.deepcopy(given), tokenizer=llama, template="plain"), cache).fingerprint,
        EvaluatedModel("m", ModelSpec(AutoModelForCausalLM.from_pretrained(llama), tokenizer=own), cache).fingerprint,
    )
    assert evaluate(ModelSpec(given, tokenizer=own), cache) != found


def test_a_model_that_cannot_be_evaluated_is_refused(llama, reward, tokenizer) -> None:
    with pytest.raises(UserError, match="models: 'm': a Linear is neither a path nor"):
        EvaluatedModel("m", ModelSpec(torch.nn.Linear(2, 2)), NO_CACHE)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the LlamaForCausalLM object is from no folder; give tokenizer="):
        EvaluatedModel("m", ModelSpec(nameless(AutoModelForCausalLM.from_pretrained(llama))), NO_CACHE)
    with pytest.raises(UserError, match="scores text and generates none"):
        evaluate(ModelSpec(reward_object(reward), tokenizer=tokenizer))
    with pytest.raises(UserError, match=r"loading.dtype: the model is an object"):
        EvaluatedModel("m", ModelSpec(AutoModelForCausalLM.from_pretrained(llama), loading=HALF), NO_CACHE)
    for judge in (RewardModelJudge, ToxicityClassifier):
        with pytest.raises(UserError, match=r"loading.dtype: the model is an object"):
            judge(reward_object(reward), loading=HALF, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"loading.dtype: the model is an object"):
        HuggingFaceJudge(AutoModelForCausalLM.from_pretrained(llama), loading=HALF).check()
    with pytest.raises(UserError, match="LlamaForCausalLM, not a sequence classifier"):
        ToxicityClassifier(AutoModelForCausalLM.from_pretrained(llama), label="0").check()


HALF = ModelLoadingConfig(dtype=torch.float16)


def test_best_of_n_and_prefixes_by_a_reward_model_in_memory(llama, reward, tokenizer, tmp_path) -> None:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (tmp_path / "few.json").write_text(json.dumps(["w9 ", "w1 w2 "]))

    def run(scorer: Any, path: Any, prefixes: Any, **settings: Any) -> Any:
        best_of, best = BestOf(scorer, n=3, **settings), BestPrefix(scorer, path, max_new_tokens=4, **settings)
        few = EvaluatedModel("few", ModelSpec(llama, prefixes=prefixes, best_prefix=best), NO_CACHE)
        return evaluate(ModelSpec(llama, best_of=best_of)), few.scored_prefixes

    expected = run(reward, str(rows), str(tmp_path / "few.json"))
    assert expected == run(Path(reward), rows, tmp_path / "few.json")
    assert expected == run(reward_object(reward), (row for row in PROMPTS), ["w9 ", "w1 w2 "], tokenizer=tokenizer)
    scalar = load_scalar_model(reward, tokenizer, LOADING)
    assert expected == run(scalar, datasets.Dataset.from_list(PROMPTS), ["w9 ", "w1 w2 "])  # its folder's tokenizer
    assert len({each.score for each in expected[1]}) == 2


def test_judges_in_memory(llama, reward, tokenizer, tmp_path) -> None:
    language = nameless(AutoModelForCausalLM.from_pretrained(llama))
    for one, other in (
        (RewardModelJudge(reward), RewardModelJudge(reward_object(reward), tokenizer=tokenizer)),
        (RewardModelJudge(reward), RewardModelJudge(load_scalar_model(reward, tokenizer, LOADING))),
    ):
        other.check()
        preferences, own = (
            [verdicts[0].preference for verdicts in judge.compare(PAIRS, NO_CACHE)] for judge in (one, other)
        )
        assert preferences == own and len(set(own)) == 2
    judge, reference = HuggingFaceJudge(language, tokenizer=tokenizer), HuggingFaceJudge(llama)
    judge.check()
    assert [each[0].preference for each in judge.compare(PAIRS, NO_CACHE)] == [
        each[0].preference for each in reference.compare(PAIRS, NO_CACHE)
    ]
    odds = [compute_log_odds(each.spec, ["w1", "w2 w3"], ("w4", "w5"), NO_CACHE) for each in (judge, reference)]
    assert odds[0] == odds[1] and min(map(abs, odds[0])) > 0
    truth = HuggingFaceTruthJudge(language, AutoModelForCausalLM.from_pretrained(llama), tokenizer=tokenizer)
    truth.check()
    assert truth.judge(CLAIMS, NO_CACHE) == HuggingFaceTruthJudge(llama, llama).judge(CLAIMS, NO_CACHE)
    texts = ["w1 w2", "w3", "w4 w5 w6"]
    given = reward_object(reward)
    settings: dict[str, Any] = {"label": "0", "tokenizer": tokenizer}
    expected = ToxicityClassifier(reward, "0").score(texts, NO_CACHE)
    assert ToxicityClassifier(given, **settings).score(texts, NO_CACHE) == pytest.approx(expected, abs=1e-6)
    pipe = pipeline("text-classification", model=given, tokenizer=tokenizer, device="cpu")
    assert ToxicityClassifier(pipe, "0").score(texts, NO_CACHE) == pytest.approx(expected, abs=1e-6)
    assert KeywordToxicity([" W3\n"]).score(texts, NO_CACHE) == [0.0, 1.0, 0.0]
    assert KeywordToxicity([]).score(["stupid"], NO_CACHE) == [0.0]


def test_a_score_is_of_the_weights_that_a_model_has_now(reward, tokenizer, tmp_path) -> None:
    given, cache = reward_object(reward), Cache(tmp_path / "cache", progress=False)
    scorer = RewardScorer(given, tokenizer=tokenizer)
    texts = [ScoredText("w1 ", Completion("w2", True, 2))]
    before = scorer.score(texts, cache)
    assert scorer.score(texts, cache) == before
    assert RewardScorer(reward).score(texts, NO_CACHE) == pytest.approx(before, abs=1e-6)
    with torch.no_grad():
        given.score.weight.mul_(-1.0)
    assert scorer.score(texts, cache) == pytest.approx([-before[0]], abs=1e-6)


@pytest.mark.parametrize("same", ["object", "wrapped", "weights"])
def test_the_reward_model_of_a_policy_is_no_judge_of_it(same, llama, reward, tokenizer) -> None:
    given = reward_object(reward)
    scalar = load_scalar_model(copy.deepcopy(given), tokenizer, LOADING)
    judge = {"object": given, "wrapped": scalar, "weights": reward_object(reward)}[same]
    models = {"sft": ModelSpec(llama), "ppo": ModelSpec(llama, trained_against=[given])}

    def run(judge: Any, models: dict[str, ModelSpec]) -> Any:
        suite = PairwisePreference(PROMPTS, {"rm": RewardModelJudge(judge, tokenizer=tokenizer)}, 3)
        return suite.check([EvaluatedModel(name, spec, NO_CACHE) for name, spec in models.items()])

    with pytest.raises(UserError, match="is the reward model that 'ppo' was trained against"):
        run(judge, models)
    run(judge, {"sft": ModelSpec(llama)})
    with torch.no_grad():
        judge = reward_object(reward)
        judge.score.weight.add_(1.0)
    run(judge, models)


def test_an_evaluation_without_a_file(llama, reward, tokenizer, tmp_path) -> None:
    language = AutoModelForCausalLM.from_pretrained(llama)
    words = [
        {"sentid": f"cook.{other}.0.{gender}.txt", "sentence": f"w1 w{n} w{m}"}
        for n, gender in enumerate(("male", "female", "neutral"))
        for m, other in enumerate(("guest", "someone"))
    ]
    jobs = [{"occupation": "cook", "bls_pct_female": 40}]
    sentiment = [{"text": "w1", "label": 1}, {"text": "w2", "label": 0}]

    def suites(rows: Any) -> dict[str, Any]:
        judge = RewardModelJudge(reward_object(reward), tokenizer=tokenizer)
        return {
            "preference": PairwisePreference(rows(PROMPTS), {"rm": judge}, 3, annotation_dir=tmp_path / "annotate"),
            "bias": Winogender(rows(words), rows(jobs), ["basic"]),
            "benchmarks": Benchmarks([Benchmark("sst", rows(sentiment), [0, 1], rows(sentiment))]),
        }

    def run(models: dict[str, ModelSpec], rows: Any, out: Any) -> Any:
        report = Evaluation(models, "sft", suites(rows), out, progress=False).run()
        return json.loads(json.dumps(report))["suites"], report["models"]

    def write(rows: list[dict[str, Any]]) -> str:
        path = tmp_path / f"{hash(json.dumps(rows))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    files, _ = run({"sft": ModelSpec(llama), "other": ModelSpec(llama, prefix="w9 ")}, write, str(tmp_path / "one"))
    given = {"sft": ModelSpec(language), "other": ModelSpec(language, prefix="w9 ")}
    memory, models = run(given, datasets.Dataset.from_list, tmp_path / "two")
    lists, _ = run(given, lambda rows: (dict(row) for row in rows), tmp_path / "three")
    assert files == memory == lists
    assert models["sft"]["path"] == llama and models["sft"]["fingerprint"].startswith("object ")
    assert list((tmp_path / "annotate").glob("other-*.jsonl"))


def test_documents_of_benchmarks_in_memory(tmp_path) -> None:
    question = {"question": "w1", "answers": [{"text": "w2"}]}
    articles = [{"title": "w3", "paragraphs": [{"context": "w4", "qas": [question]}]}]
    (tmp_path / "squad.json").write_text(json.dumps({"data": articles}))
    expected = readers.squad(str(tmp_path / "squad.json"))
    assert expected == readers.squad(articles) == readers.squad({"data": articles})
    passages = {"p": {"passage": "w1", "qa_pairs": [{"question": "w2", "answer": {"number": "3"}}]}}
    (tmp_path / "drop.json").write_text(json.dumps(passages))
    assert readers.drop(passages) == readers.drop(str(tmp_path / "drop.json"))
    with pytest.raises(UserError, match="rows: not in DROP's format"):
        readers.drop([passages["p"]])
    pairs = [{"fr": "w1", "en": "w2"}]
    assert readers.translation(pairs)["test"] == [{"french": "w1", "english": "w2"}]
    with pytest.raises(UserError, match="tasks: 'rows' holds no row"):
        readers.squad({"data": []})
