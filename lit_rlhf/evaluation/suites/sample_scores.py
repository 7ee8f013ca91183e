"""Scores of a model's samples by reward models, and the KL that they cost (Gao et al., 2022)."""

from collections.abc import Mapping, Sequence

import torch

from lit_rlhf.data.records import PromptRow
from lit_rlhf.data.sources import DataSource, held_rows
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel
from lit_rlhf.evaluation.models.generation import Completion
from lit_rlhf.evaluation.models.reward_scorer import RewardScorer, render_scored_texts
from lit_rlhf.evaluation.prompts import read_prompt_rows
from lit_rlhf.evaluation.results import MetricValue, Suite, SuiteResult, compute_mean_metric, compute_paired_metric
from lit_rlhf.evaluation.suites.bias import limit_rows
from lit_rlhf.evaluation.suites.preference import NOISE_KEY
from lit_rlhf.functional import best_of_n_kl
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.importing import Function
from lit_rlhf.models.given import TokenizerSource
from lit_rlhf.models.scalar_model import ScalarSource


class SampleScores(Suite):
    """Mean score of one sample per prompt by each reward model, KL to the baseline, length, and how many end.

    The KL is the mean of log π - log π_baseline over the samples, in nats per response; of best-of-n it is the upper
    bound log n - (n - 1) / n (Beirami et al., 2024). The samples are those of `PairwisePreference` with the same
    settings, so that both suites generate them once.

    Args:
        path: prompts in any format that `PromptDataModule` reads.
        rewards: name -> folder or hub name of a reward model, or the model.
        max_new_tokens: maximum tokens of a sample, at temperature 1.
        template: prompt template of the reward models' training.
        format: of the data file.
        limit: use the first so many prompts; None for all.
        tokenizer: of the reward models; by default that of each one's folder.
    """

    def __init__(
        self,
        path: DataSource,
        rewards: Mapping[str, ScalarSource],
        max_new_tokens: int = 256,
        template: str | None = None,
        format: str | Function = "auto",
        limit: int | None = None,
        tokenizer: TokenizerSource | None = None,
    ) -> None:
        if not rewards:
            raise UserError("sample scores: it needs at least one reward model")
        self.path, self.format, self.limit = held_rows(path), format, limit
        self.sampling = SamplingParams(max_new_tokens, 1.0)
        self.scorers = {
            name: RewardScorer(model, template=template, tokenizer=tokenizer) for name, model in rewards.items()
        }

    def check(self, models: Sequence[EvaluatedModel]) -> None:
        """See `Suite.check`."""
        self._read_prompts()
        for scorer in self.scorers.values():
            scorer.check()

    def _read_prompts(self) -> tuple[list[PromptRow], list[str]]:
        """Return the prompts, and notes on the rows."""
        records, notes = read_prompt_rows(self.path, self.format)
        return limit_rows(records, self.limit), notes

    def run(self, model: EvaluatedModel, baseline: EvaluatedModel) -> SuiteResult:
        """See `Suite.run`."""
        records, notes = self._read_prompts()
        prompts = [model.template.render(record.prompt, record.fields, record.origin) for record in records]
        prompts = model.prepend_prefix(prompts)
        completions = model.generate(prompts, self.sampling, (NOISE_KEY, 1), ())
        metrics: dict[str, MetricValue] = {}
        for name, scorer in self.scorers.items():
            stripped = [completion._replace(text=completion.text.strip()) for completion in completions]
            scores = scorer.score_finite(render_scored_texts(scorer.template, records, stripped), model.cache)
            metrics[f"{name} score"] = compute_paired_metric(scores, "points")
        metrics["KL"] = self._compute_kl(model, baseline, prompts, completions)
        lengths = [float(completion.num_tokens) for completion in completions]
        metrics["length"] = compute_paired_metric(lengths, "tokens", "")
        metrics["ended"] = compute_paired_metric([float(completion.finished) for completion in completions])
        return SuiteResult(metrics, len(records), notes)

    def _compute_kl(
        self, model: EvaluatedModel, baseline: EvaluatedModel, prompts: list[str], completions: list[Completion]
    ) -> MetricValue:
        best_of = model.spec.best_of
        if best_of is not None:
            bound = float(best_of_n_kl(torch.tensor(best_of.n)))
            return MetricValue(bound, len(prompts), unit="nats", better="")
        replies = [completion.text + completion.end for completion in completions]
        pairs = [(prompt, reply) for prompt, reply in zip(prompts, replies) if reply]
        own = model.compute_loglikelihoods(pairs)
        theirs = baseline.compute_loglikelihoods(pairs)
        if baseline is not model:
            baseline.release()
        return compute_mean_metric([mine.logprob - other.logprob for mine, other in zip(own, theirs)], "nats", "")
