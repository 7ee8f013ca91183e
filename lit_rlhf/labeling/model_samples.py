"""Tasks from models: responses sampled to each prompt, which people then rank, compare or rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lit_rlhf.data.records import PromptRow
from lit_rlhf.errors import UserError
from lit_rlhf.labeling.database import Kind, NewTask
from lit_rlhf.labeling.tasks import (
    COMPLETIONS,
    PromptWithCompletions,
    TaskFile,
    drop_repeated_tasks,
    make_tasks,
    row_notes,
)

_KEY = 22  # of the sampling noise


class SampleSettings(NamedTuple):
    """How responses are sampled."""

    samples: int = 4  # per model
    max_new_tokens: int = 128
    temperature: float = 1.0
    template: str | None = None
    seed: int = 0
    batch_size: int = 64


def sample_tasks(models: Sequence[str], prompts: str, kind: Kind | None, settings: SampleSettings) -> TaskFile:
    """Sample responses of one or several models to each prompt of a file.

    Equal responses to a prompt become one, and empty ones are left out; a prompt that is empty, or has too few left,
    makes no task. All are counted in the notes.

    Args:
        models: Folders or hub names.
        prompts: A data file.
        kind: What to ask about the responses; by default to compare two, and to rank more.
        settings: Of the sampling.

    Raises:
        UserError: A row without a prompt or with the id of another, a prompt too long for a model, or too many
            responses per prompt.
    """
    from lit_rlhf.data.formats.registry import read_records
    from lit_rlhf.data.report import DatasetReport
    from lit_rlhf.data.sources import read_rows

    total = len(models) * settings.samples
    kind = kind or {1: "rate", 2: "compare"}.get(total, "rank")  # type: ignore[assignment]
    assert kind is not None
    least, most = COMPLETIONS[kind]
    if kind == "demonstrate" or not least <= total <= most:
        raise UserError(f"--samples: {total} responses per prompt; to {kind} takes {least} to {most}")
    rows = read_rows(prompts)
    report = DatasetReport(prompts)
    records = read_records(rows, "prompt", PromptRow, "auto", report)
    has_ids = "id" in rows[0].fields
    # a row that makes no task, or has the id of another, is refused before anything is sampled
    prompts_alone = (PromptWithCompletions(each.prompt, None, each.fields, each.origin) for each in records)
    drop_repeated_tasks([make_tasks("demonstrate", each, has_ids, gold=False)[0] for each in prompts_alone], has_ids)
    by_model = [_sample(model, records, settings) for model in models]
    tasks: list[NewTask] = []
    num_few = num_same = 0
    for number, record in enumerate(records):
        texts: dict[str, str] = {}  # response -> the model that wrote it first
        for model, responses in zip(models, by_model):
            for text in responses[number]:
                if text.strip():
                    texts.setdefault(text, model)
        num_same += total - len(texts)
        if len(texts) < least:
            num_few += 1
            continue
        fields = {**record.fields, "models": list(texts.values())}
        sampled = PromptWithCompletions(record.prompt, list(texts), fields, record.origin)
        tasks += make_tasks(kind, sampled, has_ids, gold=False)
    notes = []
    if num_same:
        notes.append(
            f"{num_same:,} of {total * len(records):,} responses were empty or equal to another of their prompt"
        )
    if num_few:
        notes.append(f"{num_few:,} of {len(records):,} prompts left out: fewer than {least} different responses")
    if not tasks:
        raise UserError(f"no task is left of {prompts!r}: {'; '.join(notes)}: raise --temperature or --samples")
    kept, repeated = drop_repeated_tasks(tasks, has_ids)
    return TaskFile(kind, kept, [*notes, *repeated, *row_notes(report)])


def _sample(model_name: str, records: Sequence[PromptRow], settings: SampleSettings) -> list[list[str]]:
    """Return the responses of one model to each prompt."""
    import torch

    from lit_rlhf.data.prompt_template import PromptTemplate
    from lit_rlhf.evaluation.models.generation import generate_completions
    from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
    from lit_rlhf.models.loading import load_causal_lm, load_config, load_tokenizer, max_positions
    from lit_rlhf.models.loading_config import ModelLoadingConfig

    loading = ModelLoadingConfig()
    tokenizer = load_tokenizer(model_name, loading)
    template = PromptTemplate(tokenizer, settings.template)
    prompts = template.encode([template.render(each.prompt, each.fields, each.origin) for each in records])
    limit = max_positions(load_config(model_name, loading))
    for record, prompt in zip(records, prompts):
        if not prompt:
            raise UserError(f"{record.origin}: the prompt has no token of the tokenizer of {model_name}")
        if limit is not None and len(prompt) + settings.max_new_tokens > limit:
            raise UserError(
                f"{record.origin}: the prompt has {len(prompt):,} tokens, and with a response of "
                f"{settings.max_new_tokens:,} exceeds the {limit:,} positions of {model_name}: shorten the prompt or "
                "lower --max-new-tokens"
            )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_causal_lm(model_name, tokenizer, loading).to(device).eval()
    sampling = SamplingParams(settings.max_new_tokens, settings.temperature)
    responses: list[list[str]] = []
    per_batch = max(settings.batch_size // settings.samples, 1)
    name_key = sum(Path(model_name).name.encode())  # two models get different noise
    for start in range(0, len(prompts), per_batch):
        part = prompts[start : start + per_batch]
        noise = [
            sampling_uniforms(settings.samples, settings.max_new_tokens, settings.seed, start + number, _KEY, name_key)
            for number in range(len(part))
        ]
        repeated = [prompt for prompt in part for _ in range(settings.samples)]
        texts = [
            each.text.strip()
            for each in generate_completions(model, tokenizer, repeated, sampling, torch.cat(noise), stop_strings=())
        ]
        responses += [texts[place : place + settings.samples] for place in range(0, len(texts), settings.samples)]
    return responses
