"""A scorer behind HTTP.

A request is `POST {"prompts": [...], "responses": [...], "rows": [...]}` and its answer `{"scores": [...]}`, one
number a response. Under `send_ids` the request has `prompt_ids` and `response_ids` as well.
"""

import json
import os
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.http import CredentialsRefused, JSONClient, RequestFailed
from lit_rlhf.rollout.experience import Episodes

LARGEST = torch.finfo(torch.float32).max
Payload = dict[str, list[Any]]


class RemoteReward:
    """Scores by an HTTP server; see `lit_rlhf.rewards.remote` for what is sent and answered.

    A batch that stays without a score for each response after all tries ends the run: nothing is made up in its place.
    `prepare` sends an empty batch, to be answered by no scores: a wrong address or token shows before anything is
    loaded.

    Args:
        url: where to post; without a user name or password.
        batch_size: episodes a request.
        parallel: requests under way at once, from each rank.
        timeout: seconds to wait for a connection, and for an answer to go on.
        retries: further tries after a failure that may pass: no connection, a time-out, status 408, 429 or 5xx, or an
            answer that is no list of finite numbers, one each.
        pause: seconds before the second try; each further pause is twice as long, to 60 s. A longer `Retry-After` of
            the server is kept to, up to ten minutes.
        token_variable: environment variable with a bearer token; where it is not set, none is sent.
        send_ids: send the token ids too, for a server with the policy's tokenizer.
    """

    def __init__(
        self,
        url: str,
        batch_size: int = 64,
        parallel: int = 4,
        timeout: float = 60.0,
        retries: int = 5,
        pause: float = 1.0,
        token_variable: str = "LIT_RLHF_REWARD_TOKEN",
        send_ids: bool = False,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"reward: RemoteReward.batch_size must be at least 1, got {batch_size}")
        token = os.environ.get(token_variable)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.client = JSONClient(url, headers, timeout, retries, pause, parallel=parallel)
        self.batch_size, self.send_ids = batch_size, send_ids
        self.name = f"reward {self.client.public(url)}"
        self.advice = f"it comes from the environment variable {token_variable}, which is {'' if token else 'not '}set"

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Ask for the scores of nothing."""
        names = ["prompts", "responses", "rows", *(["prompt_ids", "response_ids"] if self.send_ids else [])]
        self.ask([{name: [] for name in names}])

    def score(self, episodes: Episodes) -> Tensor:
        """See `Reward.score`."""
        starts = range(0, len(episodes.responses), self.batch_size)
        scores = self.ask([self.payload(episodes, slice(start, start + self.batch_size)) for start in starts])
        return torch.tensor(scores, device=episodes.input_ids.device)

    def payload(self, episodes: Episodes, rows: slice) -> Payload:
        """Return what is posted for some rows."""
        payload: Payload = {
            "prompts": episodes.prompts[rows],
            "responses": episodes.responses[rows],
            "rows": json.loads(json.dumps(episodes.rows[rows], default=str)),  # a table may hold dates
        }
        if self.send_ids:
            ids = [episodes.token_ids(row) for row in range(len(episodes.responses))[rows]]
            payload |= {"prompt_ids": [prompt for prompt, _ in ids], "response_ids": [response for _, response in ids]}
        return payload

    def ask(self, payloads: list[Payload]) -> list[float]:
        """Return the scores of all payloads, in order.

        Raises:
            UserError: a payload stays without them.
        """
        scores: list[float] = []
        try:
            for answer in self.client.ask_all(payloads, read_scores):
                if isinstance(answer, RequestFailed):
                    raise UserError(f"{self.name}: {answer.reason}; is this the address, and is the server up?")
                scores += answer
        except CredentialsRefused as refusal:
            raise UserError(f"reward {refusal}; {self.advice}") from None
        return scores


def read_scores(answer: Any, payload: Payload) -> list[float]:
    """Return the scores of an answer, one for each response of the payload.

    Raises:
        ValueError: it is not what was agreed.
    """
    count, scores = len(payload["responses"]), answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise ValueError('it must be {"scores": [...]}')
    if len(scores) != count:
        raise ValueError(f"{len(scores)} scores for {count} responses; return one each")
    for place, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= LARGEST:
            raise ValueError(f"score {place} of {count} is {score!r:.40}, no finite number")
    return [float(score) for score in scores]
