"""PPO updates by TRL's own PPOTrainer on tokens that are given; what it computed on the way goes to a file.

`python trl_update.py FOLDER`, in a process that sees TRL. FOLDER holds the models, `settings.json` and `given.pt` (the
padded tokens, and the width of the prompts). Its functions are not copied but watched: wrappers keep what passes.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

KEPT: dict[str, list[Any]] = {"whiten": [], "mean": [], "reward": [], "logprobs": []}


def watch(name: str, keep: Callable[[tuple[Any, ...], Any], Any], kept: str) -> None:
    """Keep what a function of TRL's module takes and gives."""
    original = getattr(ppo_trainer, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        KEPT[kept].append(keep(args, result))
        return result

    setattr(ppo_trainer, name, wrapper)


def watch_everything(folder: Path, given: dict[str, Any]) -> None:
    """Watch whitening, means, rewards and log-probs; answer with the given tokens; keep rows in their order."""

    def answer(model: Any, queries: Any, _: int, pad_id: int, __: Any) -> tuple[Any, Any]:
        output = ppo_trainer.forward(model, given["input_ids"], pad_id)
        return given["input_ids"].clone(), output.logits[:, given["prompt_width"] - 1 : -1].clone()

    ppo_trainer.batch_generation = answer
    np.random.permutation = np.arange
    watch("get_reward", lambda args, result: tuple(each.detach().clone() for each in result[:2]), "reward")
    watch("selective_log_softmax", lambda args, result: result.detach().clone(), "logprobs")
    means, whiten = ppo_trainer.masked_mean, ppo_trainer.masked_whiten

    def whiten_and_keep(values: Any, mask: Any, **settings: Any) -> Any:
        ppo_trainer.masked_mean = means  # whitening takes means of its own
        result = whiten(values, mask, **settings)
        ppo_trainer.masked_mean = watched
        KEPT["whiten"].append((values.clone(), mask.clone(), result.clone()))
        return result

    watch("masked_mean", lambda args, result: float(result.detach()), "mean")
    watched = ppo_trainer.masked_mean
    ppo_trainer.masked_whiten = whiten_and_keep


def main() -> None:
    """Update; write `kept.pt`: of each micro-batch the value loss, its clip share, the policy loss, its clip share."""
    folder = Path(sys.argv[1])
    given = torch.load(folder / "given.pt")
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(1)
    rate = settings.pop("sgd_rate")
    rows, accumulate = len(given["input_ids"]), settings["gradient_accumulation_steps"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    policy, reference = (LlamaForCausalLM.from_pretrained(folder / name) for name in ("policy", "reference"))
    critic, reward = (
        LlamaForSequenceClassification.from_pretrained(folder / name, num_labels=1) for name in ("critic", "reward")
    )
    watch_everything(folder, given)
    prompts = given["input_ids"][:, : given["prompt_width"]]
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=rows // accumulate,
            num_mini_batches=1,
            local_rollout_forward_batch_size=rows,
            total_episodes=rows,
            max_new_tokens=given["input_ids"].shape[1] - given["prompt_width"],
            temperature=1.0,
            stop_token="eos",
            num_sample_generations=0,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=datasets.Dataset.from_list([{"input_ids": row.tolist()} for row in prompts]),
        optimizers=(torch.optim.SGD([*policy.parameters(), *critic.parameters()], lr=rate), None),
    )
    trainer.dataloader = [{"input_ids": prompts}]
    trainer.train()
    torch.save(KEPT, folder / "kept.pt")


if __name__ == "__main__":
    main()
