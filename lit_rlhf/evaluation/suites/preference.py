"""Preference suite: a model's completions against the baseline's, by one or more judges (sections 3.6 and 4.1)."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from lit_rlhf.data.records import PromptRow, to_plain_text
from lit_rlhf.data.sources import DataSource, held_rows
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.agreement import compute_agreement, compute_mean_agreement
from lit_rlhf.evaluation.judges.human_labels import write_comparisons
from lit_rlhf.evaluation.judges.judging_types import METADATA_FIELDS, CompletionPair, Judge, RatedItem
from lit_rlhf.evaluation.judges.pairwise import ComparisonResult, compare_completions
from lit_rlhf.evaluation.judges.preference import RewardModelJudge
from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel
from lit_rlhf.evaluation.models.generation import Completion
from lit_rlhf.evaluation.models.prefixes import ScoredPrefix, select_best_prefix
from lit_rlhf.evaluation.models.reward_scorer import check_judge_is_independent
from lit_rlhf.evaluation.prompts import read_prompt_rows
from lit_rlhf.evaluation.results import Better, MetricValue, Suite, SuiteResult, compute_mean_metric, format_count_note
from lit_rlhf.evaluation.suites.bias import limit_rows
from lit_rlhf.evaluation.win_rate import win_rate
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.importing import Function

MAX_SAMPLES = 100
NOISE_KEY = 900  # of the sampling noise


class DecodedPairs(NamedTuple):
    """Completions of the model (first) and of the baseline (second) under one decoding."""

    decoding: str  # "greedy" or "T = ..."
    pairs: list[CompletionPair]


class PairwisePreference(Suite):
    """How often judges prefer a model's completion to the baseline's.

    Args:
        path: prompts in any format that `PromptDataModule` reads.
        judges: by name: simulated labelers, a reward model, a language model, human labels.
        max_new_tokens: maximum tokens of a completion.
        temperatures: decodings to compare, each with the baseline's completions under the same one; 0 is greedy.
        stop_strings: texts at the first of which a completion is truncated.
        group: column of the data file with the use case.
        format: of the data file.
        resample_baseline: sample the baseline's completions with different noise, so that the baseline itself is
            compared like any other model and has a win rate of about 0.5, not exactly.
        annotation_dir: folder to write every comparison into, for human annotation.
        limit: use the first so many prompts; None for all.
    """

    def __init__(
        self,
        path: DataSource,
        judges: dict[str, Judge],
        max_new_tokens: int = 256,
        temperatures: Sequence[float] = (1.0,),
        stop_strings: Sequence[str] = (),
        group: str = "use_case",
        format: str | Function = "auto",
        resample_baseline: bool = False,
        annotation_dir: str | Path | None = None,
        limit: int | None = None,
    ) -> None:
        if not judges or not temperatures:
            raise UserError("preference: it needs at least one judge and one temperature")
        self.path, self.judges, self.group, self.format, self.limit = held_rows(path), judges, group, format, limit
        self.max_new_tokens, self.temperatures, self.stop_strings = max_new_tokens, temperatures, stop_strings
        self.resample_baseline, self.annotation_dir = resample_baseline, annotation_dir

    def check(self, models: Sequence[EvaluatedModel]) -> None:
        """See `Suite.check`."""
        for judge in self.judges.values():
            judge.check()
        self._check_judges_are_independent(models)
        self._read_prompts()

    def _check_judges_are_independent(self, models: Sequence[EvaluatedModel]) -> None:
        trained_against = {model.name: model.trained_against for model in models}
        for judge in self.judges.values():
            if isinstance(judge, RewardModelJudge) and not judge.force:
                check_judge_is_independent(judge.model, trained_against, models[0].cache)

    def run(self, model: EvaluatedModel, baseline: EvaluatedModel) -> SuiteResult:
        """See `Suite.run`."""
        self._check_judges_are_independent([model, baseline])
        records, notes = self._read_prompts()
        metrics: dict[str, MetricValue] = {}
        samples: list[dict[str, Any]] = []
        tables: dict[str, Any] = {"groups": {}, "agreement": {}, "labeler_agreement": {}}
        for temperature in self.temperatures:
            decoded = self._decode_pairs(model, baseline, records, temperature)
            decoding, pairs = decoded
            if self.annotation_dir is not None and model is not baseline:
                write_comparisons(Path(self.annotation_dir) / f"{model.name}-{decoding}.jsonl", pairs)
            num_truncated = sum(pair.first.num_truncated > 0 for pair in pairs)
            note = f"prompts ({decoding}) exceeded the context and were left-truncated"
            notes += format_count_note(num_truncated, note)
            results = {name: compare_completions(judge, pairs, model.cache) for name, judge in self.judges.items()}
            for name, result in results.items():
                label = decoding if len(results) == 1 else f"{decoding}, {name}"
                metrics |= {f"{label}: {key}": metric for key, metric in result.compute_metrics().items()}
                note = f"verdicts missing ({label}), left out of every metric"
                notes += format_count_note(result.num_missing, note)
                tables["groups"][label] = win_rate_by_group(result, pairs, self.group)
                metrics |= self._rate(label, self.judges[name], pairs, model, notes)
            tables["agreement"][decoding] = build_agreement_table(results)
            tables["labeler_agreement"][decoding] = labeler_agreement_by_judge(results)
            samples += build_sample_rows(decoded, results, self.group)
        if model.scored_prefixes:
            tables["prefixes"] = build_prefix_table(model.scored_prefixes)
            notes.append(format_prefix_note(tables["prefixes"]))
            assert model.spec.best_prefix is not None
            notes += [f"prompts of the few-shot prefixes: {note}" for note in model.spec.best_prefix.read_prompts()[1]]
        return SuiteResult(metrics, len(records), notes, samples, tables)

    def _read_prompts(self) -> tuple[list[PromptRow], list[str]]:
        """Return the prompts, and notes on the rows."""
        records, notes = read_prompt_rows(self.path, self.format)
        return limit_rows(records, self.limit), notes

    def _decode_pairs(
        self, model: EvaluatedModel, baseline: EvaluatedModel, records: list[PromptRow], temperature: float
    ) -> DecodedPairs:
        sampling = SamplingParams(self.max_new_tokens, temperature)
        completions = self._complete(model, records, sampling, 1)
        baseline_completions = self._complete(baseline, records, sampling, 0 if self.resample_baseline else 1)
        pairs = [
            CompletionPair(to_plain_text(record.prompt), record.fields, first, second, record.prompt)
            for record, first, second in zip(records, completions, baseline_completions)
        ]
        return DecodedPairs("greedy" if temperature == 0 else f"T = {temperature:g}", pairs)

    def _complete(
        self, model: EvaluatedModel, records: list[PromptRow], sampling: SamplingParams, sample_index: int
    ) -> list[Completion]:
        prompts = [model.template.render(record.prompt, record.fields, record.origin) for record in records]
        prompts = model.prepend_prefix(prompts)
        completions = model.generate(prompts, sampling, (NOISE_KEY, sample_index), self.stop_strings)
        return [completion._replace(text=completion.text.strip()) for completion in completions]

    def _rate(
        self, label: str, judge: Judge, pairs: list[CompletionPair], model: EvaluatedModel, notes: list[str]
    ) -> dict[str, MetricValue]:
        """Return the mean rating and the paper's metadata fields; nothing if the judge does not rate."""
        ratings = judge.rate([RatedItem(pair.prompt, pair.row, pair.first) for pair in pairs], model.cache)
        if ratings is None:
            return {}
        num_missing = sum(rating.overall is None for item_ratings in ratings for rating in item_ratings)
        notes += format_count_note(num_missing, f"ratings missing ({label}), left out")
        if not any(ratings):
            return {}
        quality = [mean_or_none([r.overall for r in each if r.overall is not None]) for each in ratings]
        metrics = {f"{label}: overall quality": compute_mean_metric(quality, "points")}
        for name in METADATA_FIELDS:
            values = [mean_or_none([float(r.flags[name]) for r in each if name in r.flags]) for each in ratings]
            known = [value for value in values if value is not None]  # a field may not apply to a completion
            if known:
                better: Better = "higher" if name == "satisfies_constraint" else "lower"
                metrics[f"{label}: {name.replace('_', ' ')}"] = compute_mean_metric(known, better=better)
        return metrics


