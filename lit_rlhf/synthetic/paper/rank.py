"""Sample and rank completions: `python -m lit_rlhf.synthetic.paper.rank FOLDER --seed 0`, in the folder of a seed."""

import argparse
from pathlib import Path

from lit_rlhf.synthetic.build import SyntheticDataPaths
from lit_rlhf.synthetic.labelers import build_training_labelers
from lit_rlhf.synthetic.rankings import read_prompts, sample_completions, write_rankings


def write_paper_rankings(folder: Path, seed: int) -> None:
    """Write `rankings.jsonl` and `rankings_validation.jsonl`: the training labelers on responses of the medium models.

    Args:
        folder: of the seed, with `world/`, `sft-medium/` and `pretraining-medium/`.
        seed: of the data.
    """
    paths, labelers = SyntheticDataPaths.in_folder(folder / "world"), build_training_labelers(seed)
    models = (folder / "sft-medium" / "model", folder / "pretraining-medium" / "model")
    for stream, (prompts, name) in enumerate(
        ((paths.reward_prompts, "rankings"), (paths.evaluation_prompts, "rankings_validation")), start=1
    ):
        candidates = sample_completions(read_prompts(prompts), *models, seed, stream)
        write_rankings(candidates, labelers, folder / "world" / f"{name}.jsonl", seed + stream - 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="sample and rank completions in the paper's world")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_paper_rankings(arguments.folder, arguments.seed)
