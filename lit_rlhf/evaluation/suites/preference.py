"""The preference suite: a model's answers against the baseline's, by one judge or several (sections 3.6 and 4.1)."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.records import PromptRow, plain_text
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.judges.agreement import agreements, overall
from lit_rlhf.evaluation.judges.human_labels import write_comparisons
from lit_rlhf.evaluation.judges.judging_types import METADATA, AnswerPair, Judge, RatedItem, Rating
from lit_rlhf.evaluation.judges.pairwise import ComparisonResult, compare_answers
from lit_rlhf.evaluation.judges.preference import own_rewards
from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel
from lit_rlhf.evaluation.models.generation import Answer
from lit_rlhf.evaluation.models.prefixes import Tried, best_of_tried
from lit_rlhf.evaluation.models.reward_scorer import refuse_own_reward
from lit_rlhf.evaluation.results import MetricValue, SuiteResult, check_early, counted, mean_of
from lit_rlhf.evaluation.suites.bias import take
from lit_rlhf.evaluation.win_rate import win_rate
from lit_rlhf.generation.sampling import SamplingParams

SAMPLES = 100
PLACE = 900  # of the sampling noise


class Decoded(NamedTuple):
    """One decoding: its name, the model's answers and the baseline's."""

    name: str
    pairs: list[AnswerPair]


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

    def check(self, subjects: Sequence[EvaluatedModel]) -> None:
        """See `Suite`."""
        for judge in self.judges.values():
            check_early(judge)
        self._refuse_own_rewards(subjects)
        self._records()

    def _refuse_own_rewards(self, subjects: Sequence[EvaluatedModel]) -> None:
        for reward in filter(None, map(own_rewards, self.judges.values())):
            refuse_own_reward(reward, {each.name: each.trained_against for each in subjects}, subjects[0].cache)

    def run(self, subject: EvaluatedModel, baseline: EvaluatedModel) -> SuiteResult:
        """See `Suite.run`."""
        self._refuse_own_rewards([subject, baseline])
        records, notes = self._records()
        figures: dict[str, MetricValue] = {}
        samples: list[dict[str, Any]] = []
        tables: dict[str, Any] = {"groups": {}, "agreement": {}, "labelers_agree": {}}
        for temperature in self.temperatures:
            decoded = self._decode(subject, baseline, records, temperature)
            if self.annotation_dir is not None and subject is not baseline:
                write_comparisons(Path(self.annotation_dir) / f"{subject.name}-{decoded.name}.jsonl", decoded.pairs)
            cut = sum(pair.first.cut > 0 for pair in decoded.pairs)
            notes += counted(cut, f"prompts ({decoded.name}) were longer than the model's positions and cut in front")
            compared = {
                name: compare_answers(judge, decoded.pairs, subject.cache) for name, judge in self.judges.items()
            }
            for name, result in compared.items():
                label = decoded.name if len(compared) == 1 else f"{decoded.name}, {name}"
                figures |= {f"{label}: {key}": figure for key, figure in result.metrics().items()}
                notes += counted(result.missing, f"verdicts missing ({label}), left out of every figure")
                tables["groups"][label] = by_group(result, decoded.pairs, self.group)
                figures |= self._ratings(label, self.judges[name], decoded.pairs, subject, notes)
            tables["agreement"][decoded.name] = agreement_table(compared)
            tables["labelers_agree"][decoded.name] = labelers_agree(compared)
            samples += sample_rows(decoded, compared, self.group)
        if subject.tried_prefixes:
            tables["prefixes"] = prefix_table(subject.tried_prefixes)
            notes.append(prefix_note(tables["prefixes"]))
        return SuiteResult(figures, len(records), notes, samples, tables)

    def _records(self) -> tuple[list[PromptRow], list[str]]:
        """Return the prompts, and what became of the rows that are none."""
        report = DatasetReport(self.path)
        records = read_records(read_rows(self.path), "prompt", PromptRow, self.format, report)
        notes = [note for reason, count in report.skipped.items() for note in counted(count, f"rows skipped: {reason}")]
        return take(records, self.limit), notes

    def _decode(
        self, subject: EvaluatedModel, baseline: EvaluatedModel, records: list[PromptRow], temperature: float
    ) -> Decoded:
        sampling = SamplingParams(self.max_new_tokens, temperature)
        mine = self._answers(subject, records, sampling, 1)
        theirs = self._answers(baseline, records, sampling, 0 if self.resample_baseline else 1)
        pairs = [
            AnswerPair(plain_text(record.prompt), record.fields, first, second, record.prompt)
            for record, first, second in zip(records, mine, theirs)
        ]
        return Decoded("greedy" if temperature == 0 else f"T = {temperature:g}", pairs)

    def _answers(
        self, subject: EvaluatedModel, records: list[PromptRow], sampling: SamplingParams, draw: int
    ) -> list[Answer]:
        prompts = [subject.template.render(record.prompt, record.fields, record.origin) for record in records]
        answers = subject.answers(subject.with_prefix(prompts), sampling, (PLACE, draw), self.stop_strings)
        return [answer._replace(text=answer.text.strip()) for answer in answers]

    def _ratings(
        self, label: str, judge: Judge, pairs: list[AnswerPair], subject: EvaluatedModel, notes: list[str]
    ) -> dict[str, MetricValue]:
        """Return the mean rating and the paper's further fields, where the judge rates."""
        rate = getattr(judge, "rate", None)
        if rate is None:
            return {}
        rated: list[list[Rating]] = rate(
            [RatedItem(pair.prompt, pair.row, pair.first) for pair in pairs], subject.cache
        )
        missing = sum(rating.overall is None for each in rated for rating in each)
        notes += counted(missing, f"ratings missing ({label}), left out")
        if not any(rated):
            return {}
        quality = [mean([r.overall for r in each if r.overall is not None]) for each in rated]
        figures = {f"{label}: overall quality": mean_of(quality, "points")}
        for name in METADATA:
            values = [mean([float(r.flags[name]) for r in each if name in r.flags]) for each in rated]
            known = [value for value in values if value is not None]  # a field may not apply to an answer
            if known:
                better: Any = "higher" if name == "satisfies_constraint" else "lower"
                figures[f"{label}: {name.replace('_', ' ')}"] = mean_of(known, better=better)
        return figures


