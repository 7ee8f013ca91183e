"""Rank by groups of labelers with different preferences: `python -m lit_rlhf.synthetic.paper.rank_groups FOLDER`.

They rank the same responses, so that their reward models and policies differ by nothing but whom they follow.
"""

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

from lit_rlhf.synthetic.build import SyntheticDataPaths, make_rng, write_rows
from lit_rlhf.synthetic.knowledge import NAMES
from lit_rlhf.synthetic.labeler_groups import TASTES, PromptsWithResponses, build_labeler_groups, rank_by_groups
from lit_rlhf.synthetic.labelers import Labeler
from lit_rlhf.synthetic.paper.build import REWARD_SIZE
from lit_rlhf.synthetic.rankings import make_ranking_row, read_prompts, sample_completions

GROUPS = tuple(TASTES)
NUM_PROMPTS = 2_000  # that the groups rank, half of those of the reward model
SMALL_NUMBERS = (250, 1_000)  # rankings of the reward models that are trained on fewer of them
GROUP_OFFSETS = (0, 2)  # each prompt is ranked by two groups by name: from these places in `GROUPS`, in turn


def name_group(group: str, text: str) -> str:
    """Return a prompt that names the group to follow: `for tom .` on a line above, one name of the world per group."""
    return f"for {NAMES[GROUPS.index(group)]} .\n{text}"


def write_group_rankings(folder: Path, seed: int) -> None:
    """Write the data of the sections on reward models and on whose preferences they follow.

    `rankings_of_groups.jsonl`: each prompt by one group, in turn. `rankings_GROUP.jsonl`: all prompts by one group.
    `rankings_named.jsonl`: each prompt by two groups, which it names. `ppo_prompts_named.jsonl`: prompts that name a
    random group. `rankings_NUMBER.jsonl`: the first rankings of `rankings.jsonl`.

    Args:
        folder: of the seed, with `world/`, `sft-medium/` and `pretraining-medium/`.
        seed: of the data.
    """
    world, paths = folder / "world", SyntheticDataPaths.in_folder(folder / "world")
    models = (folder / f"sft-{REWARD_SIZE}" / "model", folder / f"pretraining-{REWARD_SIZE}" / "model")
    candidates = sample_completions(read_prompts(paths.reward_prompts, NUM_PROMPTS), *models, seed, 3)
    write_rows(world / "rankings_of_groups.jsonl", rank_by_groups(candidates, seed))
    groups = build_labeler_groups(seed)
    for group, labelers in groups.items():
        write_rows(world / f"rankings_{group}.jsonl", rank_by_group(candidates, labelers, Random(f"{seed} {group}")))
    write_rows(world / "rankings_named.jsonl", rank_by_name(candidates, groups, make_rng(seed, "named rankings")))
    rng = make_rng(seed, "named prompts")
    prompts = [json.loads(line) for line in paths.ppo_prompts.read_text().splitlines()]
    named = [row | {"prompt": name_group(rng.choice(GROUPS), row["prompt"])} for row in prompts]
    write_rows(world / "ppo_prompts_named.jsonl", named)
    lines = (world / "rankings.jsonl").read_text().splitlines(keepends=True)
    for number in SMALL_NUMBERS:
        (world / f"rankings_{number}.jsonl").write_text("".join(lines[:number]))


def rank_by_group(candidates: PromptsWithResponses, labelers: list[Labeler], rng: Random) -> list[dict[str, Any]]:
    """Return one ranking per prompt, by a random labeler of a group."""
    return [make_ranking_row(prompt, responses, rng.choice(labelers)) for prompt, responses in candidates]


def rank_by_name(
    candidates: PromptsWithResponses, groups: dict[str, list[Labeler]], rng: Random
) -> list[dict[str, Any]]:
    """Return rankings of every prompt by two groups in turn, each with the group's name in its prompt."""
    rows = []
    for number, candidate in enumerate(candidates):
        for offset in GROUP_OFFSETS:
            group = GROUPS[(number + offset) % len(GROUPS)]
            (row,) = rank_by_group([candidate], groups[group], rng)
            rows.append(row | {"prompt": name_group(group, row["prompt"]), "labeler_group": group})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="rankings by groups of labelers in the paper's world")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_group_rankings(arguments.folder, arguments.seed)
