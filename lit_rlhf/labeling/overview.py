"""What whoever runs the labeling sees: progress, time, agreement between labelers and with known answers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean, median
from typing import Any, NamedTuple

from lit_rlhf.data.records import Ranking
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.labelers.agreement import (
    ComparedPair,
    LabelerAgreement,
    build_agreement_report,
    compute_labeler_agreement,
    krippendorff_alpha,
    read_preferences,
)
from lit_rlhf.evaluation.win_rate import win_rate
from lit_rlhf.labeling.answers import SKIP_REASONS, letter
from lit_rlhf.labeling.database import Answer, Database, Kind, Progress

GOLD = "\0known answer"  # no labeler's name
MAX_DISAGREEMENTS = 20


class LabelerRow(NamedTuple):
    """One labeler's line."""

    name: str
    answers: int
    skips: str  # "3: 2 unclear, 1 language"
    undone: int
    median_seconds: float | None
    agreement: LabelerAgreement | None  # with the other labelers
    gold: str  # agreement with the known answers


class Disagreement(NamedTuple):
    """A task on which labelers differ."""

    key: str
    prompt: list[dict[str, str]]
    completions: list[str]
    answers: list[tuple[str, str]]  # labeler, answer as text
    size: float


class Overview(NamedTuple):
    """All values of the page."""

    kind: Kind
    progress: Progress
    surplus: int
    labelers: list[LabelerRow]
    agreement: LabelerAgreement | None  # over all pairs of labelers
    alpha: float | None
    pairs: list[tuple[str, str, LabelerAgreement]]
    why_no_agreement: str
    disagreements: list[Disagreement]
    median_seconds: float | None


def build_overview(database: Database, kind: Kind) -> Overview:
    """Compute the overview of the tasks of one kind."""
    everything = database.list_answers(kind, actions=("answer", "skip", "surplus"))
    answers = [each for each in everything if each.action == "answer"]
    names = sorted({each.name for each in database.list_labelers()} | {each.labeler for each in everything})
    reason, total, alpha = "", None, None
    pairs: list[tuple[str, str, LabelerAgreement]] = []
    by_labeler: dict[str, LabelerAgreement] = {}
    try:
        total, alpha, pairs, by_labeler = _agreement(answers, kind)
    except UserError as problem:
        reason = str(problem)
    rows = []
    for name in names:
        own = [each for each in everything if each.labeler == name]
        given = [each for each in own if each.action == "answer"]
        skipped = Counter(str(each.content.get("reason")) for each in own if each.action == "skip")
        parts = ", ".join(f"{count} {SKIP_REASONS.get(reason, reason)}" for reason, count in skipped.most_common())
        rows.append(
            LabelerRow(
                name,
                len(given),
                parts or "0",
                database.num_undone(name),
                _median_seconds(given),
                by_labeler.get(name),
                compare_with_gold(given, kind),
            )
        )
    return Overview(
        kind,
        database.progress(kind),
        sum(each.action == "surplus" for each in everything),
        rows,
        total,
        alpha,
        pairs,
        reason,
        find_disagreements(answers, kind),
        _median_seconds(answers),
    )


def _median_seconds(answers: Sequence[Answer]) -> float | None:
    seconds = [each.seconds for each in answers if each.seconds is not None]
    return median(seconds) if seconds else None


def as_ranking(answer: Answer) -> Ranking:
    """Return an answer to a ranking or a comparison as a record; both bad is a tie."""
    return Ranking(str(answer.task), answer.task_content["completions"], ranks_of(answer.content), answer.labeler)


def ranks_of(content: dict[str, Any]) -> list[int]:
    """Return the ranks in an answer, or in a known one; lowest is best."""
    if "ranks" in content:
        return list(content["ranks"])
    return {"first": [0, 1], "second": [1, 0]}.get(content["preference"], [0, 0])


_Agreement = tuple[LabelerAgreement, float | None, list[tuple[str, str, LabelerAgreement]], dict[str, LabelerAgreement]]


def _agreement(answers: Sequence[Answer], kind: Kind) -> _Agreement:
    if kind == "demonstrate":
        raise UserError("demonstrations have no agreement")
    if kind == "rate":
        return _rating_agreement(answers)
    report = build_agreement_report([as_ranking(each) for each in answers])
    fields = LabelerAgreement._fields
    pairs = [
        (*part["labelers"], LabelerAgreement(*(part[name] for name in fields)))
        for part in report["pairs"]
        if part["comparisons"]
    ]
    by_labeler = {
        name: LabelerAgreement(*(part[field] for field in fields)) for name, part in report["labelers"].items()
    }
    return LabelerAgreement(*(report["all"][name] for name in fields)), report["alpha"], pairs, by_labeler


