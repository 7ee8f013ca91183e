"""Someone's reward model: any sequence classifier of transformers, with its own tokenizer, scored on text."""

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import TextClassificationPipeline

from lit_rlhf.errors import UserError
from lit_rlhf.models.given import TokenizerSource, check_applies_to, model_name
from lit_rlhf.models.loading import check_vocabulary, load_stored_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.pretrained import say_once
from lit_rlhf.models.sequence_classifier import (
    BatchClassifier,
    ClassifierSource,
    find_label,
    load_sequence_classifier,
    max_tokens,
    resolve_classifier,
)
from lit_rlhf.rewards.base import Reward
from lit_rlhf.rewards.conversation_format import ConversationFormat
from lit_rlhf.rollout.experience import Episodes

OutputFunction = Literal["none", "sigmoid", "softmax"]


class SequenceClassifierReward(Reward):
    """A decoder or encoder with a classification head: DeBERTa, BERT, Llama, Qwen2, GPT-2 and others.

    It reads text, so that its tokenizer, chat template and padding are its own. A score is the output for one label.

    Args:
        model: folder or hub name; or a classifier, or a text-classification pipeline, that was loaded already, which is
            used as it is, in eval mode.
        template: how prompt and response become text: "chat", "pair", "concat", "response" or a jinja template, see
            `ConversationFormat`. By default the tokenizer's chat template.
        label: name or index of the label, for a model with several.
        function_to_apply: to the outputs: none (the raw score), sigmoid, or softmax over the labels. By default none,
            and of a pipeline what the pipeline applies.
        tokenizer: a tokenizer, or its folder or hub name; by default that of `model`.
        max_length: tokens of the longest text; a longer one loses its beginning, and is counted
            (`reward/truncated_fraction`). By default what the model can read.
        batch_size: texts per forward pass.
        loading: how to load it.
    """

    def __init__(
        self,
        model: ClassifierSource,
        template: str | None = None,
        label: str | int | None = None,
        function_to_apply: OutputFunction | None = None,
        tokenizer: TokenizerSource | None = None,
        max_length: int | None = None,
        batch_size: int = 64,
        loading: ModelLoadingConfig | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"reward: SequenceClassifierReward.batch_size must be at least 1, got {batch_size}")
        if isinstance(model, TextClassificationPipeline):
            function_to_apply = function_to_apply or pipeline_function(model)
        self.source, self.tokenizer = resolve_classifier(model, tokenizer, "reward")
        self.template, self.label = template, label
        self.function_to_apply: OutputFunction = function_to_apply or "none"
        self.max_length, self.batch_size, self.loading = max_length, batch_size, loading or ModelLoadingConfig()
        check_applies_to(self.source, self.loading)
        self.path = model_name(self.source)
        self.name = f"reward {self.path!r}"
        self.classifier: BatchClassifier
        self.format: ConversationFormat
        self.is_cut = torch.zeros(0)  # (B,) float32, of the episodes scored last
        self.has_warned = False

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Load model and tokenizer; refuse a wrong label, template or length."""
        own = load_stored_tokenizer(self.tokenizer, self.loading)
        model = load_sequence_classifier(self.source, self.loading)
        check_vocabulary(own, model.config, self.path, self.loading)
        self.label_index = find_label(model.config.id2label, self.label, self.path)
        limit = max_tokens(model, own)
        if limit is not None and self.max_length is not None and self.max_length > limit:
            raise UserError(f"{self.name}: max_length is {self.max_length:,}, and it can read {limit:,} tokens")
        self.format = ConversationFormat(own, self.template, self.max_length or limit, self.name)
        self.classifier = BatchClassifier(model.to(device), own, self.batch_size)
        if self.classifier.one_length_per_batch:
            say_once(f"{self.name}: padding changes its outputs, so only texts of one length are scored together")

    @property
    def offloadable(self) -> bool:
        """See `Reward.offloadable`: weights in 4 bits stay where they were quantized."""
        return self.loading.quantization is None

    def to(self, device: torch.device) -> None:
        """See `Reward.to`."""
        self.classifier.model.to(device)

    def score(self, episodes: Episodes) -> Tensor:
        """See `Reward.score`."""
        rows, cut = self.format.encode(episodes)
        self.is_cut = torch.tensor(cut, dtype=torch.float32, device=episodes.input_ids.device)
        if any(cut) and not self.has_warned:
            self.has_warned = True
            say_once(
                f"{self.name}: {sum(cut):,} of {len(cut):,} texts have more than {self.format.max_length:,} tokens and "
                "lose their beginning; reward/truncated_fraction counts them from now on"
            )
        logits = self.classifier.logits(rows)
        if self.function_to_apply == "softmax":
            logits = logits.softmax(-1)
        elif self.function_to_apply == "sigmoid":
            logits = logits.sigmoid()
        return logits[:, self.label_index].to(episodes.input_ids.device)

    def metrics(self) -> dict[str, Tensor]:
        """See `Reward.metrics`: whether a text was cut."""
        return {"reward/truncated_fraction": self.is_cut}

    def model_paths(self) -> list[str | nn.Module]:
        """See `Reward.model_paths`."""
        return [self.source]


def pipeline_function(pipeline: TextClassificationPipeline) -> OutputFunction:
    """Return what a text-classification pipeline applies to the outputs of its model: its setting or its default."""
    config, chosen = pipeline.model.config, pipeline._postprocess_params.get("function_to_apply")
    if chosen is not None:
        name: OutputFunction = chosen.name.lower()
        return name
    if config.problem_type == "regression":
        return "none"
    return "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"
