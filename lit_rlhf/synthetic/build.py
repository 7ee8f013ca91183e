"""Writes a world to a folder: data files, the few-shot prompt, and a base model with random weights."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from lit_rlhf.synthetic.tasks import TaskPrompt, sample_prompt
from lit_rlhf.synthetic.text import demonstrations, few_shot_prefix, pretraining_documents
from lit_rlhf.synthetic.tokenizer import CONTEXT, build_tokenizer

PRETRAINING_DOCUMENTS = 40_000  # about 1.8 M tokens: 1,500 steps of 16 rows of 128 read most of it twice
PRETRAINING_VALIDATION_DOCUMENTS = 600  # enough for a loss within 0.01
DEMONSTRATIONS = 2_000  # the paper has 13 k; a closed world needs fewer
DEMONSTRATIONS_VALIDATION = 256  # one look at the validation loss
REWARD_PROMPTS = 4_000  # one ranking each
PPO_PROMPTS = 8_000  # 30 iterations of 256 without repeating one
EVALUATION_PROMPTS = 1_024  # a 95 % interval of about 0.03 on a win rate
FEW_SHOT_PREFIXES = 8  # prompt i gets prefix i mod 8, so that no single one decides
EVALUATION_SHARE = 5  # one prompt text in five is kept for the evaluation

WIDTH, FEED_FORWARD, LAYERS, HEADS = 128, 320, 2, 4


@dataclass(frozen=True)
class WorldPaths:
    """Where everything of a world lies."""

    pretraining: Path
    pretraining_validation: Path
    demonstrations: Path
    demonstrations_validation: Path
    reward_prompts: Path
    ppo_prompts: Path
    evaluation_prompts: Path
    few_shot: Path
    base_init: Path

    @classmethod
    def under(cls, folder: Path) -> "WorldPaths":
        """The paths of the world in ``folder``."""
        return cls(
            pretraining=folder / "pretraining.jsonl",
            pretraining_validation=folder / "pretraining_validation.jsonl",
            demonstrations=folder / "demonstrations.jsonl",
            demonstrations_validation=folder / "demonstrations_validation.jsonl",
            reward_prompts=folder / "reward_prompts.jsonl",
            ppo_prompts=folder / "ppo_prompts.jsonl",
            evaluation_prompts=folder / "evaluation_prompts.jsonl",
            few_shot=folder / "few_shot.json",
            base_init=folder / "base_init",
        )


def write_world(out: Path, seed: int) -> WorldPaths:
    """Write the world of ``seed`` into the folder ``out``; the same seed gives the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    paths = WorldPaths.under(out)
    _write(paths.pretraining, _texts(seed, "pretraining", PRETRAINING_DOCUMENTS))
    _write(paths.pretraining_validation, _texts(seed, "pretraining validation", PRETRAINING_VALIDATION_DOCUMENTS))
    _write(paths.demonstrations, _demonstrations(seed, "demonstrations", DEMONSTRATIONS))
    _write(paths.demonstrations_validation, _demonstrations(seed, "validation", DEMONSTRATIONS_VALIDATION))
    _write(paths.reward_prompts, _prompts(seed, "reward", REWARD_PROMPTS))
    _write(paths.ppo_prompts, _prompts(seed, "ppo", PPO_PROMPTS))
    _write(paths.evaluation_prompts, _evaluation_prompts(seed))
    rng = _rng(seed, "few shot")
    prefixes = [few_shot_prefix(rng) for _ in range(FEW_SHOT_PREFIXES)]
    paths.few_shot.write_text(json.dumps({"prefixes": prefixes}, indent=1) + "\n")
    _write_base(paths.base_init, seed)
    return paths


def kept_for_evaluation(text: str) -> bool:
    """Whether a prompt text belongs to the evaluation; a fixed property of the text, so that no split can overlap."""
    return hashlib.blake2b(text.encode(), digest_size=4).digest()[0] % EVALUATION_SHARE == 0


def _rng(seed: int, purpose: str) -> Random:
    return Random(f"{seed} {purpose}")  # a string seeds through SHA-512: the same in every process


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _texts(seed: int, purpose: str, count: int) -> Iterator[dict[str, Any]]:
    return ({"text": text} for text in pretraining_documents(_rng(seed, purpose), count))


def _demonstrations(seed: int, purpose: str, count: int) -> Iterator[dict[str, Any]]:
    rng = _rng(seed, purpose)
    while count:
        prompt, completion = next(demonstrations(rng, 1))
        if not kept_for_evaluation(prompt.text):
            count -= 1
            yield {"prompt": prompt.text, "completion": completion, "task": prompt.task}


def _prompts(seed: int, purpose: str, count: int) -> Iterator[dict[str, Any]]:
    rng = _rng(seed, purpose)
    while count:
        prompt = sample_prompt(rng)
        if not kept_for_evaluation(prompt.text):
            count -= 1
            yield _row(prompt)


def _evaluation_prompts(seed: int) -> Iterator[dict[str, Any]]:
    rng, seen = _rng(seed, "evaluation"), set[str]()
    while len(seen) < EVALUATION_PROMPTS:
        prompt = sample_prompt(rng)
        if kept_for_evaluation(prompt.text) and prompt.text not in seen:
            seen.add(prompt.text)
            yield _row(prompt)


def _row(prompt: TaskPrompt) -> dict[str, Any]:
    return {"prompt": prompt.text, "task": prompt.task, "target": prompt.target}


def _write_base(folder: Path, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
