"""Five groups of labelers: equal numbers of prompts, different preferences, deterministic for a seed."""

from collections import Counter
from random import Random

from lit_rlhf.synthetic.labeler_groups import TASTES, build_labeler_groups, rank_by_all_labelers, rank_by_groups
from lit_rlhf.synthetic.labelers import Response, compute_agreement
from lit_rlhf.synthetic.responses import write_good_response
from lit_rlhf.synthetic.tasks import sample_prompt


def make_candidates(count: int) -> list:
    rng = Random(0)
    items = []
    for _ in range(count):
        prompt = sample_prompt(rng)
        good = [Response(write_good_response(rng, prompt)) for _ in range(2)]
        items.append(
            (
                prompt,
                [*good, Response("i do not know ."), Response(""), Response(f"{good[0].text} thanks for asking !")],
            )
        )
    return items


def test_rows_hold_a_group_and_a_labeler_of_it():
    rows = rank_by_groups(make_candidates(50), 0)
    shares = Counter(row["labeler_group"] for row in rows)
    assert set(shares) == set(TASTES) and max(shares.values()) <= 10
    assert all(row["labeler"].startswith(row["labeler_group"]) for row in rows)
    assert rows == rank_by_groups(make_candidates(50), 0)
    everyone = rank_by_all_labelers(make_candidates(3), 0)
    assert len(everyone) == 30 and len({row["labeler"] for row in everyone}) == 10


def test_labelers_agree_more_within_a_group():
    items, groups = make_candidates(150), build_labeler_groups(0)
    within = [compute_agreement(own, items) for own in groups.values()]
    everyone = [labeler for own in groups.values() for labeler in own]
    assert sum(within) / len(within) > compute_agreement(everyone, items) > 0.6
