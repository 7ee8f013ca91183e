"""What `lit-rlhf real` measures itself: reward models on held-out rankings, training steps, and the machine."""

import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.commands.support.real_data import RealDataSizes
from lit_rlhf.data.collation import collate_rankings
from lit_rlhf.data.comparisons import tokenize_rankings
from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.records import Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows
from lit_rlhf.data.truncation import TruncationPolicy
from lit_rlhf.evaluation.reward_model_metrics import ScoredRankings, compute_reward_model_metrics
from lit_rlhf.lineage.environment import read_versions
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora
from lit_rlhf.models.scalar_model import load_scalar_model
from lit_rlhf.packing.rankings import RankingInputs

PAD_TOKEN = "<|endoftext|>"  # of SmolLM2; its own is its end token
TIMED_SHAPE = (4, 96)  # sequences and tokens of the step that decides the precision
TIMED_SHORT = 32  # tokens of the step before
SCORED_RANKINGS = 8  # of a forward pass


def measure_reward_model(folder: Path, files: Mapping[str, Path], sizes: RealDataSizes) -> dict[str, Any]:
    """Return the metrics of a reward model on rankings.

    Args:
        folder: of the reward model.
        files: name -> rankings.
        sizes: with the length limits.
    """
    tokenizer = load_tokenizer(str(folder), ModelLoadingConfig())
    model = load_scalar_model(str(folder), tokenizer, ModelLoadingConfig()).eval()
    limits = TruncationPolicy(sizes.max_prompt_tokens, sizes.max_ranked_tokens + 1)
    found = {}
    for name, path in files.items():
        report = DatasetReport(str(path))
        records = read_records(read_rows(path), "ranking", Ranking, "auto", report)
        rankings = tokenize_rankings(records, PromptTemplate(tokenizer, "chat"), limits, report)
        rankings.sort(key=lambda ranking: len(ranking.prompt) + max(map(len, ranking.completions)))
        parts = []
        for start in range(0, len(rankings), SCORED_RANKINGS):
            batch = collate_rankings(rankings[start : start + SCORED_RANKINGS], 1.0, tokenizer.pad_token_id)
            rows = RankingInputs(batch.input_ids, batch.attention_mask, batch.prompt_length, batch.ranking_index)
            lengths = rows.length - rows.prompt_length
            with torch.no_grad():
                scores = model.score_rankings(rows)
            parts.append(ScoredRankings(scores, start + batch.ranking_index, batch.ranks, lengths))
        scored = ScoredRankings(*(torch.cat(column) for column in zip(*parts, strict=True)))
        metrics = compute_reward_model_metrics(scored)
        shown = ("rankings", "pairs", "accuracy", "calibration_error", "log_loss", "score", "reliability")
        found[name] = {key: metrics[key] for key in shown if key in metrics}
    return found


def time_training_steps(folder: Path, has_adapters: bool, repeats: int = 2) -> dict[str, float]:
    """Return the tokens per second of forward and backward pass of the language model in each precision.

    Args:
        folder: of the model.
        has_adapters: whether LoRA is trained, or all weights.
        repeats: the fastest of so many counts, after two short ones, which decide where they differ by far.
    """
    loading = ModelLoadingConfig(pad_token=PAD_TOKEN)
    tokenizer = load_tokenizer(str(folder), loading)
    model = load_causal_lm(str(folder), tokenizer, loading)
    if has_adapters:
        add_lora(model, LoRA())
    ids = torch.randint(0, len(tokenizer), TIMED_SHAPE, generator=torch.Generator().manual_seed(0))

    def measure_speed(precision: str, ids: Tensor, repeats: int) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            model.zero_grad()
            seconds.append(time.perf_counter() - start)
        return ids.numel() / min(seconds)

    precisions = ("32-true", "bf16-mixed")
    # where products in bfloat16 are emulated, a whole step in it takes minutes
    speeds = {precision: measure_speed(precision, ids[:1, :TIMED_SHORT], 2) for precision in precisions}
    if max(speeds.values()) > 4 * min(speeds.values()):
        return speeds
    return {precision: measure_speed(precision, ids, repeats) for precision in precisions}


def read_machine() -> dict[str, str]:
    """Return the versions of Python and packages, the processor and the number of threads."""
    found = {"processor": read_processor(), "threads": str(torch.get_num_threads())}
    return found | read_versions(("lit-rlhf", "torch", "lightning", "transformers"))


def read_processor() -> str:
    """Return the name of the GPU, or else of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
