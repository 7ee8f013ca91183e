"""Measure the peak memory of a LoRA run on random weights: `sft`, or `ppo` with four models on one base.

    python tests/benchmarks/shared_backbone_memory.py FOLDER make|reward|sft|ppo

`make` writes model and data, `reward` the checkpoint of the adapter; `sft` and `ppo` print the peak in MiB. Run each
in a process of its own.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lit_rlhf.data import ComparisonDataModule, DemonstrationDataModule, PromptDataModule
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.loading_config import LoRA
from lit_rlhf.modules import PPOConfig, PPOModule, RewardModule, SFTModule
from lit_rlhf.modules.critics import LoRACritic
from lit_rlhf.rewards import LoRARewardModel

SHAPE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
LORA = LoRA(rank=8)


def write_inputs(folder: Path) -> None:
    """Write a model of 126 M random parameters, its tokenizer and short data."""
    vocabulary = {
        word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(8189))])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder / "model")
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(vocabulary), **SHAPE, **ids))
    model.save_pretrained(folder / "model")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    text = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3}"} for i in range(8)]
    pairs = [{"prompt": f"w{i}", "chosen": f"w{i} w1", "rejected": f"w{i} w2"} for i in range(4)]
    for name, rows in (("text", text), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def build_stage(folder: Path, kind: str) -> tuple[L.LightningModule, Any]:
    """Build a module and its data."""
    model, text = str(folder / "model"), str(folder / "text.jsonl")
    if kind == "sft":
        return SFTModule(model, adapter=LORA), DemonstrationDataModule(text, micro_batch_size=4)
    if kind == "reward":
        return RewardModule(model, adapter=LORA), ComparisonDataModule(str(folder / "pairs.jsonl"), micro_batch_size=2)
    reward = LoRARewardModel(str(folder / "reward.ckpt"), require_centered=False)
    sizes = PPOConfig(rollout_batch_size=8, micro_batch_size=4)
    module = PPOModule(model, reward, SamplingParams(8), sizes, critic=LoRACritic(), adapter=LORA)
    return module, PromptDataModule(text)


def main(folder: Path, kind: str) -> None:
    """Run one of the four commands."""
    torch.set_num_threads(1)
    if kind == "make":
        return write_inputs(folder)
    module, data = build_stage(folder, kind)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, default_root_dir=folder, **quiet)
    trainer.fit(module, datamodule=data)
    if kind == "reward":
        return trainer.save_checkpoint(folder / "reward.ckpt")
    print(json.dumps({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
