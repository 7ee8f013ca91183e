"""The simulated labelers as judges of the preference suite."""

import json
from typing import Any, Literal

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.judging_types import (
    MAX_RATING,
    CompletionPair,
    Judge,
    RatedItem,
    Rating,
    Verdict,
    preference_from_scores,
)
from lit_rlhf.synthetic.judge import judge
from lit_rlhf.synthetic.labelers import Labeler, build_heldout_labelers, build_training_labelers
from lit_rlhf.synthetic.tasks import TASKS, TaskPrompt


class SimulatedLabelers(Judge):
    """Labelers of the synthetic world, one verdict each: the higher Likert rating wins, equal ratings tie.

    Args:
        seed: seed of the synthetic data.
        group: "heldout", the labelers who ranked no training data, or "training", those who did.
        labelers: used instead of a group (from Python).
    """

    is_order_sensitive = False

    def __init__(
        self, seed: int = 0, group: Literal["heldout", "training"] = "heldout", labelers: list[Labeler] | None = None
    ) -> None:
        build = build_heldout_labelers if group == "heldout" else build_training_labelers
        self.labelers = build(seed) if labelers is None else labelers

    def compare(self, pairs: list[CompletionPair], cache: Cache) -> list[list[Verdict]]:
        """See `Judge.compare`."""
        verdicts = []
        for pair in pairs:
            prompt = to_task_prompt(pair.prompt, pair.row)
            pair_verdicts = []
            for labeler in self.labelers:
                first, second = (
                    labeler.rate_likert(prompt, each.text, each.finished) for each in (pair.first, pair.second)
                )
                pair_verdicts.append(Verdict(labeler.name, preference_from_scores(first - second)))
            verdicts.append(pair_verdicts)
        return verdicts

    def rate(self, items: list[RatedItem], cache: Cache) -> list[list[Rating]]:
        """See `Judge.rate`: overall quality, and those further fields of the paper that the exact judge knows."""
        ratings = []
        for item in items:
            prompt = to_task_prompt(item.prompt, item.row)
            response = (item.completion.text, item.completion.finished)
            judgment = judge(prompt, *response)
            flags = {"fails_instruction": judgment.success < 0.5, "inappropriate_for_assistant": judgment.toxic}
            if judgment.truthful is not None:
                flags["hallucination"] = judgment.truthful < 1
            likert = {labeler.name: labeler.rate_likert(prompt, *response) for labeler in self.labelers}
            ratings.append([Rating(name, min(MAX_RATING, rating), flags) for name, rating in likert.items()])
        return ratings


def to_task_prompt(text: str, row: dict[str, Any]) -> TaskPrompt:
    """Return the prompt of a row of a synthetic prompt file.

    Raises:
        UserError: the row has no task and target of the synthetic world.
    """
    if row.get("task") not in TASKS or not isinstance(row.get("target"), str):
        raise UserError("SimulatedLabelers judge prompts of the synthetic world only: rows with its task and target")
    json.loads(row["target"])
    return TaskPrompt(text, row["task"], row["target"])
