"""The preference suite: a model's answers against the baseline's, by one judge or several (sections 3.6 and 4.1)."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.records import PromptRow, to_plain_text
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.judges.agreement import agreements, overall
from lit_rlhf.evaluation.judges.human_labels import write_comparisons
from lit_rlhf.evaluation.judges.judging_types import METADATA_FIELDS, CompletionPair, Judge, RatedItem, Rating
from lit_rlhf.evaluation.judges.pairwise import ComparisonResult, compare_completions
from lit_rlhf.evaluation.judges.preference import get_reward_model_path
from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel
from lit_rlhf.evaluation.models.generation import Completion
from lit_rlhf.evaluation.models.prefixes import ScoredPrefix, select_best_prefix
from lit_rlhf.evaluation.models.reward_scorer import check_judge_is_independent
from lit_rlhf.evaluation.results import MetricValue, SuiteResult, check_early, format_count_note, compute_mean_metric
from lit_rlhf.evaluation.suites.bias import limit_rows
from lit_rlhf.evaluation.win_rate import win_rate
from lit_rlhf.generation.sampling import SamplingParams

MAX_SAMPLES = 100
NOISE_KEY = 900  # of the sampling noise


class DecodedPairs(NamedTuple):
    """One decoding: its name, the model's answers and the baseline's."""

    decoding: str
    pairs: list[CompletionPair]


class PairwisePreference:
    """How often judges prefer a model's answer to the baseline's.

    Args:
        path: prompts in any format that `PromptDataModule` reads.
        judges: by name: simulated labelers, a reward model, a language model, people.
        max_new_tokens: most tokens of an answer.
        temperatures: decodings to compare under, each against the baseline's answers under the same; 0 is greedy.
        stop_strings: texts that end an answer.
        group: column of the data file that names the use case.
        format: of the data file.
        resample_baseline: draw the baseline's answers with noise of their own, so that the baseline itself is compared
            like any other model and gives about 0.5, not exactly.
        annotation_dir: folder to write every comparison into, for people to judge.
        limit: prompts to use, from the first; None for all.
    """

    def __init__(
        self,
        path: str,
        judges: dict[str, Judge],
        max_new_tokens: int = 256,
        temperatures: Sequence[float] = (1.0,),
        stop_strings: Sequence[str] = (),
        group: str = "use_case",
        format: str = "auto",
        resample_baseline: bool = False,
        annotation_dir: str | None = None,
        limit: int | None = None,
    ) -> None:
        if not judges or not temperatures:
            raise UserError("preference: it needs at least one judge and one temperature")
        self.path, self.judges, self.max_new_tokens, self.temperatures = path, judges, max_new_tokens, temperatures
        self.stop_strings, self.group, self.format, self.resample_baseline = (
            stop_strings,
            group,
            format,
            resample_baseline,
        )
        self.annotation_dir, self.limit = annotation_dir, limit

    def check(self, models: Sequence[EvaluatedModel]) -> None:
        """See `Suite`."""
        for judge in self.judges.values():
            check_early(judge)
        self._check_judges_are_independent(models)
        self._read_prompts()

    def _check_judges_are_independent(self, models: Sequence[EvaluatedModel]) -> None:
        for reward in filter(None, map(get_reward_model_path, self.judges.values())):
            check_judge_is_independent(reward, {each.name: each.trained_against for each in models}, models[0].cache)

    def run(self, model: EvaluatedModel, baseline: EvaluatedModel) -> SuiteResult:
        """See `Suite.run`."""
        self._check_judges_are_independent([model, baseline])
        records, notes = self._read_prompts()
        figures: dict[str, MetricValue] = {}
        samples: list[dict[str, Any]] = []
        tables: dict[str, Any] = {"groups": {}, "agreement": {}, "labelers_agree": {}}
        for temperature in self.temperatures:
            decoded = self._decode_pairs(model, baseline, records, temperature)
            if self.annotation_dir is not None and model is not baseline:
                write_comparisons(Path(self.annotation_dir) / f"{model.name}-{decoded.decoding}.jsonl", decoded.pairs)
            cut = sum(pair.first.num_truncated > 0 for pair in decoded.pairs)
            notes += format_count_note(cut, f"prompts ({decoded.decoding}) were longer than the model's positions and cut in front")
            compared = {
                name: compare_completions(judge, decoded.pairs, model.cache) for name, judge in self.judges.items()
            }
            for name, result in compared.items():
                label = decoded.decoding if len(compared) == 1 else f"{decoded.decoding}, {name}"
                figures |= {f"{label}: {key}": figure for key, figure in result.compute_metrics().items()}
                notes += format_count_note(result.num_missing, f"verdicts missing ({label}), left out of every figure")
                tables["groups"][label] = win_rate_by_group(result, decoded.pairs, self.group)
                figures |= self._rate(label, self.judges[name], decoded.pairs, model, notes)
            tables["agreement"][decoded.decoding] = build_agreement_table(compared)
            tables["labelers_agree"][decoded.decoding] = labeler_agreement_by_judge(compared)
            samples += build_sample_rows(decoded, compared, self.group)
        if model.scored_prefixes:
            tables["prefixes"] = build_prefix_table(model.scored_prefixes)
            notes.append(format_prefix_note(tables["prefixes"]))
        return SuiteResult(figures, len(records), notes, samples, tables)

    def _read_prompts(self) -> tuple[list[PromptRow], list[str]]:
        """Return the prompts, and what became of the rows that are none."""
        report = DatasetReport(self.path)
        records = read_records(read_rows(self.path), "prompt", PromptRow, self.format, report)
        notes = [note for reason, count in report.skipped.items() for note in format_count_note(count, f"rows skipped: {reason}")]
        return limit_rows(records, self.limit), notes

    def _decode_pairs(
        self, model: EvaluatedModel, baseline: EvaluatedModel, records: list[PromptRow], temperature: float
    ) -> DecodedPairs:
        sampling = SamplingParams(self.max_new_tokens, temperature)
        mine = self._complete(model, records, sampling, 1)
        theirs = self._complete(baseline, records, sampling, 0 if self.resample_baseline else 1)
        pairs = [
            CompletionPair(to_plain_text(record.prompt), record.fields, first, second, record.prompt)
            for record, first, second in zip(records, mine, theirs)
        ]
        return DecodedPairs("greedy" if temperature == 0 else f"T = {temperature:g}", pairs)

    def _complete(
        self, model: EvaluatedModel, records: list[PromptRow], sampling: SamplingParams, sample_index: int
    ) -> list[Completion]:
        prompts = [model.template.render(record.prompt, record.fields, record.origin) for record in records]
        answers = model.generate(model.prepend_prefix(prompts), sampling, (NOISE_KEY, sample_index), self.stop_strings)
        return [answer._replace(text=answer.text.strip()) for answer in answers]

    def _rate(
        self, label: str, judge: Judge, pairs: list[CompletionPair], model: EvaluatedModel, notes: list[str]
    ) -> dict[str, MetricValue]:
        """Return the mean rating and the paper's further fields, where the judge rates."""
        rate = getattr(judge, "rate", None)
        if rate is None:
            return {}
        rated: list[list[Rating]] = rate(
            [RatedItem(pair.prompt, pair.row, pair.first) for pair in pairs], model.cache
        )
        missing = sum(rating.overall is None for each in rated for rating in each)
        notes += format_count_note(missing, f"ratings missing ({label}), left out")
        if not any(rated):
            return {}
        quality = [mean_or_none([r.overall for r in each if r.overall is not None]) for each in rated]
        figures = {f"{label}: overall quality": compute_mean_metric(quality, "points")}
        for name in METADATA_FIELDS:
            values = [mean_or_none([float(r.flags[name]) for r in each if name in r.flags]) for each in rated]
            known = [value for value in values if value is not None]  # a field may not apply to an answer
            if known:
                better: Any = "higher" if name == "satisfies_constraint" else "lower"
                figures[f"{label}: {name.replace('_', ' ')}"] = compute_mean_metric(known, better=better)
        return figures


