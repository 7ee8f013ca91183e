"""Inter-annotator agreement of labelers on rankings of the same prompts (InstructGPT, section 3.4)."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from lit_rlhf.data.records import Ranking
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.agreement import match_decisions
from lit_rlhf.evaluation.win_rate import win_rate


class ComparedPair(NamedTuple):
    """Two completions of one prompt, in an order that does not depend on their ranks."""

    prompt: str
    first: str
    second: str


# labeler -> pair -> 1: the first is better, 0.5: tie, 0: the second is better
LabelerPreferences = Mapping[str, Mapping[ComparedPair, float]]


class LabelerAgreement(NamedTuple):
    """Agreement over one or more pairs of labelers."""

    share: float | None  # fraction of the comparisons decided by both on which they agree; None without any
    low: float | None  # 95 % interval, clustered by prompt
    high: float | None
    comparisons: int  # decided by both
    ties: int  # comparisons that either called a tie, excluded
    prompts: int  # with a comparison decided by both


def read_preferences(records: Sequence[Ranking]) -> dict[str, dict[ComparedPair, float]]:
    """Return each labeler's preference between every two completions of a prompt.

    Raises:
        UserError: rows without a labeler, or only one labeler.
    """
    preferences: dict[str, dict[ComparedPair, float]] = defaultdict(dict)
    for record in records:
        if record.labeler is None:
            raise UserError(f"{record.origin}: no labeler; labelers are compared by a column 'labeler'")
        for one, other in combinations(range(len(record.ranks)), 2):
            texts = record.completions[one], record.completions[other]
            if texts[0] == texts[1]:
                continue
            is_tie = record.ranks[one] == record.ranks[other]
            preference = 0.5 if is_tie else float(record.ranks[one] < record.ranks[other])
            # ordered by hash: in data that lists the better completion first, every preference would be 1
            if _hash(texts[0]) > _hash(texts[1]):
                texts, preference = texts[::-1], 1.0 - preference
            preferences[record.labeler][ComparedPair(repr(record.prompt), *texts)] = preference
    if len(preferences) < 2:
        raise UserError(f"only one labeler, {next(iter(preferences), 'of no name')!r}: agreement takes two")
    return dict(preferences)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def compute_labeler_agreement(
    preferences: LabelerPreferences, labeler_pairs: Sequence[tuple[str, str]]
) -> LabelerAgreement:
    """Return the agreement over the given pairs of labelers; ties are excluded, as in the paper."""
    agreements: list[float] = []
    prompts: list[str] = []
    num_ties = 0
    for one, other in labeler_pairs:
        decided, ties = match_decisions(preferences[one], preferences[other])
        num_ties += ties
        agreements += [float(decision.agrees) for decision in decided]
        prompts += [decision.item.prompt for decision in decided]
    if not agreements:
        return LabelerAgreement(None, None, None, 0, num_ties, 0)
    # labelers of one prompt compare the same completions, so their agreements are not independent
    share = win_rate(agreements, prompts)
    return LabelerAgreement(share.rate, share.low, share.high, len(agreements), num_ties, len(set(prompts)))


def krippendorff_alpha(preferences: LabelerPreferences) -> float | None:
    """Return Krippendorff's alpha, ordinal (better, tie, worse): 1 is perfect, 0 is chance. Ties count here.

    None if all preferences are equal, or if no comparison has two labelers.
    """
    import krippendorff

    items = sorted({item for own in preferences.values() for item in own})
    table = np.full((len(preferences), len(items)), np.nan)
    for line, own in enumerate(preferences.values()):
        for column, item in enumerate(items):
            table[line, column] = own.get(item, np.nan)
    shared = table[:, (~np.isnan(table)).sum(0) > 1]
    if not shared.size or len(np.unique(shared[~np.isnan(shared)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=shared, level_of_measurement="ordinal"))


def build_agreement_report(records: Sequence[Ranking]) -> dict[str, Any]:
    """Return the agreement over all pairs of labelers, of each with the others, and of every pair; JSON-serializable.

    Raises:
        UserError: no labeler column, one labeler, or no two of them compared the same completions.
    """
    preferences = read_preferences(records)
    names = sorted(preferences)
    pairs = list(combinations(names, 2))
    total = compute_labeler_agreement(preferences, pairs)
    if not total.comparisons:
        raise UserError(
            f"no two of the {len(names)} labelers decided on the same completions of a prompt: their agreement is "
            "unknown; have some prompts ranked by several labelers"
        )
    rankings: dict[str, int] = defaultdict(int)
    for record in records:
        rankings[str(record.labeler)] += 1
    by_labeler = {}
    for name in names:
        agreement = compute_labeler_agreement(preferences, [pair for pair in pairs if name in pair])
        by_labeler[name] = {"rankings": rankings[name], **agreement._asdict()}
    return {
        "rankings": len(records),
        "alpha": krippendorff_alpha(preferences),
        "all": total._asdict(),
        "labelers": by_labeler,
        "pairs": [
            {"labelers": list(pair), **compute_labeler_agreement(preferences, [pair])._asdict()} for pair in pairs
        ],
    }
