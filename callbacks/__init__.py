"""Lightning callbacks: everything besides the loss. They use only Lightning hooks and documented module attributes."""

from lit_rlhf.callbacks.center_scores import CenterScores
from lit_rlhf.callbacks.ema import EMA
from lit_rlhf.callbacks.export_model import ExportModel
from lit_rlhf.callbacks.generate_on_validation import GenerateOnValidation
from lit_rlhf.callbacks.lineage import Lineage
from lit_rlhf.callbacks.log_histograms import LogHistograms
from lit_rlhf.callbacks.log_samples import LogSamples
from lit_rlhf.callbacks.metric_guard import MetricGuard, MetricLimit
from lit_rlhf.callbacks.ppo_invariant_check import PPOInvariantCheck
from lit_rlhf.callbacks.pretraining_mix import PretrainingMix
from lit_rlhf.callbacks.pretraining_validation import PretrainingValidation
from lit_rlhf.callbacks.reward_model_report import RewardModelReport
from lit_rlhf.callbacks.run_state import RunState
from lit_rlhf.callbacks.standardize_scores import StandardizeScores
from lit_rlhf.callbacks.stop_on_signal import StopOnSignal
from lit_rlhf.callbacks.terminate_on_nan import TerminateOnNaN
from lit_rlhf.callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "CenterScores",
    "ExportModel",
    "GenerateOnValidation",
    "Lineage",
    "LogHistograms",
    "LogSamples",
    "MetricGuard",
    "MetricLimit",
    "PPOInvariantCheck",
    "PretrainingMix",
    "PretrainingValidation",
    "RewardModelReport",
    "RunState",
    "StandardizeScores",
    "StopOnSignal",
    "TerminateOnNaN",
    "Throughput",
]