def prefix_table(tried: Sequence[Tried]) -> list[dict[str, Any]]:
    """Return what the answers behind each few-shot prefix score, and which prefix was taken."""
    best = best_of_tried(tried)
    return [{**each._asdict(), "taken": each is best} for each in tried]


def prefix_note(table: Sequence[dict[str, Any]]) -> str:
    """Return the same in one line."""
    (number,) = (place for place, row in enumerate(table, 1) if row["taken"])
    scores = ", ".join(f"{row['score']:.3f}" for row in table)
    return (
        f"few-shot prefix {number} of {len(table)} was taken: mean reward scores {scores} on {table[0]['prompts']:,} "
        "prompts"
    )


def mean(values: Sequence[float]) -> float | None:
    """Return the mean of what the raters of one answer say, None without any: an interval counts an answer once."""
    return sum(values) / len(values) if values else None


def by_group(compared: ComparisonResult, pairs: Sequence[AnswerPair], column: str) -> dict[str, dict[str, float]]:
    """Return the win rate of each use case."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, vote in enumerate(compared.votes):
        groups[str(pairs[vote.pair].row.get(column, "all"))].append(place)
    found = {}
    for group, places in sorted(groups.items()):
        votes = [compared.votes[place] for place in places]
        won = win_rate([vote.preference for vote in votes], [vote.pair for vote in votes])
        found[group] = {"win_rate": won.rate, "low": won.low, "high": won.high, "count": float(won.count)}
    return found


def agreement_table(compared: dict[str, ComparisonResult]) -> dict[str, Any]:
    """Return how often every two judges agree, people from a file among them; of a group its majority counts."""
    verdicts: dict[str, dict[Hashable, float]] = {}
    for name, result in compared.items():
        means = {pair: sum(each) / len(each) for pair, each in preferences_by_pair(result).items()}
        verdicts[name] = {pair: 0.5 if value == 0.5 else float(value > 0.5) for pair, value in means.items()}
    return {one: {other: a._asdict() for other, a in row.items()} for one, row in agreements(verdicts).items()}


def labelers_agree(compared: dict[str, ComparisonResult]) -> dict[str, float]:
    """Return how often the labelers within a judge agree, of those judges that are several."""
    found = {}
    for name, result in compared.items():
        labelers: dict[str, dict[Hashable, float]] = defaultdict(dict)
        for vote in result.votes:
            labelers[vote.judge].setdefault(vote.pair, vote.preference)
        share = overall(labelers)
        if share is not None:
            found[name] = share
    return found


def preferences_by_pair(compared: ComparisonResult) -> dict[int, list[float]]:
    """Return the preferences that were given on each pair."""
    found: dict[int, list[float]] = defaultdict(list)
    for vote in compared.votes:
        found[vote.pair].append(vote.preference)
    return found


def sample_rows(decoded: Decoded, compared: dict[str, ComparisonResult], column: str) -> list[dict[str, Any]]:
    """Return the first prompts with the answer and each judge's mean preference for it."""
    verdicts: dict[int, dict[str, Any]] = defaultdict(dict)
    for name, result in compared.items():
        for vote in result.votes:
            if vote.reason:
                verdicts[vote.pair].setdefault(f"{name}: reason", vote.reason)
        for pair, values in preferences_by_pair(result).items():
            verdicts[pair][name] = round(sum(values) / len(values), 3)
    return [
        {
            "prompt": pair.prompt,
            "answer": pair.first.text,
            "group": str(pair.row.get(column, "all")),
            "variant": decoded.name,
            "verdict": verdicts[number],
        }
        for number, pair in enumerate(decoded.pairs[:SAMPLES])
    ]
