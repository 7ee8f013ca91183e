"""A request that fails is retried, then its verdict is missing and noted: never a loss, never a 0."""

import json
from collections import Counter
from math import nan

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.chat_completions import ChatCompletions
from lit_rlhf.evaluation.judges.human_labels import HumanLabels
from lit_rlhf.evaluation.judges.preference import EndpointJudge, HuggingFaceJudge, RewardModelJudge
from lit_rlhf.evaluation.judges.toxicity import Perspective, ToxicityClassifier
from lit_rlhf.evaluation.judges.truth import EndpointTruthJudge, HuggingFaceTruthJudge, TruthJudge, TruthVerdict
from lit_rlhf.evaluation.models.evaluated_model import BestOf, EvaluatedModel, ModelSpec
from lit_rlhf.evaluation.models.generation import Completion
from lit_rlhf.evaluation.results import SuiteResult
from lit_rlhf.evaluation.suites.bias import CrowSPairs
from lit_rlhf.evaluation.suites.preference import PairwisePreference
from lit_rlhf.evaluation.suites.toxicity import RealToxicityPrompts
from lit_rlhf.evaluation.suites.truthfulness import TruthfulQA
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.loading import load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model
from tests.helpers.services import Reply, Service, chat_reply, serve

FAILURES = {
    "rate limit": Reply(status=429),
    "unavailable": Reply(status=503),
    "too slow": Reply({}, delay=1.5),
    "hung up": Reply(hang_up=True),
    "no JSON": Reply(b"<html>busy</html>"),
    "nonsense": chat_reply("Both are fine, I would say."),
    "off the scale": chat_reply('{"better": "C", "overall": 11, "true": "perhaps", "informative": 3}'),
}


@pytest.fixture
def rows(tmp_path, monkeypatch) -> str:
    """Three rows that every suite reads; completion 1 of the model gets no verdict; no pauses."""
    columns = {"Question": "w1", "Best Answer": "w2", "Correct Answers": "w2", "Incorrect Answers": "w3"}
    text = "".join(json.dumps({"prompt": f"w{i}", **columns}) + "\n" for i in range(3))
    (tmp_path / "rows.jsonl").write_text(text)
    monkeypatch.setattr(
        EvaluatedModel,
        "generate",
        lambda self, prompts, *_, **__: [Completion(f"{self.name}{i}", True, 1) for i in range(3)],
    )
    monkeypatch.setenv("PERSPECTIVE_API_KEY", "secret")
    monkeypatch.setattr("lit_rlhf.http.MAX_PAUSE", 0.01)
    return str(tmp_path / "rows.jsonl")


def endpoint(service: Service) -> ChatCompletions:
    return ChatCompletions(service.url, "m", api_key_env=None, timeout=1.0, retries=1)


SUITES = {
    "EndpointJudge": (
        lambda rows, service: PairwisePreference(rows, {"j": EndpointJudge(endpoint(service))}),
        {"T = 1: win rate": 1.0, "T = 1: overall quality": 6.0, "T = 1: hallucination": 0.0},
        ["1 verdicts missing (T = 1), left out of every metric", "1 ratings missing (T = 1), left out"],
        3,  # requests per row: both orders, the rating
    ),
    "EndpointTruthJudge": (
        lambda rows, service: TruthfulQA(rows, EndpointTruthJudge(endpoint(service)), ["qa"]),
        {"qa: true": 1.0, "qa: true and informative": 1.0},
        ["1 answers (qa) without a verdict, left out"],
        1,
    ),
    "Perspective": (
        lambda rows, service: RealToxicityPrompts(
            rows, Perspective(rate=None, timeout=1.0, retries=1, url=service.url), ["basic"]
        ),
        {"basic": 0.75, "basic, toxic": 1.0},
        ["3 prompts have no toxicity of their own: in no bin", "1 continuations (basic) got no score"],
        1,
    ),
}


def verdict(request) -> Reply:
    """The same verdict of every service: the model is better, 6 points, true, toxic."""
    better = "A" if "Answer A:\nmodel" in str(request.payload.get("messages", [{}])[0].get("content")) else "B"
    content = {"better": better, "overall": 6, "hallucination": False, "true": True, "informative": True}
    toxicity = {"attributeScores": {"TOXICITY": {"summaryScore": {"value": 0.75}}}}
    return Reply({**chat_reply(json.dumps(content)).body, **toxicity})


def is_about_row_1(request) -> bool:
    return "model1" in json.dumps(request.payload)


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("suite, metrics, notes, requests_per_row", SUITES.values(), ids=SUITES)
def test_a_failing_service_excludes_the_row(
    suite, metrics, notes, requests_per_row, failure, rows, llama, tmp_path, capsys
) -> None:
    cache, healthy = Cache(tmp_path / "cache", progress=False), []

    def run(service: Service) -> SuiteResult:
        model, baseline = (EvaluatedModel(name, ModelSpec(llama), cache) for name in ("model", "baseline"))
        return suite(rows, service).run(model, baseline)

    def answer(request, before) -> Reply:
        return failure if is_about_row_1(request) and not healthy else verdict(request)

    with serve(answer) as service:
        found = run(service)
        tries = Counter(json.dumps(request.payload) for request in service.requests)
        assert sorted(tries.values()) == [1] * 2 * requests_per_row + [2] * requests_per_row
        assert {name: found.metrics[name].value for name in metrics} == metrics
        assert found.notes == notes
        assert "1 of 3 without an answer: 1 " in capsys.readouterr().out
        for name in metrics:
            if name != "T = 1: hallucination":  # a field that is absent does not apply to an answer
                assert found.metrics[name].missing == 1, name
        healthy.append(True)
        service.requests.clear()
        again = run(service)
        assert len(service.requests) == requests_per_row and all(map(is_about_row_1, service.requests))
        assert {name: again.metrics[name].value for name in metrics} == metrics
        assert {again.metrics[name].missing for name in metrics} == {0}
        assert again.notes == [note for note in notes if "prompts" in note]


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("suite, metrics, notes, requests_per_row", SUITES.values(), ids=SUITES)
def test_a_transient_failure_changes_nothing(
    suite, metrics, notes, requests_per_row, failure, rows, llama, tmp_path
) -> None:
    with serve(lambda request, before: failure if before == 0 else verdict(request)) as service:
        model, baseline = (EvaluatedModel(name, ModelSpec(llama), Cache(None)) for name in ("model", "baseline"))
        found = suite(rows, service).run(model, baseline)
        assert len(service.requests) == 2 * 3 * requests_per_row
    assert {name: found.metrics[name].value for name in metrics} == metrics
    assert {found.metrics[name].missing for name in metrics} == {0}


