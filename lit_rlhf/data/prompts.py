"""Prompts to be answered, for PPO (the paper's step 3)."""

from __future__ import annotations

from typing import Any, Literal

from lightning import LightningDataModule

from lit_rlhf.data.base import check_validation, module_tokenizer, no_validation
from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.collation import TokenizedPrompt, collate_prompts
from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.loader import ResumableLoader, data_ranks, infinite_permutation
from lit_rlhf.data.preprocessing.keys import prompt_key
from lit_rlhf.data.preprocessing.settings import Preprocessing
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.records import PromptRow
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows
from lit_rlhf.data.truncation import TruncationPolicy
from lit_rlhf.errors import UserError


class PromptSource:
    """An endless, ordered supply of prompts: passes over the data, each in an order of its own, without replacement.

    Which prompts an iteration gets depends on (seed, iteration, count) alone, not on how many ranks share them, so a
    resumed run needs the iteration's number and no other state.

    Args:
        prompts: The tokenised prompts.
        pad_id: What fills a batch on the left.
        seed: Keys the orders.
    """

    def __init__(self, prompts: list[TokenizedPrompt], pad_id: int, seed: int = 0) -> None:
        assert prompts, "a prompt source needs a prompt"
        self.prompts = prompts
        self.pad_id = pad_id
        self.seed = seed

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(each.input_ids) for each in self.prompts)

    def rows(self, iteration: int, count: int) -> list[TokenizedPrompt]:
        """The `count` prompts of an iteration (counted from 0), over all ranks."""
        places = infinite_permutation(len(self.prompts), self.seed, iteration * count, count)
        return [self.prompts[place] for place in places]

    def batch(self, iteration: int, count: int, rank: int = 0, world_size: int = 1) -> PromptBatch:
        """This rank's consecutive share of an iteration's `count` prompts, with their places in the whole.

        Raises:
            UserError: `count` does not divide over the ranks.
        """
        share, rest = divmod(count, world_size)
        if rest or not share:
            raise UserError(f"{count} prompts an iteration do not divide over {world_size} ranks")
        places = range(rank * share, (rank + 1) * share)
        rows = self.rows(iteration, count)
        return self.collate([rows[place] for place in places], places)

    def collate(self, prompts: list[TokenizedPrompt], index: Any) -> PromptBatch:
        """Left-padded prompts; `index` holds their places in the iteration's global batch."""
        return collate_prompts(prompts, index, self.pad_id)


