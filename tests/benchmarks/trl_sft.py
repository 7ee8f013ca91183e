"""Seconds of a step of supervised fine-tuning by TRL's SFTTrainer with packing; real tokens are counted."""

import json
from typing import Any

import datasets
import torch
import transformers
import work
from trl import SFTConfig, SFTTrainer


class Timed(SFTTrainer):
    """Remembers when each step began, and the real tokens in it."""

    begun: list[float]
    tokens: list[int]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Count, then train."""
        self.begun.append(work.clock(self.args.device.type))
        mask = inputs.get("attention_mask")
        self.tokens.append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
        return super().training_step(model, inputs, *args, **kwargs)


def main() -> None:
    """Run."""
    args = work.arguments().parse_args()
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
        per_device_train_batch_size=work.SFT_ROWS,
        max_length=work.SFT_LENGTH,
        packing=True,
        max_steps=args.updates + 2,
        learning_rate=1e-5,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Timed(
        args=settings,
        processing_class=tokenizer,
        model=model,
        train_dataset=datasets.Dataset.from_list(texts),
    )
    trainer.begun, trainer.tokens = [], []
    trainer.train()
    seconds = [later - earlier for earlier, later in zip(trainer.begun, trainer.begun[1:])]
    work.report(seconds[1:], units=trainer.tokens[1:-1])


if __name__ == "__main__":
    main()
