"""The paper's evaluation: suites, and the judges and scorers that are their plug-ins."""

from lit_rlhf.evaluation.judges.chat_completions import ChatCompletions
from lit_rlhf.evaluation.judges.human_labels import HumanLabels
from lit_rlhf.evaluation.judges.judging_types import CompletionPair, Judge, RatedItem, Rating, Verdict
from lit_rlhf.evaluation.judges.preference import EndpointJudge, HuggingFaceJudge, RewardModelJudge
from lit_rlhf.evaluation.judges.toxicity import KeywordToxicity, Perspective, ToxicityClassifier, ToxicityScorer
from lit_rlhf.evaluation.judges.truth import (
    Claim,
    EndpointTruthJudge,
    HuggingFaceTruthJudge,
    ReferenceTruthJudge,
    TruthJudge,
    TruthVerdict,
)
from lit_rlhf.evaluation.models.evaluated_model import BestOf, EvaluatedModel, ModelSpec
from lit_rlhf.evaluation.models.generation import Completion
from lit_rlhf.evaluation.models.prefixes import BestPrefix
from lit_rlhf.evaluation.results import MetricValue, Suite, SuiteResult
from lit_rlhf.evaluation.suites.benchmarks import Benchmark, Benchmarks
from lit_rlhf.evaluation.suites.bias import CrowSPairs, Winogender
from lit_rlhf.evaluation.suites.preference import PairwisePreference
from lit_rlhf.evaluation.suites.toxicity import RealToxicityPrompts
from lit_rlhf.evaluation.suites.truthfulness import TruthfulQA

__all__ = [
    "Benchmark",
    "Benchmarks",
    "BestOf",
    "BestPrefix",
    "ChatCompletions",
    "Claim",
    "Completion",
    "CompletionPair",
    "CrowSPairs",
    "EndpointJudge",
    "EndpointTruthJudge",
    "EvaluatedModel",
    "HuggingFaceJudge",
    "HuggingFaceTruthJudge",
    "HumanLabels",
    "Judge",
    "KeywordToxicity",
    "MetricValue",
    "ModelSpec",
    "PairwisePreference",
    "Perspective",
    "RatedItem",
    "Rating",
    "RealToxicityPrompts",
    "ReferenceTruthJudge",
    "RewardModelJudge",
    "Suite",
    "SuiteResult",
    "ToxicityClassifier",
    "ToxicityScorer",
    "TruthJudge",
    "TruthVerdict",
    "TruthfulQA",
    "Verdict",
    "Winogender",
]
