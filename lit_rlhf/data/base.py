"""What the data modules of demonstrations, comparisons and pretraining text share: planned loaders and a position."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lightning import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.data.loader import ResumableLoader, data_ranks
from lit_rlhf.data.preprocessing.keys import prompt_key
from lit_rlhf.data.preprocessing.settings import Preprocessing
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

R = TypeVar("R")  # a tokenised row


class TokenizedDataModule(LightningDataModule, Generic[R]):
    """Tokenises once, in `setup`, with the module's own tokenizer; loads by plan (`ResumableLoader`).

    The training position is kept in the data module's state as well as in the loader's: Lightning restores a loader's
    state only from checkpoints in mid-epoch.

    Args:
        path: The training data; see `lit_rlhf.data.sources.read_rows`.
        validation_path: The validation data; None takes `validation_fraction` of the training data.
        validation_fraction: Share of the training data's distinct prompts (or documents) held out for validation.
        micro_batch_size: Rows per rank and backward.
        seed: Keys the order of rows, and the held-out part.
        batching: How the rows of a minibatch are dealt to micro-batches, which changes no loss: "by_length", in the
            order of length, which saves padding; "packed", all behind each other in one row, which saves all of it;
            "as_drawn".
    """

    def __init__(
        self,
        path: str,
        validation_path: str | None,
        validation_fraction: float,
        micro_batch_size: int,
        seed: int,
        batching: str,
    ) -> None:
        super().__init__()
        check_validation(validation_path, validation_fraction)
        if micro_batch_size < 1:
            raise UserError(f"micro_batch_size: {micro_batch_size} must be at least 1")
        self.path = path
        self.validation_path = validation_path
        self.validation_fraction = validation_fraction
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.batching = batching
        self.training_rows: Sequence[R] | None = None
        self.validation_rows: Sequence[R] = []
        self._loader: ResumableLoader[R, Any] | None = None
        self._loaded_state: dict[str, int] | None = None

    #: what to lower where rows are too long for the model
    length_settings = "data.max_prompt_length or data.max_completion_length"

    @abstractmethod
    def read(self) -> tuple[Sequence[R], Sequence[R]]:
        """The tokenised rows of training and of validation; prints what was left out of both."""

    @abstractmethod
    def collate(self, rows: list[Any], normalizer: float) -> Any:
        """A batch of rows."""

    @abstractmethod
    def num_targets(self, row: R) -> int:
        """Targets of a row."""

    @abstractmethod
    def length(self, row: R) -> int:
        """Width of a row."""

    @abstractmethod
    def without_targets(self, row: R) -> R:
        """A copy of a row that has no target."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the module that is trained."""
        return module_tokenizer(self)

    def setup(self, stage: str) -> None:
        """Read and tokenise, once; a new fit begins at the first epoch."""
        self._loader, self._loaded_state = None, None
        if self.training_rows is None:
            self.training_rows, self.validation_rows = self.read()

    def check_max_positions(self, longest: int, path: str) -> None:
        """Let the module refuse rows that its model has no positions for, before it reads any weight."""
        assert self.trainer is not None
        check = getattr(self.trainer.lightning_module, "check_max_positions", None)
        if check is not None:
            check(longest, f"the longest row of {path!r}", self.length_settings)

    def train_dataloader(self) -> ResumableLoader[R, Any]:
        """The training loader, at the position of the checkpoint or of its predecessor."""
        assert self.trainer is not None
        state = self.state_dict() or self._loaded_state
        self._loader = self._make_loader(training=True)
        if state:
            self._loader.load_state_dict(state)
        loader = self._loader
        rank_zero_info(
            f"{len(loader.rows):,} rows: {loader.minibatches:,} minibatches of {loader.shape.minibatch:,} = "
            f"micro_batch_size {loader.shape.micro_batch_size} × accumulate_grad_batches {loader.shape.accumulate_grad_batches} × "
            f"{loader.shape.world_size} ranks; {loader.num_dropped:,} rows are left out of each epoch"
        )
        return loader

    def val_dataloader(self) -> ResumableLoader[R, Any] | list[Any]:
        """The validation loader: every row once, in order; nothing where there is no validation data."""
        return self._make_loader(training=False) if self.validation_rows else no_validation()

    def _make_loader(self, training: bool) -> ResumableLoader[R, Any]:
        assert self.trainer is not None and self.training_rows is not None
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError(
                "GradientAccumulationScheduler: a minibatch is planned before it is cut, so its size cannot change in "
                "training; remove the callback and set the Trainer's accumulate_grad_batches"
            )
        packed = self.batching == "packed"
        world_size, rank = data_ranks(self.trainer)
        return ResumableLoader(
            self.training_rows if training else self.validation_rows,
            self.collate,
            micro_batch_size=self.micro_batch_size,
            accumulate=self.trainer.accumulate_grad_batches if training else 1,
            world_size=world_size,
            rank=rank,
            seed=self.seed,
            shuffle=training,
            drop_last=training,
            weight=self.num_targets,
            length=self.length if packed or (self.batching == "by_length" and training) else None,
            packed=packed,
            blank=self.without_targets,
        )

    def state_dict(self) -> dict[str, int]:
        """Epoch and position of the training loader."""
        if self._loader is None:
            return {}
        state = self._loader.state_dict()
        # under limit_train_batches an epoch ends before the loader does
        if self.trainer is not None and 0 < self.trainer.num_training_batches <= state["position"]:
            return {"epoch": state["epoch"] + 1, "position": 0}
        return state

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Kept until the training loader is made."""
        self._loaded_state = dict(state_dict)


def module_tokenizer(data: LightningDataModule) -> PreTrainedTokenizerBase:
    """The tokenizer of the module that a data module is trained with."""
    assert data.trainer is not None and data.trainer.lightning_module is not None, "setup runs under a Trainer"
    tokenizer: PreTrainedTokenizerBase = data.trainer.lightning_module.tokenizer
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"the tokenizer has no {name.removesuffix('_id')}: set one in its folder")
    return tokenizer


def check_validation(path: str | None, fraction: float) -> None:
    """Refuse settings of validation data that contradict each other."""
    if not 0.0 <= fraction < 1.0:
        raise UserError(f"validation_fraction: {fraction} must be at least 0 and below 1")
    if path is not None and fraction:
        raise UserError("validation_path and validation_fraction exclude each other: set one of them")


def no_validation() -> list[Any]:
    """No validation loader, and no warning of it from Lightning: it was not asked for."""
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
    return []


class PreprocessedDataModule(TokenizedDataModule[R]):
    """One whose records go through a `Preprocessing`."""

    preprocessing: Preprocessing

    @abstractmethod
    def records(self, path: str, report: DatasetReport) -> list[Any]:
        """The records of a dataset."""

    @abstractmethod
    def tokenize(self, records: list[Any], report: DatasetReport) -> Sequence[R]:
        """Records to tokenised rows."""

    def read(self) -> tuple[Sequence[R], Sequence[R]]:
        """The tokenised rows of training and of validation, as the preparation leaves them."""
        validation_rows: Sequence[R] = []
        report = DatasetReport(self.path)
        read = self.records(self.path, report)
        records, held_out = self.preprocessing.training(read, self.validation_fraction, self.seed, report)
        training_rows = self._tokenize(records, report)
        if held_out:
            validation_rows = self._tokenize(held_out, report)
            report.held_out(len(validation_rows), len(training_rows))
        report.show()
        self.check_max_positions(max(map(self.length, training_rows)), self.path)
        if self.validation_path is not None:
            report = DatasetReport(self.validation_path)
            seen = {prompt_key(each) for each in read}
            validation = self.preprocessing.validation(
                self.records(self.validation_path, report), seen, self.seed, report
            )
            validation_rows = self._tokenize(validation, report)
            report.show()
        if validation_rows:
            self.check_max_positions(max(map(self.length, validation_rows)), self.validation_path or self.path)
        return training_rows, validation_rows

    def _tokenize(self, records: list[Any], report: DatasetReport) -> Sequence[R]:
        rows = self.tokenize(records, report)
        if not rows:
            raise UserError(f"no row is left of {report.source!r}: {report.summary()}")
        return rows
