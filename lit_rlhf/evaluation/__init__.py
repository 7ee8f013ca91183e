"""The paper's evaluation: suites, and the judges and scorers that they take as plug-ins."""

from lit_rlhf.evaluation.benchmarks import Benchmark, Benchmarks
from lit_rlhf.evaluation.bias import CrowSPairs, Winogender
from lit_rlhf.evaluation.comparison import Item, Judge, Opinion, Pair, Rater, Rating
from lit_rlhf.evaluation.endpoints import Endpoint
from lit_rlhf.evaluation.findings import Figure, Findings, Suite
from lit_rlhf.evaluation.human_labels import HumanLabels
from lit_rlhf.evaluation.judges import EndpointJudge, HuggingFaceJudge, RewardModelJudge
from lit_rlhf.evaluation.preference_suite import Preference
from lit_rlhf.evaluation.prefixes import BestPrefix
from lit_rlhf.evaluation.subjects import BestOf, Candidate, Subject
from lit_rlhf.evaluation.toxicity import RealToxicityPrompts
from lit_rlhf.evaluation.toxicity_scorers import Classifier, Perspective, ToxicityScorer, WordList
from lit_rlhf.evaluation.truth_judges import Claim, EndpointTruth, HuggingFaceTruth, ReferenceTruth, Truth, TruthJudge
from lit_rlhf.evaluation.truthfulness import TruthfulQA

__all__ = [
    "Benchmark",
    "Benchmarks",
    "BestOf",
    "BestPrefix",
    "Candidate",
    "Claim",
    "Classifier",
    "CrowSPairs",
    "Endpoint",
    "EndpointJudge",
    "EndpointTruth",
    "Figure",
    "Findings",
    "HuggingFaceJudge",
    "HuggingFaceTruth",
    "HumanLabels",
    "Item",
    "Judge",
    "Opinion",
    "Pair",
    "Perspective",
    "Preference",
    "Rater",
    "Rating",
    "RealToxicityPrompts",
    "ReferenceTruth",
    "RewardModelJudge",
    "Subject",
    "Suite",
    "ToxicityScorer",
    "Truth",
    "TruthJudge",
    "TruthfulQA",
    "Winogender",
    "WordList",
]