def build_prefix_table(scored_prefixes: Sequence[ScoredPrefix]) -> list[dict[str, Any]]:
    """Return the score of each few-shot prefix, and whether it was selected, as rows."""
    best = select_best_prefix(scored_prefixes)
    return [
        {"text": each.text, "score": each.score, "prompts": each.num_prompts, "selected": each is best}
        for each in scored_prefixes
    ]


def format_prefix_note(table: Sequence[dict[str, Any]]) -> str:
    """Return the prefix table in one line."""
    (number,) = (number for number, row in enumerate(table, 1) if row["selected"])
    scores = ", ".join(f"{row['score']:.3f}" for row in table)
    return (
        f"few-shot prefix {number} of {len(table)} was selected: mean reward scores {scores} on "
        f"{table[0]['prompts']:,} prompts"
    )


def mean_or_none(values: Sequence[float]) -> float | None:
    """Return the mean over the raters of one completion, so that an interval counts it once; None without a rater."""
    return sum(values) / len(values) if values else None


def win_rate_by_group(
    result: ComparisonResult, pairs: Sequence[CompletionPair], column: str
) -> dict[str, dict[str, float]]:
    """Return the win rate of each use case."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, verdict in enumerate(result.verdicts):
        groups[str(pairs[verdict.pair_index].row.get(column, "all"))].append(index)
    rates = {}
    for group, indices in sorted(groups.items()):
        verdicts = [result.verdicts[index] for index in indices]
        rate = win_rate([verdict.preference for verdict in verdicts], [verdict.pair_index for verdict in verdicts])
        rates[group] = {"win_rate": rate.rate, "low": rate.low, "high": rate.high, "count": float(rate.count)}
    return rates


def build_agreement_table(results: Mapping[str, ComparisonResult]) -> dict[str, Any]:
    """Return the agreement of every two judges, in both orders of their names; of a group the majority counts."""
    preferences: dict[str, dict[Hashable, float]] = {}
    for name, result in results.items():
        means = {pair: sum(values) / len(values) for pair, values in group_preferences_by_pair(result).items()}
        preferences[name] = {pair: 0.5 if mean == 0.5 else float(mean > 0.5) for pair, mean in means.items()}
    table: dict[str, dict[str, Any]] = defaultdict(dict)
    for one, other in combinations(preferences, 2):
        table[one][other] = table[other][one] = compute_agreement(preferences[one], preferences[other])._asdict()
    return dict(table)


def labeler_agreement_by_judge(results: Mapping[str, ComparisonResult]) -> dict[str, float]:
    """Return the mean agreement of the labelers within each judge that has several."""
    shares = {}
    for name, result in results.items():
        by_labeler: dict[str, dict[Hashable, float]] = defaultdict(dict)
        for verdict in result.verdicts:
            by_labeler[verdict.judge].setdefault(verdict.pair_index, verdict.preference)
        share = compute_mean_agreement(by_labeler)
        if share is not None:
            shares[name] = share
    return shares


def group_preferences_by_pair(result: ComparisonResult) -> dict[int, list[float]]:
    """Return the preferences on each pair."""
    by_pair: dict[int, list[float]] = defaultdict(list)
    for verdict in result.verdicts:
        by_pair[verdict.pair_index].append(verdict.preference)
    return by_pair


def build_sample_rows(
    decoded: DecodedPairs, results: Mapping[str, ComparisonResult], column: str
) -> list[dict[str, Any]]:
    """Return the first prompts with the model's completion and each judge's mean preference for it."""
    verdicts: dict[int, dict[str, Any]] = defaultdict(dict)
    for name, result in results.items():
        for verdict in result.verdicts:
            if verdict.reason:
                verdicts[verdict.pair_index].setdefault(f"{name}: reason", verdict.reason)
        for pair_index, values in group_preferences_by_pair(result).items():
            verdicts[pair_index][name] = round(sum(values) / len(values), 3)
    return [
        {
            "prompt": pair.prompt,
            "answer": pair.first.text,
            "group": str(pair.row.get(column, "all")),
            "variant": decoded.decoding,
            "verdict": verdicts[index],
        }
        for index, pair in enumerate(decoded.pairs[:MAX_SAMPLES])
    ]
