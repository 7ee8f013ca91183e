"""SimulatedLabelers: verdicts equal the ratings of the labelers, and the win rate equals `win_rate`."""

import json
from random import Random

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.judging_types import CompletionPair, RatedItem
from lit_rlhf.evaluation.judges.pairwise import compare_completions
from lit_rlhf.evaluation.models.generation import Completion
from lit_rlhf.evaluation.win_rate import win_rate
from lit_rlhf.synthetic.judges import SimulatedLabelers
from lit_rlhf.synthetic.labelers import build_heldout_labelers
from lit_rlhf.synthetic.responses import write_false_response, write_good_response, write_rude_response
from lit_rlhf.synthetic.tasks import sample_prompt

NO_CACHE = Cache(None)


@pytest.fixture(scope="module")
def pairs() -> list[CompletionPair]:
    rng = Random(5)
    found = []
    for number in range(40):
        prompt = sample_prompt(rng)
        first, second = (
            write_good_response(rng, prompt),
            (write_false_response, write_rude_response)[number % 2](rng, prompt),
        )
        if number % 4 == 0:
            second = first
        row = {"task": prompt.task, "target": prompt.target}
        found.append(
            CompletionPair(prompt.text, row, Completion(first, True, 5), Completion(second, number % 3 > 0, 5))
        )
    return found


def test_the_win_rate_counts_the_ratings_of_the_labelers(pairs) -> None:
    from lit_rlhf.synthetic.tasks import TaskPrompt

    votes, clusters = [], []
    for number, pair in enumerate(pairs):
        prompt = TaskPrompt(pair.prompt, pair.row["task"], pair.row["target"])
        for labeler in build_heldout_labelers(3):
            one = labeler.rate_likert(prompt, pair.first.text, pair.first.finished)
            other = labeler.rate_likert(prompt, pair.second.text, pair.second.finished)
            votes.append(0.5 if one == other else float(one > other))
            clusters.append(number)
    assert compare_completions(SimulatedLabelers(3), pairs, NO_CACHE).compute_win_rate() == win_rate(votes, clusters)
    same = [pair._replace(second=pair.first) for pair in pairs]
    assert compare_completions(SimulatedLabelers(3), same, NO_CACHE).compute_win_rate()[:3] == (0.5, 0.5, 0.5)


def test_ratings_have_the_flags_of_the_exact_judge(pairs) -> None:
    items = [RatedItem(pair.prompt, pair.row, pair.second) for pair in pairs]
    rated = SimulatedLabelers(3, group="training").rate(items, NO_CACHE)
    assert {len(ratings) for ratings in rated} == {8}
    assert all(1 <= rating.overall <= 7 for ratings in rated for rating in ratings)
    rude = [ratings[0].flags["inappropriate_for_assistant"] for ratings in rated]
    assert any(rude) and not all(rude)


def test_a_prompt_without_task_and_target_is_refused() -> None:
    answer = Completion("red .", True, 2)
    for row in ({}, {"task": "open_qa"}, {"task": "poetry", "target": json.dumps({})}):
        with pytest.raises(UserError, match="prompts of the synthetic world only"):
            SimulatedLabelers().compare([CompletionPair("ask : x reply :", row, answer, answer)], NO_CACHE)
