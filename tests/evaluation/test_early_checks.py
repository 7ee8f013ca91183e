"""Missing files, models and keys of judges, scorers and tasks are reported before a model is loaded."""

import json

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.judges.chat_completions import ChatCompletions
from lit_rlhf.evaluation.judges.human_labels import HumanLabels
from lit_rlhf.evaluation.judges.judging_types import Judge
from lit_rlhf.evaluation.judges.preference import EndpointJudge, HuggingFaceJudge, RewardModelJudge
from lit_rlhf.evaluation.judges.toxicity import KeywordToxicity, Perspective, ToxicityClassifier
from lit_rlhf.evaluation.judges.truth import EndpointTruthJudge, HuggingFaceTruthJudge, TruthJudge
from lit_rlhf.evaluation.models.evaluated_model import BestOf, ModelSpec
from lit_rlhf.evaluation.run import Evaluation
from lit_rlhf.evaluation.suites.benchmarks import Benchmark, Benchmarks
from lit_rlhf.evaluation.suites.preference import PairwisePreference
from lit_rlhf.evaluation.suites.toxicity import RealToxicityPrompts
from lit_rlhf.evaluation.suites.truthfulness import TruthfulQA

ADDRESS = "http://127.0.0.1:9/v1"
NO_FOLDER = "there is no folder './no'"
NO_KEY = "the environment variable NO_KEY holds no key"
CASES = {
    "EndpointJudge": (lambda: EndpointJudge(ChatCompletions(ADDRESS, "m", api_key_env="NO_KEY")), NO_KEY),
    "RewardModelJudge": (lambda: RewardModelJudge("./no"), NO_FOLDER),
    "HuggingFaceJudge": (lambda: HuggingFaceJudge("./no"), NO_FOLDER),
    "HumanLabels": (lambda: HumanLabels("rws.jsonl"), r"no data file 'rws\.jsonl' \(did you mean 'rows\.jsonl'\?\)"),
    "EndpointTruthJudge": (
        lambda: EndpointTruthJudge(ChatCompletions("ftp://x", "m", api_key_env=None)),
        "is no http or https address",
    ),
    "HuggingFaceTruthJudge": (lambda: HuggingFaceTruthJudge("./no", "./no"), NO_FOLDER),
    "Perspective": (lambda: Perspective(api_key_env="NO_KEY"), NO_KEY),
    "ToxicityClassifier": (lambda: ToxicityClassifier("./no"), NO_FOLDER),
    "KeywordToxicity": (lambda: KeywordToxicity("rws.jsonl"), "no data file 'rws.jsonl'"),
    "a task's file": (lambda: Benchmark("rte", "rws.jsonl"), "no data file 'rws.jsonl'"),
    "a task's shots": (lambda: Benchmark("rte", "rte.jsonl", shots_path="rws.jsonl"), "no data file 'rws.jsonl'"),
    "a task's row": (lambda: Benchmark("sst", "rows.jsonl"), r"rows\.jsonl:1: label is 7"),
}


def suite_with(plugin):
    """A suite with the given judge, scorer or benchmark."""
    if isinstance(plugin, Benchmark):
        return Benchmarks([plugin])
    if isinstance(plugin, Judge):
        return PairwisePreference("rows.jsonl", {"j": plugin})
    if isinstance(plugin, TruthJudge):
        return TruthfulQA("rows.jsonl", plugin)
    return RealToxicityPrompts("rows.jsonl", plugin)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> None:
    columns = {"Question": "w1", "Best Answer": "w2", "Correct Answers": "w2", "Incorrect Answers": "w3"}
    columns |= {"premise": "w1", "hypothesis": "w2", "text": "w1", "label": 7, "prompt": "w1"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(columns) + "\n")
    (tmp_path / "rte.jsonl").write_text(json.dumps(columns | {"label": 0}) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "lit_rlhf.evaluation.models.evaluated_model.load_causal_lm", lambda *_: pytest.fail("a model was loaded")
    )


@pytest.mark.parametrize("make, message", CASES.values(), ids=CASES)
def test_a_plugin_is_checked_before_a_model_is_loaded(make, message, folder, llama) -> None:
    with pytest.raises(UserError, match=message):
        Evaluation({"m": ModelSpec(llama)}, "m", {"s": suite_with(make())}, "out", progress=False).run()


def test_the_reward_model_of_best_of_n_is_checked_first(folder, llama) -> None:
    models = {"m": ModelSpec(llama), "best": ModelSpec(llama, best_of=BestOf("./no"))}
    with pytest.raises(UserError, match=NO_FOLDER):
        Evaluation(models, "m", {"s": suite_with(KeywordToxicity())}, "out", progress=False).run()
