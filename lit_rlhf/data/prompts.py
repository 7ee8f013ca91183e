"""Prompts to be answered, for PPO (the paper's step 3)."""

from __future__ import annotations

from typing import Any, Literal

from lightning import LightningDataModule

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.collation import PromptTokens, collate_prompts
from lit_rlhf.data.formats import read_records
from lit_rlhf.data.lengths import LengthPolicy
from lit_rlhf.data.loader import PlannedLoader, endless_places
from lit_rlhf.data.planned import module_tokenizer, no_validation
from lit_rlhf.data.prompting import PromptTemplate
from lit_rlhf.data.records import PromptRow
from lit_rlhf.data.report import PreparationReport
from lit_rlhf.data.sources import read_rows
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

    def __init__(self, prompts: list[PromptTokens], pad_id: int, seed: int = 0) -> None:
        assert prompts, "a prompt source needs a prompt"
        self.prompts = prompts
        self.pad_id = pad_id
        self.seed = seed

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(each.ids) for each in self.prompts)

    def rows(self, iteration: int, count: int) -> list[PromptTokens]:
        """The `count` prompts of an iteration (counted from 0), over all ranks."""
        places = endless_places(len(self.prompts), self.seed, iteration * count, count)
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

    def collate(self, prompts: list[PromptTokens], index: Any) -> PromptBatch:
        """Left-padded prompts; `index` holds their places in the iteration's global batch."""
        return collate_prompts(prompts, index, self.pad_id)


class PromptDataModule(LightningDataModule):
    """Hands its prompts to the module, which makes experience of them: `lightning_module.experience(prompts)`.

    The module owns the sizes. Validation yields `PromptBatch`, whose `index` is the prompt's place in the validation
    data; a rank without a prompt left repeats another rank's with `index` -1, not to be counted.

    Args:
        path: A local file or a hub name; demonstrations and comparisons serve as well, their prompts are taken.
        validation_path: The same, for validation.
        format: "auto", a format's name, or the dotted path of your own function; see `lit_rlhf.data.formats`.
        template: How prompts are put into words; see `lit_rlhf.data.prompting.PromptTemplate`. Use the one that the
            policy was fine-tuned with.
        max_prompt_length: In tokens; longer ones go by `long_prompts`.
        long_prompts: "drop" the prompt, or "truncate" it to its end. Both are counted and printed.
        validation_micro_batch: Validation prompts per rank and batch.
        seed: Keys the order of prompts.
    """

    def __init__(
        self,
        path: str,
        validation_path: str | None = None,
        format: str = "auto",
        template: str | None = None,
        max_prompt_length: int = 1024,
        long_prompts: Literal["drop", "truncate"] = "drop",
        validation_micro_batch: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.path = path
        self.validation_path = validation_path
        self.format = format
        self.template = template
        self.lengths = LengthPolicy(max_prompt_length, long_prompts=long_prompts).checked()
        if validation_micro_batch < 1:
            raise UserError(f"validation_micro_batch: {validation_micro_batch} must be at least 1")
        self.validation_micro_batch = validation_micro_batch
        self.seed = seed
        self.prompts: PromptSource | None = None
        self.validation_prompts: PromptSource | None = None

    def setup(self, stage: str) -> None:
        """Read and tokenise, once."""
        if self.prompts is not None:
            return
        self.prompts = self._source(self.path)
        if self.validation_path is not None:
            self.validation_prompts = self._source(self.validation_path)

    def _source(self, path: str) -> PromptSource:
        tokenizer = module_tokenizer(self)
        report = PreparationReport(path)
        records = read_records(read_rows(path), "prompt", PromptRow, self.format, report)
        prompts = tokenise_prompts(records, PromptTemplate(tokenizer, self.template), self.lengths, report)
        report.require_some("prompt")
        report.show()
        return PromptSource(prompts, tokenizer.pad_token_id, self.seed)

    def train_dataloader(self) -> Any:
        """The module's experience loader over these prompts."""
        assert self.trainer is not None and self.prompts is not None
        module: Any = self.trainer.lightning_module
        return module.experience(self.prompts)

    def val_dataloader(self) -> PlannedLoader[tuple[int, PromptTokens], PromptBatch] | list[Any]:
        """The validation prompts, every one once, in order; nothing where there are none."""
        source = self.validation_prompts
        if source is None:
            return no_validation()
        assert self.trainer is not None

        def collate(rows: list[tuple[int, PromptTokens]], normalizer: float) -> PromptBatch:
            return source.collate([prompt for _, prompt in rows], [place for place, _ in rows])

        return PlannedLoader(
            list(enumerate(source.prompts)),
            collate,
            micro_batch=self.validation_micro_batch,
            world_size=self.trainer.world_size,
            rank=self.trainer.global_rank,
            shuffle=False,
            drop_last=False,
            blank=lambda row: (-1, row[1]),
        )


def tokenise_prompts(
    records: list[PromptRow], template: PromptTemplate, lengths: LengthPolicy, report: PreparationReport
) -> list[PromptTokens]:
    """Prompt ids, and the row with "prompt" as the model sees it."""
    texts = [template.render(each.prompt, each.fields, each.origin) for each in records]
    rows = []
    for record, text, prompt_ids in zip(records, texts, template.encode(texts)):
        prompt = lengths.fit_prompt(prompt_ids, template.leading, record.origin, report)
        if prompt is not None:
            rows.append(PromptTokens(prompt, {**record.fields, "prompt": text}))
    return rows
