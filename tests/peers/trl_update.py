"""Run PPO updates of TRL's PPOTrainer on given tokens and record intermediate results in a file.

`python trl_update.py FOLDER`, in a process that can import TRL. FOLDER holds the models, `settings.json` and `input.pt`
(the padded tokens and the width of the prompts). TRL's functions are wrapped to record arguments and results.
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

RECORDED: dict[str, list[Any]] = {"whiten": [], "mean": [], "reward": [], "logprobs": []}


def record(name: str, select: Callable[[tuple[Any, ...], Any], Any], key: str) -> None:
    """Wrap a function of TRL's module to record `select(arguments, result)` of each call."""
    original = getattr(ppo_trainer, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        RECORDED[key].append(select(args, result))
        return result

    setattr(ppo_trainer, name, wrapper)


def patch_trl(inputs: dict[str, Any]) -> None:
    """Record whitening, means, rewards and log-probabilities; generate the given tokens; keep the order of rows."""

    def generate(model: Any, queries: Any, _: int, pad_id: int, __: Any) -> tuple[Any, Any]:
        output = ppo_trainer.forward(model, inputs["input_ids"], pad_id)
        return inputs["input_ids"].clone(), output.logits[:, inputs["prompt_width"] - 1 : -1].clone()

    ppo_trainer.batch_generation = generate
    np.random.permutation = np.arange
    record("get_reward", lambda args, result: tuple(each.detach().clone() for each in result[:2]), "reward")
    record("selective_log_softmax", lambda args, result: result.detach().clone(), "logprobs")
    means, whiten = ppo_trainer.masked_mean, ppo_trainer.masked_whiten

    def whiten_and_record(values: Any, mask: Any, **settings: Any) -> Any:
        ppo_trainer.masked_mean = means  # not to record the means within whitening
        result = whiten(values, mask, **settings)
        ppo_trainer.masked_mean = recorded_mean
        RECORDED["whiten"].append((values.clone(), mask.clone(), result.clone()))
        return result

    record("masked_mean", lambda args, result: float(result.detach()), "mean")
    recorded_mean = ppo_trainer.masked_mean
    ppo_trainer.masked_whiten = whiten_and_record


def main() -> None:
    """Run the updates and write `recorded.pt`."""
    folder = Path(sys.argv[1])
    inputs = torch.load(folder / "input.pt")
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(1)
    rate = settings.pop("sgd_rate")
    rows, accumulate = len(inputs["input_ids"]), settings["gradient_accumulation_steps"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    policy, reference = (LlamaForCausalLM.from_pretrained(folder / name) for name in ("policy", "reference"))
    critic, reward = (
        LlamaForSequenceClassification.from_pretrained(folder / name, num_labels=1) for name in ("critic", "reward")
    )
    patch_trl(inputs)
    prompts = inputs["input_ids"][:, : inputs["prompt_width"]]
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
            response_length=inputs["input_ids"].shape[1] - inputs["prompt_width"],
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
    torch.save(RECORDED, folder / "recorded.pt")


if __name__ == "__main__":
    main()
