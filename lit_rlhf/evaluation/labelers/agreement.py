"""How often labelers agree with each other on rankings of the same prompts (InstructGPT, section 3.4)."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from lit_rlhf.data.records import Ranking
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.win_rate import win_rate


class ComparedPair(NamedTuple):
    """Two completions of one prompt, in an order that is blind to what labelers think of them."""

    prompt: str
    first: str
    second: str


Preferences = Mapping[
    str, Mapping[ComparedPair, int]
]  # labeler -> item -> 1 the first is better, -1 the second, 0 a tie


class LabelerAgreement(NamedTuple):
    """Of two labelers, or of one with all others."""

    share: float | None  # of the comparisons that both decided, on how many they agree; None without any
    low: float | None  # 95 % interval, clustered by prompt
    high: float | None
    comparisons: int  # that both decided
    ties: int  # that either called a tie, left out
    prompts: int  # with such a comparison


def read_preferences(records: Sequence[Ranking]) -> dict[str, dict[ComparedPair, int]]:
    """Return what every labeler thinks of every two completions of a prompt.

    Raises:
        UserError: rows without a labeler, or only one labeler.
    """
    opinions: dict[str, dict[ComparedPair, int]] = defaultdict(dict)
    for record in records:
        if record.labeler is None:
            raise UserError(f"{record.origin}: no labeler; labelers are compared by a column 'labeler'")
        for one, other in combinations(range(len(record.ranks)), 2):
            texts = record.completions[one], record.completions[other]
            if texts[0] == texts[1]:
                continue
            sign = (record.ranks[one] < record.ranks[other]) - (record.ranks[one] > record.ranks[other])
            # by a hash: data that lists the better completion first would else have but one kind of opinion
            if _hash(texts[0]) > _hash(texts[1]):
                texts, sign = texts[::-1], -sign
            opinions[record.labeler][ComparedPair(repr(record.prompt), *texts)] = sign
    if len(opinions) < 2:
        raise UserError(f"only one labeler, {next(iter(opinions), 'of no name')!r}: agreement takes two")
    return dict(opinions)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def labeler_agreement(opinions: Preferences, pairs: Sequence[tuple[str, str]]) -> LabelerAgreement:
    """Return the agreement over given pairs of labelers; ties are left out, as in the paper's figures."""
    verdicts: list[float] = []
    prompts: list[str] = []
    ties = 0
    for one, other in pairs:
        mine, theirs = opinions[one], opinions[other]
        for item in mine.keys() & theirs.keys():
            if mine[item] and theirs[item]:
                verdicts.append(float(mine[item] == theirs[item]))
                prompts.append(item.prompt)
            else:
                ties += 1
    if not verdicts:
        return LabelerAgreement(None, None, None, 0, ties, 0)
    # labelers of one prompt see the same completions, so their agreements are not independent
    share = win_rate(verdicts, prompts)
    return LabelerAgreement(share.rate, share.low, share.high, len(verdicts), ties, len(set(prompts)))


def krippendorff_alpha(opinions: Preferences) -> float | None:
    """Return Krippendorff's alpha of the opinions, ordinal (better, tie, worse): 1 is always, 0 is chance.

    Ties count here. None where all opinions are alike, or no comparison has two.
    """
    import krippendorff

    items = sorted({item for own in opinions.values() for item in own})
    table = np.full((len(opinions), len(items)), np.nan)
    for line, own in enumerate(opinions.values()):
        for column, item in enumerate(items):
            table[line, column] = own.get(item, np.nan)
    shared = table[:, (~np.isnan(table)).sum(0) > 1]
    if not shared.size or len(np.unique(shared[~np.isnan(shared)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=shared, level_of_measurement="ordinal"))


def build_agreement_report(records: Sequence[Ranking]) -> dict[str, Any]:
    """Return all of it, JSON-ready: over all pairs of labelers, of each with the others, and of every pair.

    Raises:
        UserError: no labeler column, one labeler, or no two of them compared the same completions.
    """
    opinions = read_preferences(records)
    names = sorted(opinions)
    pairs = list(combinations(names, 2))
    overall = labeler_agreement(opinions, pairs)
    if not overall.comparisons:
        raise UserError(
            f"no two of the {len(names)} labelers decided on the same completions of a prompt: their agreement cannot "
            "be told; have some prompts ranked by several labelers"
        )
    rankings: dict[str, int] = defaultdict(int)
    for record in records:
        rankings[str(record.labeler)] += 1
    return {
        "rankings": len(records),
        "alpha": krippendorff_alpha(opinions),
        "all": overall._asdict(),
        "labelers": {
            name: {"rankings": rankings[name], **labeler_agreement(opinions, [p for p in pairs if name in p])._asdict()}
            for name in names
        },
        "pairs": [{"labelers": list(pair), **labeler_agreement(opinions, [pair])._asdict()} for pair in pairs],
    }