class PromptDataModule(LightningDataModule):
    """Hands its prompts to the module, which makes experience of them: `lightning_module.experience(prompts)`.

    The module owns the sizes. Validation yields `PromptBatch`, whose `index` is the prompt's place in the validation
    data; a rank without a prompt left repeats another rank's with `index` -1, not to be counted.

    Args:
        path: A local file or a hub name; demonstrations and comparisons serve as well, their prompts are taken.
        validation_path: The same, for validation.
        validation_fraction: Share of the distinct prompts held out for validation, where there is no
            `validation_path`.
        format: "auto", a format's name, or the dotted path of your own function; see `lit_rlhf.data.formats.registry`.
        template: How prompts are put into words; see `lit_rlhf.data.prompt_template.PromptTemplate`. Use the one that the
            policy was fine-tuned with.
        max_prompt_length: In tokens; longer ones go by `overlong_prompts`.
        overlong_prompts: "drop" the prompt, or "truncate" it to its end. Both are counted and printed.
        preprocessing: The paper's data steps; see `lit_rlhf.data.preprocessing.settings.Preprocessing`.
        validation_batch_size: Validation prompts per rank and batch.
        seed: Keys the order of prompts and the held-out part.
    """

    def __init__(
        self,
        path: str,
        validation_path: str | None = None,
        validation_fraction: float = 0.0,
        format: str = "auto",
        template: str | None = None,
        max_prompt_length: int = 1024,
        overlong_prompts: Literal["drop", "truncate"] = "drop",
        preprocessing: Preprocessing | None = None,
        validation_batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_validation(validation_path, validation_fraction)
        self.path = path
        self.validation_path = validation_path
        self.validation_fraction = validation_fraction
        self.format = format
        self.template = template
        self.lengths = TruncationPolicy(max_prompt_length, overlong_prompts=overlong_prompts).checked()
        self.preprocessing = (preprocessing or Preprocessing()).checked(validation_fraction)
        if validation_batch_size < 1:
            raise UserError(f"validation_batch_size: {validation_batch_size} must be at least 1")
        self.validation_batch_size = validation_batch_size
        self.seed = seed
        self.prompts: PromptSource | None = None
        self.validation_prompts: PromptSource | None = None

    def setup(self, stage: str) -> None:
        """Read and tokenise, once."""
        if self.prompts is not None:
            return
        report = DatasetReport(self.path)
        read = self.records(self.path, report)
        records, held_out = self.preprocessing.training(read, self.validation_fraction, self.seed, report)
        self.prompts = self._source(records, report)
        if held_out:
            self.validation_prompts = self._source(held_out, report)
            held = len(self.validation_prompts)
            report.remark(f"rows held out for validation: {held:,}; left: {len(self.prompts):,}")
        report.show()
        if self.validation_path is not None:
            report = DatasetReport(self.validation_path)
            validation = self.records(self.validation_path, report)
            trained = {prompt_key(record) for record in read}
            validation = self.preprocessing.validation(validation, trained, self.seed, report)
            self.validation_prompts = self._source(validation, report)
            report.show()

    def records(self, path: str, report: DatasetReport) -> list[PromptRow]:
        """Prompts as they were written."""
        return read_records(read_rows(path), "prompt", PromptRow, self.format, report)

    def _source(self, records: list[PromptRow], report: DatasetReport) -> PromptSource:
        tokenizer = module_tokenizer(self)
        prompts = tokenize_prompts(records, PromptTemplate(tokenizer, self.template), self.lengths, report)
        if not prompts:
            raise UserError(f"no prompt is left of {report.source!r}: {report.summary()}")
        return PromptSource(prompts, tokenizer.pad_token_id, self.seed)

    def train_dataloader(self) -> Any:
        """The module's experience loader over these prompts."""
        assert self.trainer is not None and self.prompts is not None
        module: Any = self.trainer.lightning_module
        return module.experience(self.prompts)

    def val_dataloader(self) -> ResumableLoader[tuple[int, TokenizedPrompt], PromptBatch] | list[Any]:
        """The validation prompts, every one once, in order; nothing where there are none."""
        source = self.validation_prompts
        if source is None:
            return no_validation()
        assert self.trainer is not None

        def collate(rows: list[tuple[int, TokenizedPrompt]], normalizer: float) -> PromptBatch:
            return source.collate([prompt for _, prompt in rows], [place for place, _ in rows])

        world_size, rank = data_ranks(self.trainer)
        return ResumableLoader(
            list(enumerate(source.prompts)),
            collate,
            micro_batch_size=self.validation_batch_size,
            world_size=world_size,
            rank=rank,
            shuffle=False,
            drop_last=False,
            blank=lambda row: (-1, row[1]),
        )


def read_prompts(path: str, format: str, template: PromptTemplate, lengths: TruncationPolicy) -> list[TokenizedPrompt]:
    """The tokenised prompts of a source, for those who answer some beside a data module; prints what was left out.

    Raises:
        UserError: The data cannot be read, or no prompt is left.
    """
    report = DatasetReport(path)
    records = read_records(read_rows(path), "prompt", PromptRow, format, report)
    prompts = tokenize_prompts(records, template, lengths, report)
    report.require_some("prompt")
    report.show()
    return prompts


def tokenize_prompts(
    records: list[PromptRow], template: PromptTemplate, lengths: TruncationPolicy, report: DatasetReport
) -> list[TokenizedPrompt]:
    """Prompt ids, and the row with "prompt" as the model sees it."""
    texts = [template.render(each.prompt, each.fields, each.origin) for each in records]
    rows = []
    for record, text, prompt_ids in zip(records, texts, template.encode(texts)):
        prompt = lengths.fit_prompt(prompt_ids, template.leading, record.origin, report)
        if prompt is not None:
            rows.append(TokenizedPrompt(prompt, {**record.fields, "prompt": text}))
    return rows
