"""A function of the user's own as a reward source: plain or async, for a whole batch or for one episode."""

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.rollout.experience import Episodes

RewardFunction = Callable[..., Any]


class FunctionReward:
    """A function of the user's own.

    For a batch: `function(prompts, responses, rows) -> scores`, all lists of one length. For an episode:
    `function(prompt, response, row) -> score`. Either may be `async def`; of an async function for one episode,
    `concurrency` run at once.

    Args:
        function: dotted path such as `my_rewards.brevity`; `my_rewards.py` may lie in the working directory.
        takes: whether the function takes a whole batch or one episode.
        concurrency: most calls of an async function for one episode that wait at the same time.
    """

    def __init__(self, function: str, takes: Literal["batch", "episode"] = "batch", concurrency: int = 32) -> None:
        if concurrency < 1:
            raise UserError(f"reward {function}: concurrency must be at least 1, got {concurrency}")
        self.name, self.takes, self.concurrency = function, takes, concurrency
        self.function = import_function(function)

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Nothing to load."""

    def score(self, episodes: Episodes) -> Tensor:
        """See `Reward.score`."""
        prompts, responses, rows = episodes.prompts, episodes.responses, episodes.rows
        if self.takes == "batch":
            scores = self.of_batch(prompts, responses, rows)
        else:
            scores = self.of_episodes(list(zip(prompts, responses, rows)))
        if len(scores) != len(responses):
            raise UserError(f"reward {self.name}: {len(scores)} scores for {len(responses)} responses; return one each")
        try:
            return torch.tensor([float(score) for score in scores], device=episodes.input_ids.device)
        except (TypeError, ValueError) as error:
            raise UserError(f"reward {self.name}: a score is no number ({error})") from error

    def of_batch(self, prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> Sequence[Any]:
        """Call the function once."""
        scores = self.function(prompts, responses, rows)
        if inspect.isawaitable(scores):
            scores = wait_for(scores)
        if not hasattr(scores, "__len__"):
            raise UserError(
                f"reward {self.name}: it takes a batch and must return a list of scores, not {scores!r:.80}; for a "
                "function of one episode set takes: episode"
            )
        return scores

    def of_episodes(self, episodes: list[tuple[str, str, dict[str, Any]]]) -> list[Any]:
        """Call the function once an episode."""
        results = [self.function(*episode) for episode in episodes]
        if not any(inspect.isawaitable(result) for result in results):
            return results

        async def all_of_them() -> list[Any]:
            gate = asyncio.Semaphore(self.concurrency)

            async def one(result: Awaitable[Any]) -> Any:
                async with gate:
                    return await result

            return await asyncio.gather(*(one(result) for result in results))

        return wait_for(all_of_them())


def wait_for(result: Awaitable[Any]) -> Any:
    """Return what an awaitable gives, in an event loop of its own: a notebook's is running already."""

    async def awaited() -> Any:
        return await result

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, awaited()).result()


def import_function(path: str) -> RewardFunction:
    """Return the function behind a dotted path, or say in one line what is missing."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise UserError(f"{path!r} is not a dotted path such as my_file.my_function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path!r}: there is no module {error.name!r} here ({Path.cwd()}) or among the installed ones"
        ) from error
    if not hasattr(module, name):
        near = get_close_matches(name, dir(module), 1)
        raise UserError(f"{path!r}: {module_name} has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    function: RewardFunction = getattr(module, name)
    if not callable(function):
        raise UserError(f"{path!r} is a {type(function).__name__}, not a function")
    return function
