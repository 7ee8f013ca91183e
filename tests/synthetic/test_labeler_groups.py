"""Five groups of labelers: equal shares of the prompts, tastes of their own, the same for the same seed."""

from collections import Counter
from random import Random

from lit_rlhf.synthetic.labeler_groups import TASTES, grouped_labelers, grouped_rows, rows_by_all
from lit_rlhf.synthetic.labelers import Response, agreement
from lit_rlhf.synthetic.responses import good_response
from lit_rlhf.synthetic.tasks import sample_prompt


def candidates(count: int) -> list:
    rng = Random(0)
    made = []
    for _ in range(count):
        prompt = sample_prompt(rng)
        good = [Response(good_response(rng, prompt)) for _ in range(2)]
        made.append(
            (
                prompt,
                [*good, Response("i do not know ."), Response(""), Response(f"{good[0].text} thanks for asking !")],
            )
        )
    return made


def test_rows_hold_a_group_and_a_labeler_of_it():
    rows = grouped_rows(candidates(50), 0)
    shares = Counter(row["labeler_group"] for row in rows)
    assert set(shares) == set(TASTES) and max(shares.values()) <= 10
    assert all(row["labeler"].startswith(row["labeler_group"]) for row in rows)
    assert rows == grouped_rows(candidates(50), 0)
    everyone = rows_by_all(candidates(3), 0)
    assert len(everyone) == 30 and len({row["labeler"] for row in everyone}) == 10


def test_labelers_agree_more_within_a_group():
    items, groups = candidates(150), grouped_labelers(0)
    within = [agreement(own, items) for own in groups.values()]
    everyone = [labeler for own in groups.values() for labeler in own]
    assert sum(within) / len(within) > agreement(everyone, items) > 0.6
