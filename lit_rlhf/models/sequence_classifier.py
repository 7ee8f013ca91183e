"""Sequence classifiers of transformers, decoders and encoders, computed in batches whose padding changes no output.

Shapes: `n` rows, `C` labels.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    TextClassificationPipeline,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models.given import ModelSource, TokenizerSource, model_name, resolve_model, resolve_tokenizer
from lit_rlhf.models.loading import is_decoder_only, load_config, max_positions
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.pretrained import load_weights

ClassifierSource: TypeAlias = ModelSource | Path | TextClassificationPipeline
"""A folder or a hub name, or a classifier or text-classification pipeline that was loaded already."""

Features = dict[str, list[int]]  # of one row, as a tokenizer returns them: input_ids, token_type_ids, …
TOLERANCE = 1e-2  # relative: over rounding in bfloat16, under what a wrong position or mask changes


def resolve_classifier(
    model: Any, tokenizer: TokenizerSource | None, setting: str
) -> tuple[ModelSource, Tokenizer | str]:
    """Return a classifier as a setting gives it, and what its tokenizer is loaded from; of a pipeline, its own.

    Raises:
        UserError: As `resolve_model` and `resolve_tokenizer`.
    """
    if isinstance(model, TextClassificationPipeline):
        model, tokenizer = model.model, model.tokenizer if tokenizer is None else tokenizer
    source = resolve_model(model, setting)
    return source, resolve_tokenizer(tokenizer, source)


def load_sequence_classifier(model: ModelSource, loading: ModelLoadingConfig, **settings: Any) -> PreTrainedModel:
    """Load a classifier in evaluation mode; one that is an object is put into it.

    Args:
        model: Folder or hub name, also of a PEFT adapter; or a classifier.
        loading: How to load.
        settings: Of `from_pretrained`.

    Raises:
        UserError: No such model, one of another kind, or one whose head is not in its files.
    """
    config = load_config(model, loading)
    if isinstance(model, str) or type(model).__module__.startswith("transformers."):  # others have names of their own
        check_sequence_classifier(config, model_name(model), loading)
    if isinstance(model, PreTrainedModel):
        return model.eval()
    # classifiers may hold a pooler or a language model's head that they do not use
    loaded, _ = load_weights(AutoModelForSequenceClassification, model, config, loading, unused=("",), **settings)
    classifier: PreTrainedModel = loaded.eval().requires_grad_(False)
    return classifier


def check_sequence_classifier(config: PretrainedConfig, model: str, loading: ModelLoadingConfig) -> None:
    """Refuse a model of another kind, whose head transformers would draw at random; reads its configuration alone."""
    names = config.architectures or ["model without a head"]
    if loading.trust_remote_code and "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {}):
        return  # a class of its own name, whose weights are checked when it is loaded
    if not any(name.endswith("ForSequenceClassification") for name in names):
        raise UserError(f"model: {model!r} is a {names[0]}, not a sequence classifier")


def find_label(labels: dict[int, str], label: str | int | None, model: str) -> int:
    """Return the index of a label, given by name or index; None is the only one.

    Raises:
        UserError: There is no such label, or several and none is chosen.
    """
    if label is None:
        if len(labels) > 1:
            raise UserError(f"label: {model!r} has {len(labels)} labels ({', '.join(labels.values())}); choose one")
        return 0
    if str(label).isdigit() and int(label) in labels:
        return int(label)
    indices = {name.lower(): index for index, name in labels.items()}
    if str(label).lower() not in indices:
        raise UserError(f"label: {model!r} has no label {label!r}; it has {', '.join(labels.values())}")
    return indices[str(label).lower()]


def max_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> int | None:
    """Return the longest row that a classifier can compute, in tokens; None if nothing says so."""
    positions = max_positions(model.config)
    if positions is not None and positions > 0:  # -1 of XLNet, which has no limit
        embedding = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
        if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
            positions -= embedding.padding_idx + 1  # RoBERTa counts from behind its padding token
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit is not None and 0 < limit < 10**9]
    return min(limits, default=None)


class BatchClassifier:
    """Computes logits in batches of similar length; each row has those that plain transformers gives it alone.

    A decoder of transformers reads its head at the last token that is not `config.pad_token_id`, whatever the attention
    mask says: where padding is the end token, at the token before a row's end token. So rows are padded with that id;
    without one, with an id that ends no row of the batch. Whether padding changes an output is tried out once; then
    only rows of one length are computed together.

    Args:
        model: The classifier, in evaluation mode.
        tokenizer: Its tokenizer.
        batch_size: Rows per forward pass.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.accepted = inspect.signature(type(model).forward).parameters  # a tokenizer may return more
        self.is_decoder = is_decoder_only(model.config)
        self.pads_left = tokenizer.padding_side == "left" and not self.is_decoder
        self.one_length_per_batch = False
        self.one_length_per_batch = not self._padding_changes_nothing()

    @torch.no_grad()
    def logits(self, rows: Sequence[Features]) -> Tensor:
        """Compute the logits of each row, in the order of the rows.

        Args:
            rows: n rows of at least one token.

        Returns:
            (n, C) float32 on the CPU.
        """
        logits = torch.empty(len(rows), self.model.config.num_labels, dtype=torch.float32)
        for chunk in self._chunks([len(row["input_ids"]) for row in rows]):
            logits[chunk] = self._forward([rows[index] for index in chunk])
        return logits

    def _chunks(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield the indices of each batch."""
        chunk: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
            another_length = self.one_length_per_batch and chunk and lengths[index] != lengths[chunk[0]]
            if len(chunk) == self.batch_size or another_length:
                yield chunk
                chunk = []
            chunk.append(index)
        if chunk:
            yield chunk

    def _forward(self, rows: list[Features]) -> Tensor:
        pad_id, device = self._pad_id(rows), self.model.device
        fill = {"input_ids": pad_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        rows = [{"attention_mask": [1] * len(row["input_ids"])} | row for row in rows]
        names = [name for name in rows[0] if name in self.accepted]
        batch = {name: self._pad([row[name] for row in rows], fill.get(name, 0)).to(device) for name in names}
        with padding_id(self.model.config, pad_id):
            output: Tensor = self.model(**batch).logits
        return output.float().cpu()

    def _pad_id(self, rows: list[Features]) -> int:
        own: int | None = self.model.config.get_text_config().pad_token_id
        if own is not None:
            return own
        if not self.is_decoder:
            return self.tokenizer.pad_token_id or 0
        ends = {row["input_ids"][-1] for row in rows}
        return next(index for index in range(len(ends) + 1) if index not in ends)

    def _pad(self, rows: list[list[int]], fill: int) -> Tensor:
        width = max(map(len, rows))
        missing = [[fill] * (width - len(row)) for row in rows]
        return torch.tensor([pad + row if self.pads_left else row + pad for row, pad in zip(rows, missing)])

    @torch.no_grad()
    def _padding_changes_nothing(self) -> bool:
        """Compute two rows alone and together."""
        rows = [dict(self.tokenizer(text)) for text in ("one", "one two three four five six seven")]
        if not all(row["input_ids"] for row in rows):
            return False
        alone = torch.cat([self._forward([row]) for row in rows])
        together = self._forward(rows)
        return bool(((alone - together).abs() <= TOLERANCE * (1 + alone.abs())).all())


@contextmanager
def padding_id(config: PretrainedConfig, pad_id: int) -> Iterator[None]:
    """Within the context, a model's configuration names this padding token."""
    text = config.get_text_config()
    before = text.pad_token_id
    text.pad_token_id = pad_id
    try:
        yield
    finally:
        text.pad_token_id = before
