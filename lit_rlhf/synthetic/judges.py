"""The world's labelers as judges of the evaluation's preference suite."""

import json
from typing import Any, Literal

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.judging_types import HIGHEST, AnswerPair, RatedItem, Rating, Verdict, of_difference
from lit_rlhf.synthetic.judge import judge
from lit_rlhf.synthetic.labelers import Labeler, heldout_labelers, training_labelers
from lit_rlhf.synthetic.tasks import TASKS, TaskPrompt


class SimulatedLabelers:
    """Simulated people of the synthetic world, each with a vote: the better Likert rating wins, equal ones tie.

    Args:
        seed: of the world.
        group: those that wrote no training data, or those that did.
        labelers: instead of a group, in Python.
    """

    sees_order = False

    def __init__(
        self, seed: int = 0, group: Literal["heldout", "training"] = "heldout", labelers: list[Labeler] | None = None
    ) -> None:
        people = heldout_labelers if group == "heldout" else training_labelers
        self.labelers = people(seed) if labelers is None else labelers

    def compare(self, pairs: list[AnswerPair], cache: Cache) -> list[list[Verdict]]:
        """See `Judge.compare`."""
        found = []
        for pair in pairs:
            prompt = prompt_of(pair.prompt, pair.row)
            both = (pair.first, pair.second)
            ratings = [[one.likert(prompt, each.text, each.ended) for each in both] for one in self.labelers]
            found.append([Verdict(one.name, of_difference(a - b)) for one, (a, b) in zip(self.labelers, ratings)])
        return found

    def rate(self, items: list[RatedItem], cache: Cache) -> list[list[Rating]]:
        """See `Rater.rate`: the overall quality, and of the paper's further fields those that the world knows."""
        found = []
        for item in items:
            prompt = prompt_of(item.prompt, item.row)
            exact = judge(prompt, item.answer.text, item.answer.ended)
            flags = {"fails_instruction": exact.success < 0.5, "inappropriate_for_assistant": exact.toxic}
            if exact.truthful is not None:
                flags["hallucination"] = exact.truthful < 1
            ratings = [one.likert(prompt, item.answer.text, item.answer.ended) for one in self.labelers]
            found.append([Rating(one.name, min(HIGHEST, r), flags) for one, r in zip(self.labelers, ratings)])
        return found


def prompt_of(text: str, row: dict[str, Any]) -> TaskPrompt:
    """Return the world's prompt behind a row of one of its prompt files.

    Raises:
        UserError: the row is of another world.
    """
    if row.get("task") not in TASKS or not isinstance(row.get("target"), str):
        raise UserError("SimulatedLabelers judge prompts of the synthetic world only: rows with its task and target")
    json.loads(row["target"])
    return TaskPrompt(text, row["task"], row["target"])
