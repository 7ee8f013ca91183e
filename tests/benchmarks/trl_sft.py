"""Time a step of TRL's SFTTrainer with packing, per real token."""

import json
from typing import Any

import datasets
import torch
import transformers
import workload
from trl import SFTConfig, SFTTrainer


class TimedSFTTrainer(SFTTrainer):
    """SFTTrainer that records the start and the real tokens of each step."""

    starts: list[float]
    tokens: list[int]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Record, then train."""
        self.starts.append(workload.clock(self.args.device.type))
        mask = inputs.get("attention_mask")
        self.tokens.append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
        return super().training_step(model, inputs, *args, **kwargs)


def main() -> None:
    """Time the steps and report."""
    args = workload.build_parser().parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder / f"policy-{args.size}")
    model = transformers.LlamaForCausalLM.from_pretrained(args.folder / f"policy-{args.size}")
    rows = [json.loads(line) for line in (args.folder / "demonstrations.jsonl").read_text().splitlines()]
    texts = [{"text": f"{row['prompt']} {row['completion']}"} for row in rows]
    settings = SFTConfig(
        output_dir=str(args.folder / "trl"),
        use_cpu=args.device == "cpu",
        bf16=args.precision == "bf16-mixed",
        gradient_checkpointing=False,
        per_device_train_batch_size=args.rows,
        max_length=workload.SFT_LENGTH,
        packing=True,
        max_steps=args.updates + 2,
        learning_rate=1e-5,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = TimedSFTTrainer(
        args=settings,
        processing_class=tokenizer,
        model=model,
        train_dataset=datasets.Dataset.from_list(texts),
    )
    trainer.starts, trainer.tokens = [], []
    trainer.train()
    seconds = [later - earlier for earlier, later in zip(trainer.starts, trainer.starts[1:])]
    workload.report(seconds[1:], units=trainer.tokens[1:-1])


if __name__ == "__main__":
    main()
