"""The paper's evaluation: suites, and the judges and scorers that are their plug-ins.

Names are imported on first use: a module of arithmetic alone can be imported from here without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_rlhf.importing import import_public_name

if TYPE_CHECKING:
    from lit_rlhf.evaluation.judges.chat_completions import ChatCompletions
    from lit_rlhf.evaluation.judges.human_labels import HumanLabels
    from lit_rlhf.evaluation.judges.judging_types import CompletionPair, Judge, RatedItem, Rating, Verdict
    from lit_rlhf.evaluation.judges.preference import EndpointJudge, HuggingFaceJudge, RewardModelJudge
    from lit_rlhf.evaluation.judges.toxicity import (
        KeywordToxicity,
        Perspective,
        ProfanityClassifier,
        ToxicityClassifier,
        ToxicityScorer,
    )
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
    from lit_rlhf.evaluation.run import Evaluation
    from lit_rlhf.evaluation.suites.benchmarks import Benchmark, Benchmarks
    from lit_rlhf.evaluation.suites.bias import CrowSPairs, Winogender
    from lit_rlhf.evaluation.suites.preference import PairwisePreference
    from lit_rlhf.evaluation.suites.sample_scores import SampleScores
    from lit_rlhf.evaluation.suites.text_loss import TextLoss
    from lit_rlhf.evaluation.suites.toxicity import RealToxicityPrompts
    from lit_rlhf.evaluation.suites.truthfulness import TruthfulQA

_MODULES = {
    "judges.chat_completions": ("ChatCompletions",),
    "judges.human_labels": ("HumanLabels",),
    "judges.judging_types": (
        "CompletionPair",
        "Judge",
        "RatedItem",
        "Rating",
        "Verdict",
    ),
    "judges.preference": (
        "EndpointJudge",
        "HuggingFaceJudge",
        "RewardModelJudge",
    ),
    "judges.toxicity": (
        "KeywordToxicity",
        "Perspective",
        "ProfanityClassifier",
        "ToxicityClassifier",
        "ToxicityScorer",
    ),
    "judges.truth": (
        "Claim",
        "EndpointTruthJudge",
        "HuggingFaceTruthJudge",
        "ReferenceTruthJudge",
        "TruthJudge",
        "TruthVerdict",
    ),
    "models.evaluated_model": (
        "BestOf",
        "EvaluatedModel",
        "ModelSpec",
    ),
    "models.generation": ("Completion",),
    "models.prefixes": ("BestPrefix",),
    "results": (
        "MetricValue",
        "Suite",
        "SuiteResult",
    ),
    "run": ("Evaluation",),
    "suites.benchmarks": (
        "Benchmark",
        "Benchmarks",
    ),
    "suites.bias": (
        "CrowSPairs",
        "Winogender",
    ),
    "suites.preference": ("PairwisePreference",),
    "suites.sample_scores": ("SampleScores",),
    "suites.text_loss": ("TextLoss",),
    "suites.toxicity": ("RealToxicityPrompts",),
    "suites.truthfulness": ("TruthfulQA",),
}

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
    "Evaluation",
    "HuggingFaceJudge",
    "HuggingFaceTruthJudge",
    "HumanLabels",
    "Judge",
    "KeywordToxicity",
    "MetricValue",
    "ModelSpec",
    "PairwisePreference",
    "Perspective",
    "ProfanityClassifier",
    "RatedItem",
    "Rating",
    "RealToxicityPrompts",
    "ReferenceTruthJudge",
    "RewardModelJudge",
    "SampleScores",
    "Suite",
    "SuiteResult",
    "TextLoss",
    "ToxicityClassifier",
    "ToxicityScorer",
    "TruthJudge",
    "TruthVerdict",
    "TruthfulQA",
    "Verdict",
    "Winogender",
]


def __getattr__(name: str) -> Any:
    return import_public_name(__name__, _MODULES, name)