def _rating_agreement(answers: Sequence[Answer]) -> _Agreement:
    """Agreement on ratings: the share of overall qualities that are at most one point apart."""
    ratings: dict[str, dict[ComparedPair, float]] = defaultdict(dict)
    for answer in answers:
        ratings[answer.labeler][ComparedPair(str(answer.task), "", "")] = float(answer.content["overall"])
    by_pair = {}
    for one, other in combinations(sorted(ratings), 2):
        shared = [item for item in ratings[one] if item in ratings[other]]
        by_pair[one, other] = [(item.prompt, abs(ratings[one][item] - ratings[other][item]) <= 1) for item in shared]

    def over(pairs: Sequence[tuple[str, str]]) -> LabelerAgreement:
        decided = [each for pair in pairs for each in by_pair[pair]]
        if not decided:
            return LabelerAgreement(None, None, None, 0, 0, 0)
        share = win_rate([float(close) for _, close in decided], [task for task, _ in decided])
        return LabelerAgreement(share.rate, share.low, share.high, len(decided), 0, len({task for task, _ in decided}))

    total = over(list(by_pair))
    if not total.comparisons:
        raise UserError("no two labelers rated the same output yet")
    alpha = krippendorff_alpha(ratings)
    own = {name: over([pair for pair in by_pair if name in pair]) for name in ratings}
    return total, alpha, [(*pair, over([pair])) for pair, decided in by_pair.items() if decided], own


def compare_with_gold(answers: Sequence[Answer], kind: Kind) -> str:
    """Return how far one labeler's answers agree with the known ones, as text."""
    gold = [each for each in answers if each.gold is not None]
    if not gold:
        return "–"
    if kind == "rate":
        distance = fmean(abs(each.content["overall"] - each.gold["overall"]) for each in gold if each.gold)
        flags = [
            each.content["flags"][name] == value
            for each in gold
            if each.gold
            for name, value in each.gold.get("flags", {}).items()
            if name in each.content["flags"]
        ]
        share = f", fields {100 * fmean(flags):.0f} %" if flags else ""
        return f"{distance:.2f} points apart{share} ({len(gold)})"
    records = [as_ranking(each) for each in gold]
    known = [as_ranking(each._replace(labeler=GOLD, content=each.gold or {})) for each in gold]
    preferences = read_preferences([*records, *known])
    agreement = compute_labeler_agreement(preferences, [(gold[0].labeler, GOLD)])
    return f"{format_agreement(agreement)} ({len(gold)})"


def format_agreement(agreement: LabelerAgreement | None) -> str:
    """Return "72.4 % [70.1, 74.5]"."""
    if agreement is None or agreement.share is None:
        return "–"
    assert agreement.low is not None and agreement.high is not None
    return f"{100 * agreement.share:.1f} % [{100 * agreement.low:.1f}, {100 * agreement.high:.1f}]"


def find_disagreements(answers: Sequence[Answer], kind: Kind) -> list[Disagreement]:
    """Return the tasks on which labelers differ most."""
    by_task: dict[int, list[Answer]] = defaultdict(list)
    for each in answers:
        by_task[each.task].append(each)
    found = []
    for own in by_task.values():
        pairs = list(combinations(own, 2))
        size = max((_distance(one.content, other.content, kind) for one, other in pairs), default=0.0)
        if size > 0:
            content = own[0].task_content
            texts = [(each.labeler, format_answer(each.content)) for each in own]
            found.append(Disagreement(own[0].key, content["prompt"], content["completions"], texts, size))
    return sorted(found, key=lambda each: -each.size)[:MAX_DISAGREEMENTS]


def _distance(one: dict[str, Any], other: dict[str, Any], kind: Kind) -> float:
    """Return how far two answers are apart: points of a rating, or the share of pairs ordered the other way."""
    if kind == "demonstrate":
        return 0.0
    if kind == "rate":
        return float(abs(one["overall"] - other["overall"]))
    first, second = ranks_of(one), ranks_of(other)
    pairs = list(combinations(range(len(first)), 2))
    return sum((first[i] - first[j]) * (second[i] - second[j]) < 0 for i, j in pairs) / len(pairs)


def format_answer(content: dict[str, Any]) -> str:
    """Return an answer in few characters, by the completions' numbers in the task: "B > A = C"."""
    if "ranks" in content:
        bins: dict[int, list[str]] = defaultdict(list)
        for number, rank in enumerate(content["ranks"]):
            bins[rank].append(letter(number))
        return " > ".join(" = ".join(bins[rank]) for rank in sorted(bins))
    if "preference" in content:
        return str(content["preference"]).replace("_", " ")
    yes = [name.replace("_", " ") for name, value in content["flags"].items() if value]
    return f"{content['overall']}" + (f" ({', '.join(yes)})" if yes else "")
