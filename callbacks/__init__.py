"""What happens beside the loss. A callback talks to a module through Lightning's hooks and documented attributes."""

from lit_rlhf.callbacks.centre_scores import CentreScores
from lit_rlhf.callbacks.continue_run import ContinueRun
from lit_rlhf.callbacks.drift_watch import DriftWatch, Limit
from lit_rlhf.callbacks.ema import EMA
from lit_rlhf.callbacks.export_model import ExportModel
from lit_rlhf.callbacks.pretraining_mix import PretrainingMix
from lit_rlhf.callbacks.pretraining_validation import PretrainingValidation
from lit_rlhf.callbacks.reward_quality import RewardQuality
from lit_rlhf.callbacks.sample_table import SampleTable
from lit_rlhf.callbacks.self_check import SelfCheck
from lit_rlhf.callbacks.standardise_scores import StandardiseScores
from lit_rlhf.callbacks.stop_on_non_finite import StopOnNonFinite
from lit_rlhf.callbacks.stop_on_signal import StopOnSignal
from lit_rlhf.callbacks.throughput import Throughput
from lit_rlhf.callbacks.validation_responses import ValidationResponses

__all__ = [
    "EMA",
    "CentreScores",
    "ContinueRun",
    "DriftWatch",
    "ExportModel",
    "Limit",
    "PretrainingMix",
    "PretrainingValidation",
    "RewardQuality",
    "SampleTable",
    "SelfCheck",
    "StandardiseScores",
    "StopOnNonFinite",
    "StopOnSignal",
    "Throughput",
    "ValidationResponses",
]