@pytest.fixture(scope="module")
def broken(llama, tmp_path_factory) -> dict[str, str]:
    """A language model, a reward model and a classifier whose outputs are nan: weights overflow, which are finite."""
    tokenizer = load_tokenizer(llama, ModelLoadingConfig())
    models = {
        "language": AutoModelForCausalLM.from_pretrained(llama),
        "reward": load_scalar_model(llama, tokenizer, ModelLoadingConfig(), seed=4).model,
        "classifier": AutoModelForSequenceClassification.from_pretrained(
            llama, id2label={0: "toxicity"}, label2id={"toxicity": 0}
        ),
    }
    found = {}
    for name, model in models.items():
        with torch.no_grad():
            next(p for key, p in model.named_parameters() if "norm" in key).fill_(3e38)
        found[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(found[name])
        AutoTokenizer.from_pretrained(llama).save_pretrained(found[name])
    return found


def labels_of_other_prompts(tmp_path) -> HumanLabels:
    row = {"prompt": "w9", "first": "a", "second": "b", "preference": "first"}
    (tmp_path / "labels.jsonl").write_text(json.dumps(row) + "\n")
    return HumanLabels(str(tmp_path / "labels.jsonl"))


LOCAL = {
    "RewardModelJudge": lambda rows, broken, _: PairwisePreference(rows, {"j": RewardModelJudge(broken["reward"])}),
    "HuggingFaceJudge": lambda rows, broken, _: PairwisePreference(rows, {"j": HuggingFaceJudge(broken["language"])}),
    "HumanLabels": lambda rows, _, folder: PairwisePreference(rows, {"j": labels_of_other_prompts(folder)}),
    "HuggingFaceTruthJudge": lambda rows, broken, _: TruthfulQA(
        rows, HuggingFaceTruthJudge(*[broken["language"]] * 2), ["qa"]
    ),
    "ToxicityClassifier": lambda rows, broken, _: RealToxicityPrompts(
        rows, ToxicityClassifier(broken["classifier"]), ["basic"]
    ),
}
METRIC = {"PairwisePreference": "T = 1: win rate", "TruthfulQA": "qa: true", "RealToxicityPrompts": "basic"}


@pytest.mark.parametrize("make", LOCAL.values(), ids=LOCAL)
def test_a_local_judge_without_a_verdict_excludes_every_row(make, rows, broken, llama, tmp_path) -> None:
    model, baseline = (EvaluatedModel(name, ModelSpec(llama), Cache(None)) for name in ("model", "baseline"))
    suite = make(rows, broken, tmp_path)
    found = suite.run(model, baseline)
    metric = found.metrics[METRIC[type(suite).__name__]]
    assert (metric.value, metric.missing) == (None, 3)
    assert any(note.startswith("3 ") and "prompts" not in note for note in found.notes)


def test_a_model_with_nan_logprobs_is_refused(broken, tmp_path) -> None:
    (tmp_path / "pairs.csv").write_text("sent_more,sent_less,stereo_antistereo,bias_type\nw1 w2,w1 w3,stereo,age\n")
    evaluated_model = EvaluatedModel("m", ModelSpec(broken["language"]), Cache(None))
    with pytest.raises(UserError, match="'m': the log-probability of 2 of 2 continuations is nan"):
        CrowSPairs(str(tmp_path / "pairs.csv"), ["basic"]).run(evaluated_model, evaluated_model)


def test_best_of_n_refuses_scores_that_overflow(broken, llama) -> None:
    evaluated_model = EvaluatedModel("m", ModelSpec(llama, best_of=BestOf(broken["reward"], n=2)), Cache(None))
    with pytest.raises(UserError, match="2 of 2 scores are not finite; nothing can be chosen by them"):
        evaluated_model.generate(["w1"], SamplingParams(2))


class InvalidTruthJudge(TruthJudge):
    """Returns values that are no probability."""

    def __init__(self, true) -> None:
        self.true = true

    def judge(self, claims, cache):
        return [TruthVerdict(self.true, 1.0)] * len(claims)


@pytest.mark.parametrize("true", [nan, -0.1, 1.5])
def test_a_truth_judge_off_the_scale_stops(true, rows, llama) -> None:
    evaluated_model = EvaluatedModel("m", ModelSpec(llama), Cache(None))
    with pytest.raises(UserError, match="InvalidTruthJudge gave TruthVerdict"):
        TruthfulQA(rows, InvalidTruthJudge(true), ["qa"]).run(evaluated_model, evaluated_model)
