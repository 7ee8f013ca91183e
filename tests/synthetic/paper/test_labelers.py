"""Groups of labelers in the paper's world: their rankings, accuracy on them, who prefers whose responses."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
import torch

from lit_rlhf.synthetic.labeler_groups import PromptsWithResponses, build_labeler_groups
from lit_rlhf.synthetic.labelers import Response, rank_responses
from lit_rlhf.synthetic.paper.build import build_paper_tokenizer
from lit_rlhf.synthetic.paper.preferences import judge_policies
from lit_rlhf.synthetic.paper.prompts import sample_instruction
from lit_rlhf.synthetic.paper.rank_groups import GROUPS, name_group, rank_by_name
from lit_rlhf.synthetic.paper.reward_models import (
    FOLDS_STAGE,
    ITERATIONS,
    GroupRankings,
    measure_folds,
    select_checkpoints,
)
from lit_rlhf.synthetic.responses import write_false_response, write_good_response, write_rude_response

LABELERS = build_labeler_groups(0)


@pytest.fixture(scope="module")
def candidates() -> PromptsWithResponses:
    rng = Random(0)
    prompts = [sample_instruction(rng, True) for _ in range(40)]
    writers = (write_good_response, write_false_response, write_rude_response)
    return [(prompt, [Response(write(rng, prompt)) for write in writers]) for prompt in prompts]


def test_each_prompt_names_two_groups_whose_rankings_it_has(candidates: PromptsWithResponses) -> None:
    rows = rank_by_name(candidates, LABELERS, Random(1))
    assert Counter(row["labeler_group"] for row in rows) == dict.fromkeys(GROUPS, 2 * len(candidates) // len(GROUPS))
    assert all(one["labeler_group"] != other["labeler_group"] for one, other in zip(rows[::2], rows[1::2], strict=True))
    tokenizer, members = build_paper_tokenizer(), {each.name: each for own in LABELERS.values() for each in own}
    for number, row in enumerate(rows):
        prompt, responses = candidates[number // 2]
        assert row["prompt"] == name_group(row["labeler_group"], prompt.text)
        assert tokenizer.unk_token_id not in tokenizer.encode(row["prompt"])
        assert row["labeler"].startswith(row["labeler_group"])
        assert row["ranks"] == rank_responses(members[row["labeler"]], prompt, responses)
    assert len({name_group(group, "") for group in GROUPS}) == len(GROUPS)


def test_accuracy_counts_the_untied_pairs_of_all_labelers_of_a_group(candidates: PromptsWithResponses) -> None:
    rankings = GroupRankings(candidates, LABELERS)
    scores = torch.rand(len(rankings.prompt_index), generator=torch.Generator().manual_seed(0))
    for group, labelers in LABELERS.items():
        right = []
        for labeler in labelers:
            for number, (prompt, responses) in enumerate(candidates):
                ranks = rank_responses(labeler, prompt, responses)
                for one, other in combinations(range(3), 2):
                    if ranks[one] != ranks[other]:
                        is_higher = bool(scores[3 * number + one] > scores[3 * number + other])
                        right.append(is_higher == (ranks[one] < ranks[other]))
        found = rankings.rate_accuracy(scores, group)
        assert found.value == pytest.approx(sum(right) / len(right)) and found.low < found.value < found.high
    own = -rankings.ranks["brief"][0].float()
    assert GroupRankings(candidates, {"one": LABELERS["brief"][:1]}).rate_accuracy(own, "one") == (1, 1, 1)


def test_own_and_other_are_means_over_who_judges_and_who_is_followed(candidates: PromptsWithResponses) -> None:
    prompts = [prompt for prompt, _ in candidates]
    good, false, rude = ([responses[index] for _, responses in candidates] for index in range(3))
    groups = {name: LABELERS[name] for name in ("helpful", "harmless", "brief")}
    found = judge_policies(groups, prompts, {"helpful": good, "harmless": false, "brief": rude}, false)
    assert all(found[f"harmless/{group}"] == (0.5, 0.5, 0.5) for group in groups), "against itself"
    assert found["helpful/harmless"].value > 0.5 > found["brief/harmless"].value
    cells = {(one, other): found[f"{one}/{other}"].value for one in groups for other in groups}
    own = [value for (one, other), value in cells.items() if one == other]
    others = [value for (one, other), value in cells.items() if one != other]
    assert found["own"].value == pytest.approx(sum(own) / 3) and found["other"].value == pytest.approx(sum(others) / 6)


def test_the_interval_of_the_folds_is_that_of_their_mean(tmp_path: Path) -> None:
    (tmp_path / FOLDS_STAGE).mkdir()
    runs = [{"training_labelers": 0.7, "heldout_labelers": 0.6 + index / 100} for index in range(5)]
    (tmp_path / FOLDS_STAGE / "folds.json").write_text(json.dumps({"runs": runs}))
    found = measure_folds(tmp_path)
    assert found["folds/training_labelers"] == pytest.approx((0.7, 0.7, 0.7))
    half = 1.96 * torch.tensor([0.60, 0.61, 0.62, 0.63, 0.64]).std().item() / 5**0.5
    assert found["folds/heldout_labelers"] == pytest.approx((0.62, 0.62 - half, 0.62 + half), abs=1e-4)


@pytest.mark.parametrize(("count", "expected"), [(48, ITERATIONS), (2, (1, 1, 1, 1, 2)), (16, (1, 2, 4, 8, 16))])
def test_checkpoints_are_those_after_the_iterations_or_the_same_fractions(
    count: int, expected: tuple[int, ...], tmp_path: Path
) -> None:
    for epoch in range(count):
        (tmp_path / f"epoch={epoch}.ckpt").touch()
    assert [path.name for path in select_checkpoints(tmp_path)] == [f"epoch={number - 1}.ckpt" for number in expected]
