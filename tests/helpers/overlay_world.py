"""A folder with tiny inputs for the quickstart recipes, and overlays that shorten their runs to three steps."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from tests.helpers.small_runs import demonstrations, rankings, write_rows

SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
# 64 is the minimum width of 4-bit layers on a CPU, and makes weights large enough for 8-bit optimizers to quantize
SHAPE = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CONFIG = LlamaConfig(**SHAPE, **SPECIAL, num_attention_heads=4, max_position_embeddings=64)
SMALL = """
trainer: {max_steps: 3, enable_progress_bar: false, limit_val_batches: 1, num_sanity_val_steps: 0}
"""
SMALL_STAGE = {
    "sft": "data: {init_args: {micro_batch_size: 4}}\ntrainer: {callbacks: [%s]}",
    "reward": "data: {init_args: {micro_batch_size: 2}}\ntrainer: {val_check_interval: 1.0}",
    "ppo": "model: {init_args: {sampling: {max_new_tokens: 4}, ppo: {rollout_batch_size: 12, micro_batch_size: 2}}}",
    "ppo-ptx": """
model: {init_args: {sampling: {max_new_tokens: 4}, ppo: {rollout_batch_size: 12, micro_batch_size: 2}}}
trainer: {callbacks: [%s]}""",
}
MIX = """{class_path: lit_rlhf.callbacks.PretrainingMix, init_args:
  {path: runs/quickstart/world/pretraining.jsonl, coefficient: 0.5, micro_batch_size: 2, seq_len: 8}}"""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words in `small_runs`."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", ":", *(f"w{i}" for i in range(28))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def write_world(root: Path) -> None:
    """Write models, data and overlays."""
    world = root / "runs/quickstart/world"
    world.mkdir(parents=True)
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_config(CONFIG), word_tokenizer()
    scalar = LlamaConfig(**CONFIG.to_diff_dict() | {"num_labels": 1, "score_shift": 0.0, "score_scale": 1.0})
    reward = AutoModelForSequenceClassification.from_config(scalar)
    for name in ("world/base_init", "pretraining/model", "sft/model", "reward/model"):
        (reward if name.startswith("reward") else model).save_pretrained(root / "runs/quickstart" / name)
        tokenizer.save_pretrained(root / "runs/quickstart" / name)
    for suffix in ("", "_validation"):
        write_rows(world / f"demonstrations{suffix}.jsonl", demonstrations(24))
        write_rows(world / f"rankings{suffix}.jsonl", rankings(12))
        write_rows(world / f"pretraining{suffix}.jsonl", [{"text": " ".join(f"w{i % 28}" for i in range(200))}])
    write_rows(world / "ppo_prompts.jsonl", [{"prompt": row["prompt"]} for row in demonstrations(24)])
    (root / "small.yaml").write_text(SMALL)
    for stage, text in SMALL_STAGE.items():
        (root / f"small-{stage}.yaml").write_text(text.replace("%s", MIX))