def build_prefix_table(scored_prefixes: Sequence[ScoredPrefix]) -> list[dict[str, Any]]:
    """Return what the answers behind each few-shot prefix score, and which prefix was taken."""
    best = select_best_prefix(scored_prefixes)
    return [{**each._asdict(), "taken": each is best} for each in scored_prefixes]


def format_prefix_note(table: Sequence[dict[str, Any]]) -> str:
    """Return the same in one line."""
    (number,) = (place for place, row in enumerate(table, 1) if row["taken"])
    scores = ", ".join(f"{row['score']:.3f}" for row in table)
    return (
        f"few-shot prefix {number} of {len(table)} was taken: mean reward scores {scores} on {table[0]['prompts']:,} "
        "prompts"
    )


def mean_or_none(values: Sequence[float]) -> float | None:
    """Return the mean of what the raters of one answer say, None without any: an interval counts an answer once."""
    return sum(values) / len(values) if values else None


def win_rate_by_group(result: ComparisonResult, pairs: Sequence[CompletionPair], column: str) -> dict[str, dict[str, float]]:
    """Return the win rate of each use case."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, vote in enumerate(result.verdicts):
        groups[str(pairs[vote.pair_index].row.get(column, "all"))].append(place)
    found = {}
    for group, places in sorted(groups.items()):
        votes = [result.verdicts[place] for place in places]
        won = win_rate([vote.preference for vote in votes], [vote.pair_index for vote in votes])
        found[group] = {"win_rate": won.rate, "low": won.low, "high": won.high, "count": float(won.count)}
    return found


def build_agreement_table(results: dict[str, ComparisonResult]) -> dict[str, Any]:
    """Return how often every two judges agree, people from a file among them; of a group its majority counts."""
    verdicts: dict[str, dict[Hashable, float]] = {}
    for name, result in results.items():
        means = {pair: sum(each) / len(each) for pair, each in group_preferences_by_pair(result).items()}
        verdicts[name] = {pair: 0.5 if value == 0.5 else float(value > 0.5) for pair, value in means.items()}
    return {one: {other: a._asdict() for other, a in row.items()} for one, row in agreements(verdicts).items()}


def labeler_agreement_by_judge(results: dict[str, ComparisonResult]) -> dict[str, float]:
    """Return how often the labelers within a judge agree, of those judges that are several."""
    found = {}
    for name, result in results.items():
        labelers: dict[str, dict[Hashable, float]] = defaultdict(dict)
        for vote in result.verdicts:
            labelers[vote.judge].setdefault(vote.pair_index, vote.preference)
        share = overall(labelers)
        if share is not None:
            found[name] = share
    return found


def group_preferences_by_pair(result: ComparisonResult) -> dict[int, list[float]]:
    """Return the preferences that were given on each pair."""
    found: dict[int, list[float]] = defaultdict(list)
    for vote in result.verdicts:
        found[vote.pair_index].append(vote.preference)
    return found


def build_sample_rows(decoded: DecodedPairs, results: dict[str, ComparisonResult], column: str) -> list[dict[str, Any]]:
    """Return the first prompts with the answer and each judge's mean preference for it."""
    verdicts: dict[int, dict[str, Any]] = defaultdict(dict)
    for name, result in results.items():
        for vote in result.verdicts:
            if vote.reason:
                verdicts[vote.pair_index].setdefault(f"{name}: reason", vote.reason)
        for pair, values in group_preferences_by_pair(result).items():
            verdicts[pair][name] = round(sum(values) / len(values), 3)
    return [
        {
            "prompt": pair.prompt,
            "answer": pair.first.text,
            "group": str(pair.row.get(column, "all")),
            "variant": decoded.decoding,
            "verdict": verdicts[number],
        }
        for number, pair in enumerate(decoded.pairs[:MAX_SAMPLES])
    ]
