"""What the data modules share: tokenizing in `setup`, resumable loaders, and what the trained module may refuse."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lightning import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.data.loader import (
    BatchShape,
    ResumableLoader,
    batch_sizes,
    check_position,
    convert_batch_progress,
    get_dp_world_size_and_rank,
)
from lit_rlhf.data.preprocessing.keys import prompt_key
from lit_rlhf.data.preprocessing.settings import Preprocessing
from lit_rlhf.data.report import DataReader, DatasetReport
from lit_rlhf.data.sources import DataSource, held_rows, source_key, source_name
from lit_rlhf.data.truncation import TruncationPolicy
from lit_rlhf.errors import UserError
from lit_rlhf.importing import Function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

R = TypeVar("R")  # a tokenized row


class DataRequirements:
    """Optional base of a LightningModule: what it refuses of the data, before any weight is loaded.

    The data modules call these methods in `setup`. A module without this base class is trained on rows of any length,
    and never on packed rows.
    """

    def check_max_positions(self, tokens: int, what: str, setting: str) -> None:
        """Raise `UserError` if the model has fewer positions than `tokens`; by default, none is refused.

        Args:
            tokens: Length of the longest sequence.
            what: That sequence, for the error message.
            setting: The setting to lower, for the error message.
        """

    def check_packing(self, max_tokens: int, setting: str) -> None:
        """Raise `UserError` if attention would cross the sequences of a packed row; by default, always.

        Args:
            max_tokens: Length of the longest sequence.
            setting: The setting that asks for packing, for the error message.
        """
        raise packing_unsupported(self, setting)


def packing_unsupported(module: object, setting: str) -> UserError:
    """Build the error for a module that does not support packed rows."""
    return UserError(
        f"{setting}: 'packing' is for modules that keep the sequences of a row separate, "
        f"{type(module).__name__} has no check_packing; use 'group_by_length'"
    )


class TokenizedDataModule(LightningDataModule, DataReader, Generic[R]):
    """Base of data modules that tokenize once, in `setup`, with the module's own tokenizer.

    The position in the training data is kept in the data module's state as well as in the loader's: Lightning restores
    a loader's state only from mid-epoch checkpoints.

    Args:
        path: The training data; see `lit_rlhf.data.sources.read_rows`.
        validation_path: The validation data; None takes `validation_fraction` of the training data.
        validation_fraction: Fraction of the training data's distinct prompts (or documents) held out for validation.
        micro_batch_size: Rows per rank and backward pass.
        seed: Seeds the order of rows and the held-out part.
        batching: How the rows of a minibatch are assigned to micro-batches; the loss does not depend on it.
            "group_by_length": rows of similar length together, to save padding; "packing": the rows of a micro-batch
            concatenated to one row, without padding; "none": in the shuffled order.
    """

    def __init__(
        self,
        path: DataSource,
        validation_path: DataSource | None,
        validation_fraction: float,
        micro_batch_size: int,
        seed: int,
        batching: str,
    ) -> None:
        super().__init__()
        check_validation_settings(validation_path, validation_fraction)
        if micro_batch_size < 1:
            raise UserError(f"micro_batch_size: {micro_batch_size} must be at least 1")
        self.path = held_rows(path)
        self.validation_path = None if validation_path is None else held_rows(validation_path)
        self.validation_fraction = validation_fraction
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.batching = batching
        self.training_rows: Sequence[R] | None = None
        self.validation_rows: Sequence[R] = []
        self._loader: ResumableLoader[R, Any] | None = None
        self._loaded_state: dict[str, Any] | None = None

    #: the settings to lower if rows are too long for the model, for error messages
    length_settings = "data.max_prompt_length or data.max_completion_length"

    @abstractmethod
    def load_rows(self) -> tuple[Sequence[R], Sequence[R]]:
        """Return the tokenized training and validation rows; print what was skipped."""

    @abstractmethod
    def collate(self, rows: list[Any], normalizer: float) -> Any:
        """Build a batch of rows."""

    @abstractmethod
    def num_targets(self, row: R) -> int:
        """Return the number of targets of the loss in a row."""

    @abstractmethod
    def length(self, row: R) -> int:
        """Return the length of a row in tokens."""

    @abstractmethod
    def without_targets(self, row: R) -> R:
        """Return a copy of a row that has no targets."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the module that is trained."""
        return get_module_tokenizer(self)

    def describe_sources(self) -> dict[str, str | None]:
        """Return what `hparams` say of the data."""
        return describe_sources(self.path, self.validation_path)

    def setup(self, stage: str) -> None:
        """Read and tokenize, once; a new fit begins at the first epoch."""
        self._loader, self._loaded_state = None, None
        if self.training_rows is None:
            self.training_rows, self.validation_rows = self.load_rows()

    def check_max_positions(self, max_tokens: int, path: DataSource) -> None:
        """Let the module refuse rows that are longer than its model's positions, before it loads any weight."""
        assert self.trainer is not None
        module = self.trainer.lightning_module
        if isinstance(module, DataRequirements):
            module.check_max_positions(max_tokens, f"the longest row of {source_name(path)!r}", self.length_settings)

    def train_dataloader(self) -> ResumableLoader[R, Any]:
        """Return the training loader, at the position of the checkpoint or of the previous loader."""
        assert self.trainer is not None
        state = self.state_dict() or self._loaded_state
        self._loader = self._make_loader(training=True)
        if state:
            self._loader.load_state_dict(state)
        loader, shape = self._loader, self._loader.shape
        dropped = f"; {loader.num_dropped:,} rows are left out of each epoch"
        rank_zero_info(
            f"{len(loader.dataset):,} rows: {loader.num_minibatches:,} minibatches of {shape.minibatch_size:,} = "
            f"micro_batch_size {shape.micro_batch_size} × accumulate_grad_batches {shape.accumulate_grad_batches} × "
            f"{shape.world_size} ranks{dropped if loader.num_dropped else ''}"
        )
        return loader

    def val_dataloader(self) -> ResumableLoader[R, Any] | list[Any]:
        """Return the validation loader: every row once, in file order; an empty list without validation data."""
        return self._make_loader(training=False) if self.validation_rows else empty_validation_loader()

    def predict_dataloader(self) -> ResumableLoader[R, Any]:
        """Return a loader of the rows of `path`, each once, in file order."""
        assert self.training_rows is not None
        return self._make_loader(training=False, rows=self.training_rows)

    def _make_loader(self, training: bool, rows: Sequence[R] | None = None) -> ResumableLoader[R, Any]:
        assert self.trainer is not None and self.training_rows is not None
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError(
                "GradientAccumulationScheduler: a minibatch is planned before it is split, so its size cannot change "
                "in training; remove the callback and set the Trainer's accumulate_grad_batches"
            )
        packing = self.batching == "packing"
        shape = self._get_shape(training)
        return ResumableLoader(
            rows or (self.training_rows if training else self.validation_rows),
            self.collate,
            **shape._asdict(),
            seed=self.seed,
            shuffle=training,
            drop_last=training,
            num_targets=self.num_targets,
            length=self.length if packing or (self.batching == "group_by_length" and training) else None,
            packing=packing,
            without_targets=self.without_targets,
        )

    def _get_shape(self, training: bool) -> BatchShape:
        assert self.trainer is not None
        accumulate = self.trainer.accumulate_grad_batches if training else 1
        return BatchShape(self.micro_batch_size, accumulate, *get_dp_world_size_and_rank(self.trainer))

    def state_dict(self) -> dict[str, Any]:
        """Return epoch and position of the training loader, and the sizes that Lightning's counters are of."""
        if self._loader is None:
            return {}
        state, position = self._loader.state_dict(), self._loader.position
        # under limit_train_batches an epoch ends before the loader does
        if self.trainer is not None and 0 < self.trainer.num_training_batches <= position < len(self._loader):
            state |= {"epoch": state["epoch"] + 1, "rows": 0}
        return {**state, "sizes": batch_sizes(self._loader.shape)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the training loader is built, and convert Lightning's counters to the sizes of now."""
        self._loaded_state = dict(state_dict)
        if self.trainer is None or self.trainer.state.fn != "fit" or not state_dict:
            return
        shape, rows = self._get_shape(training=True), state_dict["rows"]
        check_position(rows, shape, "rows of its epoch", "the end of an epoch")
        checkpoint = self.trainer._checkpoint_connector._loaded_checkpoint  # a data module gets its own state only
        convert_batch_progress(checkpoint, rows, state_dict["sizes"], shape)


class PreprocessedDataModule(TokenizedDataModule[R]):
    """Base of data modules whose records are preprocessed, rendered by a template, and limited in length.

    Args as in `TokenizedDataModule`, and:
        format: The rows' format; see `lit_rlhf.data.formats.registry`.
        template: The prompt template; see `lit_rlhf.data.prompt_template.PromptTemplate`.
        lengths: The length limits.
        preprocessing: The data steps.
    """

    def __init__(
        self,
        path: DataSource,
        validation_path: DataSource | None,
        validation_fraction: float,
        format: str | Function,
        template: str | None,
        lengths: TruncationPolicy,
        preprocessing: Preprocessing,
        micro_batch_size: int,
        batching: str,
        seed: int,
    ) -> None:
        super().__init__(path, validation_path, validation_fraction, micro_batch_size, seed, batching)
        self.format = format
        self.template = template
        self.lengths = lengths.validated()
        self.preprocessing = preprocessing.validated(validation_fraction)

    @abstractmethod
    def load_records(self, path: DataSource, report: DatasetReport) -> list[Any]:
        """Read the records of a dataset."""

    @abstractmethod
    def tokenize(self, records: list[Any], report: DatasetReport) -> Sequence[R]:
        """Tokenize records; skipped ones are counted in `report`."""

    def load_rows(self) -> tuple[Sequence[R], Sequence[R]]:
        """Return the tokenized training and validation rows; print what was skipped."""
        training_rows, validation_rows, self.reports = load_splits(
            self.path,
            self.validation_path,
            self.validation_fraction,
            self.seed,
            self.preprocessing,
            self.load_records,
            self._tokenize,
        )
        self.check_max_positions(max(map(self.length, training_rows)), self.path)
        if validation_rows:
            longest = max(map(self.length, validation_rows))
            self.check_max_positions(longest, self.path if self.validation_path is None else self.validation_path)
        return training_rows, validation_rows

    def _tokenize(self, records: list[Any], report: DatasetReport) -> Sequence[R]:
        rows = self.tokenize(records, report)
        if not rows:
            raise UserError(f"no row is left of {report.source!r}: {report.format_summary()}")
        return rows


def load_splits(
    path: DataSource,
    validation_path: DataSource | None,
    validation_fraction: float,
    seed: int,
    preprocessing: Preprocessing,
    load_records: Callable[[DataSource, DatasetReport], list[Any]],
    tokenize: Callable[[list[Any], DatasetReport], Sequence[R]],
) -> tuple[Sequence[R], Sequence[R], tuple[DatasetReport, ...]]:
    """Read, preprocess and tokenize the training and validation data; print what was skipped.

    Args:
        path: The training data.
        validation_path: The validation data, or None.
        validation_fraction: Fraction of the training data's distinct prompts to hold out for validation.
        seed: Seeds the preprocessing and the held-out part.
        preprocessing: The data steps.
        load_records: Reads the records of a dataset.
        tokenize: Tokenizes records; raises `UserError` if none is left.

    Returns:
        The tokenized training rows; the validation rows, which are empty if neither setting asks for them; the reports
        of the datasets.
    """
    validation_rows: Sequence[R] = []
    report = DatasetReport(source_name(path))
    all_records = load_records(path, report)
    records, held_out = preprocessing.apply_to_training(all_records, validation_fraction, seed, report)
    training_rows = tokenize(records, report)
    if held_out:
        validation_rows = tokenize(held_out, report)
        report.add_validation_line(len(validation_rows), len(training_rows))
    report.print_table()
    reports: tuple[DatasetReport, ...] = (report,)
    if validation_path is not None:
        report = DatasetReport(source_name(validation_path), validation=True)
        training_prompts = {prompt_key(each) for each in all_records}
        validation = preprocessing.apply_to_validation(
            load_records(validation_path, report), training_prompts, seed, report
        )
        validation_rows = tokenize(validation, report)
        report.print_table()
        reports += (report,)
    return training_rows, validation_rows, reports


def describe_sources(path: DataSource, validation_path: DataSource | None) -> dict[str, str | None]:
    """Return what `hparams` say of the data: paths, and hashes of rows in memory."""
    validation = None if validation_path is None else source_key(validation_path)
    return {"path": source_key(path), "validation_path": validation}


def get_module_tokenizer(data: LightningDataModule) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the module that is trained on a data module."""
    assert data.trainer is not None and data.trainer.lightning_module is not None, "setup runs under a Trainer"
    tokenizer: PreTrainedTokenizerBase = data.trainer.lightning_module.tokenizer
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"the tokenizer has no {name.removesuffix('_id')}: set one in its folder")
    return tokenizer


def check_validation_settings(path: DataSource | None, fraction: float) -> None:
    """Refuse contradictory settings of the validation data."""
    if not 0.0 <= fraction < 1.0:
        raise UserError(f"validation_fraction: {fraction} must be at least 0 and below 1")
    if path is not None and fraction:
        raise UserError("validation_path and validation_fraction exclude each other: set one of them")


def empty_validation_loader() -> list[Any]:
    """Return no validation loader, and silence Lightning's warning about its length."""
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
    return []
