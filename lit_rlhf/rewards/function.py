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
from lit_rlhf.rewards.base import Reward, check_part_names
from lit_rlhf.rollout.experience import Episodes

RewardFunction = Callable[..., Any]


class FunctionReward(Reward):
    """Scores by a Python function.

    Batched: `function(prompts, responses, rows) -> scores`, all lists of one length. Not batched:
    `function(prompt, response, row) -> score`. Either may be `async def`; of an async function for one episode,
    `concurrency` calls run at once.

    A function may score in parts: it returns a dict of scores (batched: of lists of scores), `weights` has the same
    names, and the score is the weighted sum. The mean of each part, before its weight, is logged as `reward/NAME`.

    Args:
        function: the function, or its dotted path such as `my_rewards.brevity`; `my_rewards.py` may lie in the working
            directory.
        batched: whether the function scores a batch or one episode.
        concurrency: largest number of concurrent calls of an async function for one episode.
        weights: of the parts, by name, if the function returns a dict.
    """

    def __init__(
        self,
        function: str | Function,
        batched: bool = True,
        concurrency: int = 32,
        weights: dict[str, float] | None = None,
    ) -> None:
        self.name, self.batched, self.concurrency = function_name(function), batched, concurrency
        if concurrency < 1:
            raise UserError(f"reward {self.name}: concurrency must be at least 1, got {concurrency}")
        self.function: RewardFunction = import_function(function, "reward")
        self.weights, self.parts_scored = weights, dict[str, Tensor]()  # of the episodes scored last
        if weights is not None and not weights:
            raise UserError(f"reward {self.name}: weights has no part; give one weight each, or leave it out")
        check_part_names(list(weights or ()))

    def score(self, episodes: Episodes) -> Tensor:
        """See `Reward.score`."""
        prompts, responses, rows = episodes.prompts, episodes.responses, episodes.rows
        if self.batched:
            scores = self.score_batch(prompts, responses, rows)
        else:
            scores = self.score_episodes(list(zip(prompts, responses, rows)))
        device = episodes.input_ids.device
        if self.weights is None:
            return self._to_tensor(scores, len(responses)).to(device)
        columns = self._to_columns(scores)
        self.parts_scored = {name: self._to_tensor(columns[name], len(responses)).to(device) for name in self.weights}
        return torch.stack([weight * self.parts_scored[name] for name, weight in self.weights.items()]).sum(0)

    def metrics(self) -> dict[str, Tensor]:
        """See `Reward.metrics`: every part's score before its weight."""
        return {f"reward/{name}": scores for name, scores in self.parts_scored.items()}

    def _to_columns(self, scores: Any) -> dict[str, list[Any]]:
        """Return the scores of each part.

        Args:
            scores: a dict of lists, or a list with a dict per episode.
        """
        assert self.weights is not None
        for part in [scores] if self.batched else scores:
            if not isinstance(part, dict) or part.keys() != self.weights.keys():
                got = f"{', '.join(map(str, part))}" if isinstance(part, dict) else f"{part!r:.80}"
                raise UserError(f"reward {self.name}: weights are of {', '.join(self.weights)}, and it returned {got}")
        if self.batched:
            return {name: list(column) for name, column in scores.items()}
        return {name: [part[name] for part in scores] for name in self.weights}

    def _to_tensor(self, scores: Any, count: int) -> Tensor:
        if isinstance(scores, dict) or (scores and isinstance(scores[0], dict)):
            names = scores if isinstance(scores, dict) else scores[0]
            example = ", ".join(f"{name}: 1.0" for name in names)
            raise UserError(f"reward {self.name}: it returns a dict; set weights, such as {{{example}}}")
        if len(scores) != count:
            raise UserError(f"reward {self.name}: {len(scores)} scores for {count} responses; return one each")
        try:
            return torch.tensor([float(score) for score in scores])
        except (TypeError, ValueError) as error:
            raise UserError(f"reward {self.name}: a score is no number ({error})") from error

    def score_batch(
        self, prompts: list[str], responses: list[str], rows: list[dict[str, Any]]
    ) -> list[Any] | dict[str, Any]:
        """Call the function once."""
        scores = self.function(prompts, responses, rows)
        if inspect.isawaitable(scores):
            scores = run_async(scores)
        if isinstance(scores, dict):
            return scores
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
