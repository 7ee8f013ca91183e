"""A reward model behind a vLLM server, or one with the same API, such as SGLang's `/v1/classify`."""

from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models.given import TokenizerSource, resolve_tokenizer
from lit_rlhf.models.loading import load_stored_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.rewards.conversation_format import ConversationFormat
from lit_rlhf.rewards.remote import Payload, RemoteReward, check_scores
from lit_rlhf.rollout.experience import Episodes

ENDPOINTS = ("classify", "pooling", "score")


class VLLMRewardModel(RemoteReward):
    """A sequence classifier that vLLM serves (`vllm serve MODEL --runner pooling`).

    Texts are rendered and tokenized here, as by `SequenceClassifierReward`, and sent as token ids: a server would add
    special tokens to a chat template that spells them already. Pairs are sent as two texts, to `/score`. Scores are
    the model's outputs without an activation, which is asked for by `use_activation`.

    Args:
        model: name under which the server has it.
        url: address of the API: it ends in `/classify`, `/pooling` or `/score`.
        template: how prompt and response become text, see `ConversationFormat`; "pair" for `/score` alone.
        label: index of the label, for a model with several.
        tokenizer: a tokenizer, or its folder or hub name; by default `model`.
        max_length: tokens of the longest text; a longer one loses its beginning. By default the tokenizer's limit.
        batch_size: episodes per request.
        parallel: concurrent requests per rank.
        timeout: seconds that an attempt may take, connecting and reading included.
        retries: further attempts after a failure that may pass, as of `RemoteReward`.
        pause: seconds before the second attempt.
        api_key_env: environment variable that holds the server's `--api-key`; if it is unset, none is sent.
    """

    def __init__(
        self,
        model: str,
        url: str = "http://127.0.0.1:8000/classify",
        template: str | None = None,
        label: int | None = None,
        tokenizer: TokenizerSource | None = None,
        max_length: int | None = None,
        batch_size: int = 64,
        parallel: int = 4,
        timeout: float = 60.0,
        retries: int = 5,
        pause: float = 1.0,
        api_key_env: str = "VLLM_API_KEY",
    ) -> None:
        super().__init__(url, batch_size, parallel, timeout, retries, pause, api_key_env)
        self.endpoint = urlsplit(url).path.rstrip("/").rpartition("/")[2]
        if self.endpoint not in ENDPOINTS:
            raise UserError(f"{self.name}: the address must end in one of /{', /'.join(ENDPOINTS)}")
        if (template == "pair") != (self.endpoint == "score"):
            raise UserError(f"{self.name}: template 'pair' and an address that ends in /score go together")
        self.model, self.template, self.label, self.max_length = model, template, label, max_length
        self.tokenizer = resolve_tokenizer(tokenizer, model)
        self.format: ConversationFormat

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Load the tokenizer, and score one short text."""
        own = load_stored_tokenizer(self.tokenizer, ModelLoadingConfig())
        limit = own.model_max_length if own.model_max_length < 10**9 else None
        self.format = ConversationFormat(own, self.template, self.max_length or limit, self.name)
        ids = torch.zeros(1, 2, dtype=torch.int64)
        probe = Episodes(ids, ids + 1, ["Hello"], ["Hello, how are you?"], [{}], 1, training=False)
        self.request_scores([self.build_payload(probe, slice(0, 1))])

    def build_payload(self, episodes: Episodes, rows: slice) -> Payload:
        """Return the request for a slice of episodes."""
        part = episodes.select(rows)
        payload: Payload = {"model": self.model, "use_activation": False}
        if self.endpoint == "score":
            return payload | {"text_1": self.format.prompts(part), "text_2": part.responses}
        encoded, _ = self.format.encode(part)
        return payload | {"input": [row["input_ids"] for row in encoded]}

    def read_response(self, answer: Any, payload: Payload) -> list[float]:
        """Return the scores in a response, one per episode of the payload.

        Raises:
            ValueError: it does not follow the protocol.
        """
        data = sorted(answer["data"], key=lambda each: each["index"])
        count = len(payload["text_1"] if self.endpoint == "score" else payload["input"])
        return check_scores([self._score(each) for each in data], count)

    def _score(self, row: dict[str, Any]) -> Any:
        """Return the score of one row of a response."""
        if self.endpoint == "score":
            return row["score"]
        outputs = row["probs"] if self.endpoint == "classify" else row["data"]
        while isinstance(outputs[0], list):  # outputs per token: a reward model's score is read at the last one
            outputs = outputs[-1]
        if self.label is None and len(outputs) > 1:
            raise UserError(f"{self.name}: {self.model!r} has {len(outputs)} labels; set label to the index of one")
        return outputs[self.label or 0]
