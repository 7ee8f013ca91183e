"""Rankings by five groups of labelers of different tastes, for `lit-rlhf labelers` (InstructGPT, section 4.1).

`python -m lit_rlhf.synthetic.labeler_groups runs/quickstart` writes two files into the world of a finished quickstart:
one ranking a prompt, the groups having equal shares, and prompts that every labeler ranked.
"""

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

from lit_rlhf.synthetic.build import WorldPaths
from lit_rlhf.synthetic.labelers import NOISE, SPREAD, Labeler, Response, Weights
from lit_rlhf.synthetic.rankings import ranking_row, read_prompts, sample_candidates
from lit_rlhf.synthetic.tasks import TaskPrompt

# What a group's labelers have in common, in Likert points between the worst and the best. Each cares most for
# something that the others care little for, or dislike: a model of four groups' tastes then misses the fifth's.
TASTES = {
    "helpful": Weights(3.4, 0.4, 0.8, 0.4, 2.4),
    "truthful": Weights(1.6, 4.0, 2.5, 0.4, -2.4),
    "harmless": Weights(1.6, 0.4, 4.8, 3.0, 1.2),
    "brief": Weights(1.6, 1.0, 1.4, 3.6, -2.4),
    "balanced": Weights(2.0, 1.0, 1.4, 0.4, 0.0),
}
LABELERS_A_GROUP = 2
RANKED_BY_ALL = 60  # prompts

Candidates = list[tuple[TaskPrompt, list[Response]]]


def grouped_labelers(seed: int) -> dict[str, list[Labeler]]:
    """Return group -> its labelers: the group's taste with a personal spread, and the usual noise."""
    groups: dict[str, list[Labeler]] = {}
    for group, taste in TASTES.items():
        groups[group] = []
        for number in range(LABELERS_A_GROUP):
            name = f"{group}-{number}"
            rng = Random(f"{seed} {name}")
            weights = Weights(*(weight * rng.lognormvariate(0.0, SPREAD) for weight in taste))
            groups[group].append(Labeler(name, weights, NOISE, seed))
    return groups


def grouped_rows(candidates: Candidates, seed: int) -> list[dict[str, Any]]:
    """Return one ranking a prompt, by the groups in turn; all ties are no comparison and are left out."""
    groups, rng = grouped_labelers(seed), Random(f"{seed} labeler groups")
    rows = []
    for number, (prompt, responses) in enumerate(candidates):
        group = list(groups)[number % len(groups)]
        row = ranking_row(prompt, responses, rng.choice(groups[group]))
        if len(set(row["ranks"])) > 1:
            rows.append({**row, "labeler_group": group})
    return rows


def rows_by_all(candidates: Candidates, seed: int) -> list[dict[str, Any]]:
    """Return every labeler's ranking of every prompt."""
    labelers = [labeler for group in grouped_labelers(seed).values() for labeler in group]
    return [ranking_row(prompt, responses, labeler) for prompt, responses in candidates for labeler in labelers]


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write JSON lines and say where."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows):,} rankings: {path}")


def main(run: Path, seed: int) -> None:
    """Sample completions with the quickstart's SFT model and have the labelers rank them."""
    world = WorldPaths.under(run / "world")
    folders = (run / "sft" / "model", run / "pretraining" / "model")
    candidates = sample_candidates(read_prompts(world.reward_prompts), *folders, seed, 3)
    write_rows(grouped_rows(candidates, seed), run / "world" / "rankings_of_groups.jsonl")
    write_rows(rows_by_all(candidates[:RANKED_BY_ALL], seed), run / "world" / "rankings_by_all.jsonl")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="rankings by five groups of labelers, into a quickstart's world")
    parser.add_argument("run", type=Path, help="the folder of a quickstart")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.run, arguments.seed)
