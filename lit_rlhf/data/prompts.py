"""Prompts to generate responses to, for PPO (the paper's step 3)."""

from __future__ import annotations

from typing import Any, Literal

from lightning import LightningDataModule

from lit_rlhf.data.base import (
    PreprocessedDataModule,
    check_validation_settings,
    describe_sources,
    empty_validation_loader,
    get_module_tokenizer,
    load_splits,
)
from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.collation import TokenizedPrompt, collate_prompts
from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.loader import ResumableLoader, get_dp_world_size_and_rank, infinite_permutation
from lit_rlhf.data.preprocessing.settings import Preprocessing
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.records import PromptRow, to_messages
from lit_rlhf.data.report import DataReader, DatasetReport
from lit_rlhf.data.sources import DataSource, held_rows, read_rows, source_name
from lit_rlhf.data.truncation import TruncationPolicy
from lit_rlhf.errors import UserError
from lit_rlhf.hyperparameters import save_settings
from lit_rlhf.importing import Function


class PromptSource:
    """An infinite, ordered supply of prompts: epochs over the data, each permuted, without replacement.

    The prompts of an iteration depend on (seed, iteration, count) alone, not on the number of ranks, so a resumed run
    needs the iteration's number and no other state.

    Args:
        prompts: The tokenized prompts.
        pad_id: The padding token.
        seed: Seeds the permutations.
    """

    def __init__(self, prompts: list[TokenizedPrompt], pad_id: int, seed: int = 0) -> None:
        assert prompts, "a prompt source needs a prompt"
        self.prompts = prompts
        self.pad_id = pad_id
        self.seed = seed

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def max_length(self) -> int:
        """Length of the longest prompt in tokens."""
        return max(len(each.input_ids) for each in self.prompts)

    def get_prompts(self, iteration: int, count: int) -> list[TokenizedPrompt]:
        """Return the `count` prompts of an iteration (counted from 0), over all ranks."""
        indices = infinite_permutation(len(self.prompts), self.seed, iteration * count, count)
        return [self.prompts[index] for index in indices]

    def get_batch(self, iteration: int, count: int, rank: int = 0, world_size: int = 1) -> PromptBatch:
        """Return this rank's consecutive share of an iteration's `count` prompts, with their global indices.

        Raises:
            UserError: `count` is not divisible by the number of ranks.
        """
        share, remainder = divmod(count, world_size)
        if remainder or not share:
            raise UserError(f"{count} prompts per iteration are not divisible by {world_size} ranks")
        indices = range(rank * share, (rank + 1) * share)
        rows = self.get_prompts(iteration, count)
        return self.collate([rows[index] for index in indices], indices)

    def collate(self, prompts: list[TokenizedPrompt], index: Any) -> PromptBatch:
        """Left-pad prompts; `index` holds their indices in the iteration's global batch."""
        return collate_prompts(prompts, index, self.pad_id)


