"""Time a PPO iteration of TRL 1.12.0, the last release with a PPO trainer, on the same models and prompts."""

import json
from typing import Any

import datasets
import torch
import transformers
import workload
from transformers import TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Clock(TrainerCallback):
    """Record the time at the end of every update."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the time."""
        self.ends.append(workload.clock(args[0].device.type))


def main() -> None:
    """Time the steps and report."""
    args = workload.build_ppo_parser().parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder / f"policy-{args.size}", padding_side="left")
    policy, reference = (
        transformers.LlamaForCausalLM.from_pretrained(args.folder / f"policy-{args.size}") for _ in range(2)
    )
    critic, reward = (
        transformers.LlamaForSequenceClassification.from_pretrained(args.folder / f"reward-{args.size}")
        for _ in range(2)
    )
    for model in (policy, reference):
        workload.bias_end_token(model, args.bias)
    prompts = [json.loads(line)["prompt"] for line in workload.prompt_file(args).read_text().splitlines()]
    rows = [{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in prompts for _ in range(args.samples)]
    micro_batch_size = min(args.micro_batch_size, args.episodes // 4)
    settings = PPOConfig(
        output_dir=str(args.folder / "trl"),
        use_cpu=args.device == "cpu",
        bf16=args.precision == "bf16-mixed",
        gradient_checkpointing=False,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=args.episodes // micro_batch_size,
        num_mini_batches=4,
        num_ppo_epochs=1,
        local_rollout_forward_batch_size=args.episodes,
        total_episodes=args.episodes * (args.updates + 1),
        response_length=args.response,
        temperature=1.0,
        stop_token="eos",
        kl_coef=0.05,
        learning_rate=3e-6,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = PPOTrainer(
        args=settings,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows[:4]),
        callbacks=[clock],
    )
    trainer.train()
    workload.report([later - earlier for earlier, later in zip(clock.ends, clock.ends[1:])])


if __name__ == "__main__":
    main()
