"""A Python function as a reward: plain or async, for a batch or for one episode."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.importing import Function, function_name, import_function
from lit_rlhf.rewards.base import Reward
from lit_rlhf.rollout.experience import Episodes

RewardFunction = Callable[..., Any]


class FunctionReward(Reward):
    """Scores by a Python function.

    Batched: `function(prompts, responses, rows) -> scores`, all lists of one length. Not batched:
    `function(prompt, response, row) -> score`. Either may be `async def`; of an async function for one episode,
    `concurrency` calls run at once.

    Args:
        function: the function, or its dotted path such as `my_rewards.brevity`; `my_rewards.py` may lie in the working
            directory.
        batched: whether the function scores a batch or one episode.
        concurrency: largest number of concurrent calls of an async function for one episode.
    """

    def __init__(self, function: str | Function, batched: bool = True, concurrency: int = 32) -> None:
        self.name, self.batched, self.concurrency = function_name(function), batched, concurrency
        if concurrency < 1:
            raise UserError(f"reward {self.name}: concurrency must be at least 1, got {concurrency}")
        self.function: RewardFunction = import_function(function, "reward")

    def score(self, episodes: Episodes) -> Tensor:
        """See `Reward.score`."""
        prompts, responses, rows = episodes.prompts, episodes.responses, episodes.rows
        if self.batched:
            scores = self.score_batch(prompts, responses, rows)
        else:
            scores = self.score_episodes(list(zip(prompts, responses, rows)))
        if len(scores) != len(responses):
            raise UserError(f"reward {self.name}: {len(scores)} scores for {len(responses)} responses; return one each")
        try:
            return torch.tensor([float(score) for score in scores], device=episodes.input_ids.device)
        except (TypeError, ValueError) as error:
            raise UserError(f"reward {self.name}: a score is no number ({error})") from error

    def score_batch(self, prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[Any]:
        """Call the function once."""
        scores = self.function(prompts, responses, rows)
        if inspect.isawaitable(scores):
            scores = run_async(scores)
        try:
            return list(scores)
        except TypeError:
            raise UserError(
                f"reward {self.name}: it scores a batch and must return a list of scores, not {scores!r:.80}; for a "
                "function of one episode set batched: false"
            ) from None

    def score_episodes(self, episodes: list[tuple[str, str, dict[str, Any]]]) -> list[Any]:
        """Call the function once per episode."""
        results = [self.function(*episode) for episode in episodes]
        if not any(inspect.isawaitable(result) for result in results):
            return results

        async def gather() -> list[Any]:
            semaphore = asyncio.Semaphore(self.concurrency)

            async def limited(result: Awaitable[Any]) -> Any:
                async with semaphore:
                    return await result

            return await asyncio.gather(*(limited(result) for result in results))

        return run_async(gather())


def run_async(result: Awaitable[Any]) -> Any:
    """Return the result of an awaitable, in an event loop of its own: a notebook's is running already."""

    async def awaited() -> Any:
        return await result

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, awaited()).result()
