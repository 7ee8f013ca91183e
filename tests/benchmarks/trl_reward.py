"""Time a step of TRL's RewardTrainer on one ranking: its pairs, as separate rows of one batch."""

import json
from itertools import combinations
from typing import Any

import datasets
import torch
import transformers
import workload
from transformers import TrainerCallback
from trl import RewardConfig, RewardTrainer


class Clock(TrainerCallback):
    """Record the seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start = workload.clock(args[0].device.type)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds.append(workload.clock(args[0].device.type) - self.start)


def main() -> None:
    """Time the steps and report."""
    args = workload.build_reward_parser().parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder / f"policy-{args.size}")
    model = transformers.LlamaForSequenceClassification.from_pretrained(
        args.folder / f"policy-{args.size}", num_labels=1
    )
    pairs, per_ranking = [], 0
    for line in (args.folder / args.rankings).read_text().splitlines()[: args.updates + 1]:
        row = json.loads(line)
        texts = [f"{row['prompt']} {completion} <eos>" for completion in row["completions"]]
        ids = [tokenizer(text)["input_ids"] for _, text in sorted(zip(row["ranks"], texts))]
        ranking_pairs = list(combinations(ids, 2))
        per_ranking = len(ranking_pairs)
        pairs += [{"chosen_ids": better, "rejected_ids": worse} for better, worse in ranking_pairs]
    settings = RewardConfig(
        output_dir=str(args.folder / "trl"),
        use_cpu=args.device == "cpu",
        bf16=args.precision == "bf16-mixed",
        gradient_checkpointing=False,
        per_device_train_batch_size=per_ranking,
        max_steps=args.updates + 1,
        max_length=None,
        learning_rate=1e-5,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = RewardTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    workload.report(clock.seconds[1:])


if __name__ == "__main__":
    main()
