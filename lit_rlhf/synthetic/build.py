"""Write the synthetic data to a folder: JSON lines, few-shot prefixes, and a base model with random weights."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from lit_rlhf.synthetic.tasks import TaskPrompt, sample_prompt
from lit_rlhf.synthetic.text import generate_demonstrations, generate_documents, write_few_shot_prefix
from lit_rlhf.synthetic.tokenizer import build_tokenizer

FEW_SHOT_PREFIXES = 8  # prompt i gets prefix i mod 8, so that no single one decides
EVALUATION_ONE_IN = 5  # one prompt text in five is held out for the evaluation


@dataclass(frozen=True)
class SyntheticDataSizes:
    """The numbers of rows of a synthetic data set."""

    pretraining_documents: int = 40_000  # about 1.8 M tokens: 1,500 steps of 16 rows of 128 read most of it twice
    pretraining_validation_documents: int = 600  # enough for a loss within 0.01
    demonstrations: int = 2_000  # the paper has 13k; a closed vocabulary needs fewer
    demonstrations_validation: int = 256  # one validation loss
    reward_prompts: int = 4_000  # one ranking each
    ppo_prompts: int = 8_000  # 30 iterations of 256 without repetition
    evaluation_prompts: int = 1_024  # a 95 % interval of about 0.03 on a win rate


@dataclass(frozen=True)
class ModelShape:
    """The shape of a base model; by default about 0.4 million parameters, as in the quickstart."""

    hidden_size: int = 128
    intermediate_size: int = 320
    num_layers: int = 2
    num_heads: int = 4


@dataclass(frozen=True)
class SyntheticDataPaths:
    """The files and folders of a synthetic data set."""

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
    def in_folder(cls, folder: Path) -> "SyntheticDataPaths":
        """Return the paths of the data set in `folder`."""
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


def write_synthetic_data(out: Path, seed: int, sizes: SyntheticDataSizes = SyntheticDataSizes()) -> SyntheticDataPaths:
    """Write the data of `seed` into the folder `out`; the same seed and sizes give the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    paths = SyntheticDataPaths.in_folder(out)
    write_rows(paths.pretraining, _generate_document_rows(seed, "pretraining", sizes.pretraining_documents))
    write_rows(
        paths.pretraining_validation,
        _generate_document_rows(seed, "pretraining validation", sizes.pretraining_validation_documents),
    )
    write_rows(paths.demonstrations, _generate_demonstration_rows(seed, "demonstrations", sizes.demonstrations))
    write_rows(
        paths.demonstrations_validation,
        _generate_demonstration_rows(seed, "validation", sizes.demonstrations_validation),
    )
    write_rows(paths.reward_prompts, _generate_prompt_rows(seed, "reward", sizes.reward_prompts))
    write_rows(paths.ppo_prompts, _generate_prompt_rows(seed, "ppo", sizes.ppo_prompts))
    write_rows(paths.evaluation_prompts, _generate_evaluation_rows(seed, sizes.evaluation_prompts))
    rng = make_rng(seed, "few shot")
    prefixes = [write_few_shot_prefix(rng) for _ in range(FEW_SHOT_PREFIXES)]
    paths.few_shot.write_text(json.dumps({"prefixes": prefixes}, indent=1) + "\n")
    write_initial_model(paths.base_init, seed, build_tokenizer())
    return paths


def is_evaluation_prompt(text: str) -> bool:
    """Whether a prompt text is held out for the evaluation: a function of the text alone, so splits never overlap."""
    return hashlib.blake2b(text.encode(), digest_size=4).digest()[0] % EVALUATION_ONE_IN == 0


def make_rng(seed: int, purpose: str) -> Random:
    """Return the random stream of one part of the data, the same in every process."""
    return Random(f"{seed} {purpose}")  # a string seeds through SHA-512: the same in every process


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _generate_document_rows(seed: int, purpose: str, count: int) -> Iterator[dict[str, Any]]:
    return ({"text": text} for text in generate_documents(make_rng(seed, purpose), count))


def _generate_demonstration_rows(seed: int, purpose: str, count: int) -> Iterator[dict[str, Any]]:
    rng = make_rng(seed, purpose)
    while count:
        prompt, completion = next(generate_demonstrations(rng, 1))
        if not is_evaluation_prompt(prompt.text):
            count -= 1
            yield {"prompt": prompt.text, "completion": completion, "task": prompt.task}


def _generate_prompt_rows(seed: int, purpose: str, count: int) -> Iterator[dict[str, Any]]:
    rng = make_rng(seed, purpose)
    while count:
        prompt = sample_prompt(rng)
        if not is_evaluation_prompt(prompt.text):
            count -= 1
            yield _to_row(prompt)


def _generate_evaluation_rows(seed: int, count: int) -> Iterator[dict[str, Any]]:
    rng, texts = make_rng(seed, "evaluation"), set[str]()
    while len(texts) < count:
        prompt = sample_prompt(rng)
        if is_evaluation_prompt(prompt.text) and prompt.text not in texts:
            texts.add(prompt.text)
            yield _to_row(prompt)


def _to_row(prompt: TaskPrompt) -> dict[str, Any]:
    return {"prompt": prompt.text, "task": prompt.task, "target": prompt.target}


def write_initial_model(folder: Path, seed: int, tokenizer: Any, shape: ModelShape = ModelShape()) -> None:
    """Write a Llama model with random weights, which depend on the seed alone, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lit_rlhf.models.export import save_quietly

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    save_quietly(model, folder)
    tokenizer.save_pretrained(folder)
