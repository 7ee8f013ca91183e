"""A folder with a recipe of each stage that runs in seconds on the tiny model, and what is in a folder."""

import json
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.small_runs import demonstrations, rankings, write_rows

OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
CHECKPOINT = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
WORDS = "def count(prompts, responses, rows):\n    return [len(r.split()) for r in responses]\n"
STAGES: dict[str, dict[str, Any]] = {
    "sft": {
        "model": {"class_path": "lit_rlhf.modules.SFTModule", "init_args": {}},
        "data": {"class_path": "lit_rlhf.data.DemonstrationDataModule", "init_args": {"micro_batch_size": 4}},
        "callbacks": ["GenerateOnValidation"],
    },
    "reward": {
        "model": {"class_path": "lit_rlhf.modules.RewardModule", "init_args": {}},
        "data": {"class_path": "lit_rlhf.data.ComparisonDataModule", "init_args": {"micro_batch_size": 4}},
        "callbacks": ["RewardModelReport"],
    },
    "ppo": {
        "model": {
            "class_path": "lit_rlhf.modules.PPOModule",
            "init_args": {
                "reward": {"class_path": "lit_rlhf.rewards.FunctionReward", "init_args": {"function": "words.count"}},
                "sampling": {"max_new_tokens": 4},
                "ppo": {"rollout_batch_size": 8, "micro_batch_size": 4},
            },
        },
        "data": {"class_path": "lit_rlhf.data.PromptDataModule", "init_args": {}},
        "callbacks": ["LogSamples", "MetricGuard"],
    },
}


def write_stages(folder: Path, llama: str) -> None:
    """Write sft.yaml, reward.yaml and ppo.yaml, which write to runs/STAGE, and their data."""
    write_rows(folder / "demonstrations.jsonl", demonstrations(12))
    write_rows(folder / "rankings.jsonl", rankings(12))
    (folder / "words.py").write_text(WORDS)
    for name, stage in STAGES.items():
        path = "rankings.jsonl" if name == "reward" else "demonstrations.jsonl"
        callbacks = [{"class_path": f"lit_rlhf.callbacks.{each}"} for each in (*stage["callbacks"], "ExportModel")]
        model, data = (json.loads(json.dumps(stage[part])) for part in ("model", "data"))
        model["init_args"] |= {"model": llama, "optimizer": OPTIMIZER}
        data["init_args"] |= {"path": path, "validation_path": path}
        trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False}
        trainer |= {"log_every_n_steps": 1, "callbacks": [*callbacks, CHECKPOINT]}
        recipe = {"run_dir": f"runs/{name}", "model": model, "data": data, "trainer": trainer}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes, except caches of Python."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
