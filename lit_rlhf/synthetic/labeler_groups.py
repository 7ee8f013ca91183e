"""Rankings by five groups of labelers with different preferences, for `lit-rlhf labelers` (§4.1).

`python -m lit_rlhf.synthetic.labeler_groups runs/quickstart` adds two files to the data of a finished quickstart: one
ranking per prompt, by the groups in turn, and prompts that every labeler ranked.
"""

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

from lit_rlhf.synthetic.build import SyntheticDataPaths
from lit_rlhf.synthetic.labelers import RATING_NOISE_STD, WEIGHT_LOG_STD, Labeler, LabelerWeights, Response
from lit_rlhf.synthetic.rankings import make_ranking_row, read_prompts, sample_completions
from lit_rlhf.synthetic.tasks import TaskPrompt

# Mean weights of each group. Each group weighs one quality high that the others weigh low or negative, so that a
# reward model trained on four groups predicts the fifth less well.
TASTES = {
    "helpful": LabelerWeights(3.4, 0.4, 0.8, 0.4, 2.4),
    "truthful": LabelerWeights(1.6, 4.0, 2.5, 0.4, -2.4),
    "harmless": LabelerWeights(1.6, 0.4, 4.8, 3.0, 1.2),
    "brief": LabelerWeights(1.6, 1.0, 1.4, 3.6, -2.4),
    "balanced": LabelerWeights(2.0, 1.0, 1.4, 0.4, 0.0),
}
LABELERS_PER_GROUP = 2
NUM_RANKED_BY_ALL = 60  # prompts

PromptsWithResponses = list[tuple[TaskPrompt, list[Response]]]


def build_labeler_groups(seed: int) -> dict[str, list[Labeler]]:
    """Return group -> its labelers, whose weights scatter around those of the group."""
    groups: dict[str, list[Labeler]] = {}
    for group, means in TASTES.items():
        groups[group] = []
        for number in range(LABELERS_PER_GROUP):
            name = f"{group}-{number}"
            rng = Random(f"{seed} {name}")
            weights = LabelerWeights(*(weight * rng.lognormvariate(0.0, WEIGHT_LOG_STD) for weight in means))
            groups[group].append(Labeler(name, weights, RATING_NOISE_STD, seed))
    return groups


def rank_by_groups(candidates: PromptsWithResponses, seed: int) -> list[dict[str, Any]]:
    """Return one ranking per prompt, by the groups in turn; rankings with nothing but ties are left out."""
    groups, rng = build_labeler_groups(seed), Random(f"{seed} labeler groups")
    rows = []
    for number, (prompt, responses) in enumerate(candidates):
        group = list(groups)[number % len(groups)]
        row = make_ranking_row(prompt, responses, rng.choice(groups[group]))
        if len(set(row["ranks"])) > 1:
            rows.append({**row, "labeler_group": group})
    return rows


def rank_by_all_labelers(candidates: PromptsWithResponses, seed: int) -> list[dict[str, Any]]:
    """Return the rankings of every prompt by every labeler."""
    labelers = [labeler for group in build_labeler_groups(seed).values() for labeler in group]
    return [make_ranking_row(prompt, responses, labeler) for prompt, responses in candidates for labeler in labelers]


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write JSON lines and print the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows):,} rankings: {path}")


def main(run: Path, seed: int) -> None:
    """Sample completions with the SFT model of a quickstart and rank them."""
    paths = SyntheticDataPaths.in_folder(run / "world")
    folders = (run / "sft" / "model", run / "pretraining" / "model")
    candidates = sample_completions(read_prompts(paths.reward_prompts), *folders, seed, 3)
    write_rows(rank_by_groups(candidates, seed), run / "world" / "rankings_of_groups.jsonl")
    write_rows(rank_by_all_labelers(candidates[:NUM_RANKED_BY_ALL], seed), run / "world" / "rankings_by_all.jsonl")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="rankings by five groups of labelers, added to the data of a quickstart"
    )
    parser.add_argument("run", type=Path, help="the folder of a quickstart")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.run, arguments.seed)
