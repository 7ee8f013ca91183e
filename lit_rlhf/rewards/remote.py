"""A reward behind HTTP.

A request is `POST {"prompts": [...], "responses": [...], "rows": [...]}` and its response `{"scores": [...]}`, one
number per response. With `send_ids` the request has `prompt_ids` and `response_ids` as well.
"""

import json
import os
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.http import CredentialsRejected, JSONClient, RequestFailed
from lit_rlhf.rewards.base import Reward
from lit_rlhf.rollout.experience import Episodes

MAX_SCORE = torch.finfo(torch.float32).max
Payload = dict[str, Any]


class RemoteReward(Reward):
    """Scores by an HTTP server; see `lit_rlhf.rewards.remote` for the protocol.

    A batch without a score for each response after all attempts ends the run: no score is made up. `prepare` sends an
    empty batch, which must return no scores: a wrong address or token shows before anything is loaded.

    Args:
        url: of the server, without a user name or password.
        batch_size: episodes per request.
        parallel: concurrent requests per rank.
        timeout: seconds that an attempt may take, connecting and reading included.
        retries: further attempts after a failure that may pass: no connection, a timeout, a status of
            `lit_rlhf.http.RETRYABLE_STATUS`, or a response that is not a list of finite numbers, one per episode.
        pause: seconds before the second attempt; each further pause is twice as long, up to 60 s. A longer
            `Retry-After` of the server is respected, up to ten minutes.
        api_key_env: environment variable that holds a bearer token; if it is unset, none is sent.
        send_ids: send token ids as well, for a server that uses the policy's tokenizer.
    """

    def __init__(
        self,
        url: str,
        batch_size: int = 64,
        parallel: int = 4,
        timeout: float = 60.0,
        retries: int = 5,
        pause: float = 1.0,
        api_key_env: str = "LIT_RLHF_REWARD_TOKEN",
        send_ids: bool = False,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"reward: RemoteReward.batch_size must be at least 1, got {batch_size}")
        token = os.environ.get(api_key_env)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.client = JSONClient(url, headers, timeout, retries, pause, parallel=parallel)
        self.batch_size, self.send_ids = batch_size, send_ids
        self.name = f"reward {self.client.without_query(url)}"
        self.key_hint = f"it comes from the environment variable {api_key_env}, which is {'' if token else 'not '}set"

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Send an empty batch."""
        names = ["prompts", "responses", "rows", *(["prompt_ids", "response_ids"] if self.send_ids else [])]
        self.request_scores([{name: [] for name in names}])

    def score(self, episodes: Episodes) -> Tensor:
        """See `Reward.score`."""
        starts = range(0, len(episodes.responses), self.batch_size)
        scores = self.request_scores(
            [self.build_payload(episodes, slice(start, start + self.batch_size)) for start in starts]
        )
        return torch.tensor(scores, device=episodes.input_ids.device)

    def build_payload(self, episodes: Episodes, rows: slice) -> Payload:
        """Return the request for a slice of episodes."""
        payload: Payload = {
            "prompts": episodes.prompts[rows],
            "responses": episodes.responses[rows],
            "rows": json.loads(json.dumps(episodes.rows[rows], default=str)),  # a table may hold dates
        }
        if self.send_ids:
            ids = [episodes.token_ids(row) for row in range(len(episodes.responses))[rows]]
            payload |= {"prompt_ids": [prompt for prompt, _ in ids], "response_ids": [response for _, response in ids]}
        return payload

    def read_response(self, answer: Any, payload: Payload) -> list[float]:
        """Return the scores in a response, one per episode of the payload.

        Raises:
            ValueError: it does not follow the protocol.
        """
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise ValueError('it must be {"scores": [...]}')
        return check_scores(scores, len(payload["responses"]))

    def request_scores(self, payloads: list[Payload]) -> list[float]:
        """Return the scores of all payloads, in order.

        Raises:
            UserError: a payload got none after all attempts.
        """
        scores: list[float] = []
        try:
            for answer in self.client.request_all(payloads, self.read_response):
                if isinstance(answer, RequestFailed):
                    raise UserError(f"{self.name}: {answer.reason}; is this the address, and is the server up?")
                scores += answer
        except CredentialsRejected as refusal:
            raise UserError(f"reward {refusal}; {self.key_hint}") from None
        return scores


def check_scores(scores: list[Any], count: int) -> list[float]:
    """Return the scores of a response as finite numbers.

    Args:
        scores: of the response.
        count: responses that were sent.

    Raises:
        ValueError: another number of scores, or one that is no finite number.
    """
    if len(scores) != count:
        raise ValueError(f"{len(scores)} scores for {count} responses; return one each")
    for index, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= MAX_SCORE:
            raise ValueError(f"score {index} of {count} is {score!r:.40}, no finite number")
    return [float(score) for score in scores]