class PromptDataModule(LightningDataModule, DataReader):
    """Passes its prompts to the module, which generates and scores: `lightning_module.experience_loader(prompts)`.

    The module decides the batch sizes of training. Validation yields `PromptBatch`, whose `index` is the prompt's index
    in the validation data; a rank that has no prompt left repeats another rank's prompt with `index` -1, to be ignored.

    Args:
        path: A local file, a hub name, or rows in memory; of demonstrations and comparisons, the prompts are used.
        validation_path: The validation data, likewise.
        validation_fraction: Fraction of the distinct prompts held out for validation, without a `validation_path`.
        format: "auto", a format's name, or your own function, or its dotted path; see `lit_rlhf.data.formats.registry`.
        template: The prompt template; see `lit_rlhf.data.prompt_template.PromptTemplate`. Use the one that the policy
            was fine-tuned with.
        max_prompt_length: In tokens; for longer prompts, see `overlong_prompts`.
        overlong_prompts: "drop" the prompt, or "truncate" it from the left. Both are counted and printed.
        preprocessing: The paper's data steps; see `lit_rlhf.data.preprocessing.settings.Preprocessing`.
        validation_batch_size: Validation prompts per rank and batch.
        seed: Seeds the order of prompts and the held-out part.
    """

    data_role = "prompts"

    def __init__(
        self,
        path: DataSource,
        validation_path: DataSource | None = None,
        validation_fraction: float = 0.0,
        format: str | Function = "auto",
        template: str | None = None,
        max_prompt_length: int = 1024,
        overlong_prompts: Literal["drop", "truncate"] = "drop",
        preprocessing: Preprocessing | None = None,
        validation_batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_validation_settings(validation_path, validation_fraction)
        self.path = held_rows(path)
        self.validation_path = None if validation_path is None else held_rows(validation_path)
        self.validation_fraction = validation_fraction
        self.format = format
        self.template = template
        self.lengths = TruncationPolicy(max_prompt_length, overlong_prompts=overlong_prompts).validated()
        self.preprocessing = (preprocessing or Preprocessing()).validated(validation_fraction)
        if validation_batch_size < 1:
            raise UserError(f"validation_batch_size: {validation_batch_size} must be at least 1")
        self.validation_batch_size = validation_batch_size
        self.seed = seed
        self.prompts: PromptSource | None = None
        self.validation_prompts: PromptSource | None = None
        save_settings(self, locals() | describe_sources(self.path, self.validation_path))

    def setup(self, stage: str) -> None:
        """Read and tokenize, once."""
        if self.prompts is not None:
            return
        training, validation, self.reports = load_splits(
            self.path,
            self.validation_path,
            self.validation_fraction,
            self.seed,
            self.preprocessing,
            self.load_records,
            self._tokenize,
        )
        pad_id = get_module_tokenizer(self).pad_token_id
        self.prompts = PromptSource(list(training), pad_id, self.seed)
        if validation:
            self.validation_prompts = PromptSource(list(validation), pad_id, self.seed)

    def load_records(self, path: DataSource, report: DatasetReport) -> list[PromptRow]:
        """Read prompts."""
        return read_records(read_rows(path), "prompt", PromptRow, self.format, report)

    def _tokenize(self, records: list[PromptRow], report: DatasetReport) -> list[TokenizedPrompt]:
        template = PromptTemplate(get_module_tokenizer(self), self.template)
        prompts = tokenize_prompts(records, template, self.lengths, report)
        if not prompts:
            raise UserError(f"no prompt is left of {report.source!r}: {report.format_summary()}")
        return prompts

    def train_dataloader(self) -> Any:
        """Return the module's experience loader for these prompts."""
        assert self.trainer is not None and self.prompts is not None
        module: Any = self.trainer.lightning_module
        return module.experience_loader(self.prompts)

    def val_dataloader(self) -> ResumableLoader[tuple[int, TokenizedPrompt], PromptBatch] | list[Any]:
        """Return the loader of the validation prompts, each once, in file order; an empty list without any."""
        if self.validation_prompts is None:
            return empty_validation_loader()
        return self._loader_in_order(self.validation_prompts)

    def predict_dataloader(self) -> ResumableLoader[tuple[int, TokenizedPrompt], PromptBatch]:
        """Return a loader of the prompts of `path`, each once, in file order."""
        assert self.prompts is not None
        return self._loader_in_order(self.prompts)

    def _loader_in_order(self, source: PromptSource) -> ResumableLoader[tuple[int, TokenizedPrompt], PromptBatch]:
        assert self.trainer is not None

        def collate(rows: list[tuple[int, TokenizedPrompt]], normalizer: float) -> PromptBatch:
            return source.collate([prompt for _, prompt in rows], [index for index, _ in rows])

        world_size, rank = get_dp_world_size_and_rank(self.trainer)
        return ResumableLoader(
            list(enumerate(source.prompts)),
            collate,
            micro_batch_size=self.validation_batch_size,
            world_size=world_size,
            rank=rank,
            shuffle=False,
            drop_last=False,
            without_targets=lambda row: (-1, row[1]),
        )


def get_text_settings(data: object) -> tuple[str | None, TruncationPolicy]:
    """Return prompt template and length limits of a data module; of one without them, the defaults."""
    if isinstance(data, PreprocessedDataModule | PromptDataModule):
        return data.template, data.lengths
    return None, TruncationPolicy(1024)


def read_prompts(
    path: DataSource, format: str | Function, template: PromptTemplate, lengths: TruncationPolicy
) -> list[TokenizedPrompt]:
    """Read and tokenize the prompts of a dataset without a data module; print what was skipped.

    Raises:
        UserError: The data cannot be read, or no prompt is left.
    """
    report = DatasetReport(source_name(path))
    records = read_records(read_rows(path), "prompt", PromptRow, format, report)
    prompts = tokenize_prompts(records, template, lengths, report)
    report.raise_if_empty("prompt")
    report.print_table()
    return prompts


def tokenize_prompts(
    records: list[PromptRow], template: PromptTemplate, lengths: TruncationPolicy, report: DatasetReport
) -> list[TokenizedPrompt]:
    """Render and tokenize prompts; each keeps its row, with the rendered text under "prompt"."""
    texts = [template.render(each.prompt, each.fields, each.origin) for each in records]
    rows = []
    for record, text, prompt_ids in zip(records, texts, template.encode(texts)):
        prompt = lengths.fit_prompt(prompt_ids, template.bos_ids, record.origin, report)
        if prompt is not None:
            rows.append(TokenizedPrompt(prompt, {**record.fields, "prompt": text}, to_messages(record.prompt)))
    return rows
