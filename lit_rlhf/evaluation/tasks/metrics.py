"""Scores of one answer to one row, as lm-eval's task files name them: `process_results` functions."""

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lit_rlhf.evaluation.tasks.constraints import satisfies_constraint, relaxed_variants
from lit_rlhf.evaluation.tasks.readers import DO_NOT_KNOW, NOT_IN_BACKGROUND, Doc

Scores = dict[str, Any]


class OptionScore(tuple):  # type: ignore[type-arg]
    """lm-eval's pair (log-probability, greedy) that also knows how many tokens the option has."""

    num_tokens: int

    @classmethod
    def make(cls, logprob: float, greedy: bool, tokens: int) -> "OptionScore":
        """Make one."""
        made = cls((logprob, greedy))
        made.num_tokens = tokens
        return made


def multiple_choice(doc: Doc, results: Sequence[tuple[float, bool]]) -> Scores:
    """Take the option of the highest mean log-probability of a token.

    Appendix D says "lowest", which is a misprint: HellaSwag at 0.78 is out of reach that way. `accuracy by whole
    option` takes the highest sum, as lm-eval's `acc` does; a model that does not tell token counts has only that.
    """
    scores = {}
    if all(isinstance(result, OptionScore) for result in results):
        means = [result[0] / result.tokens for result in results]  # type: ignore[attr-defined]
        scores["accuracy"] = float(argmax(means) == doc["gold"])
    sums = [result[0] for result in results]
    return {**scores, "accuracy by whole option": float(argmax(sums) == doc["gold"])}


def argmax(values: Sequence[float]) -> int:
    """Return the place of the largest value, the first of equal ones."""
    return max(range(len(values)), key=lambda place: values[place])


def squad(doc: Doc, results: Sequence[str]) -> Scores:
    """SQuADv2's F1 and exact match. The prompt's fallback is its "no answer"."""
    answer = "" if is_same_text(results[0], NOT_IN_BACKGROUND) else results[0]
    answers = doc["answers"] or [""]
    scores = {"f1": max_over_references(f1, answer, answers), "exact": max_over_references(exact_match, answer, answers)}
    kind = "f1 of answerable" if doc["answers"] else "f1 of unanswerable"
    return {**scores, kind: scores["f1"]}


def quac(doc: Doc, results: Sequence[str]) -> Scores:
    """F1 and exact match with the nearest reference."""
    answer = DO_NOT_KNOW if is_same_text(results[0], DO_NOT_KNOW) else results[0]
    return {"f1": max_over_references(f1, answer, doc["answers"]), "exact": max_over_references(exact_match, answer, doc["answers"])}


def drop(doc: Doc, results: Sequence[str]) -> Scores:
    """DROP's F1 and exact match, by lm-eval's function."""
    from lm_eval.tasks.drop.utils import get_metrics

    found = [get_metrics(results[0].strip(), tuple(answer)) for answer in doc["answers"]]
    return {"exact": max(float(exact) for exact, _ in found), "f1": max(float(f1) for _, f1 in found)}


def wsc(doc: Doc, results: Sequence[str]) -> Scores:
    """Right where the written answer names the noun exactly if the pronoun means it (App. D.10)."""
    answer, noun = (" ".join(normalize_words(text)) for text in (results[0], doc["noun"]))
    named = bool(answer) and (answer in noun or noun in answer)
    return {"accuracy": float(named == doc["same"])}


def translation(doc: Doc, results: Sequence[str]) -> Scores:
    """The pair that BLEU is taken of, over all rows."""
    return {"bleu": (doc["english"], results[0].strip())}


def summary(doc: Doc, results: Sequence[str]) -> Scores:
    """ROUGE-L, its F measure."""
    from rouge_score.rouge_scorer import RougeScorer

    score = RougeScorer(["rougeL"], use_stemmer=True).score(doc["summary"], results[0])
    return {"rouge-l": float(score["rougeL"].fmeasure)}


def exact(doc: Doc, results: Sequence[str]) -> Scores:
    """Exact match, space around and a full stop behind apart."""
    return {"exact": float(results[0].strip().rstrip(".") == doc["target"].strip().rstrip("."))}


def ifeval(doc: Doc, results: Sequence[str]) -> Scores:
    """Whether all constraints of a prompt hold, and which of them; loosely: in some lightly cut form."""
    constraints = json.loads(doc["constraints"])
    strict = [satisfies_constraint(name, settings, results[0]) for name, settings in constraints]
    loose = [any(satisfies_constraint(name, settings, form) for form in relaxed_variants(results[0])) for name, settings in constraints]
    return {
        "prompts": float(all(strict)),
        "prompts, loose": float(all(loose)),
        "constraints": strict,
        "constraints, loose": loose,
    }


def mean_over_constraints(rows: Sequence[Sequence[bool]]) -> float:
    """Return the share over the constraints of all rows together."""
    every = [kept for row in rows for kept in row]
    return sum(every) / len(every)


def max_over_references(score: Any, answer: str, references: Sequence[str]) -> float:
    """Return the highest score over the references."""
    return max(float(score(answer, reference)) for reference in references)


def f1(answer: str, reference: str) -> float:
    """Return the F1 of the normalised words; where either has none, whether both have none."""
    mine, theirs = normalize_words(answer), normalize_words(reference)
    if not mine or not theirs:
        return float(mine == theirs)
    shared = (Counter(mine) & Counter(theirs)).total()
    return 2 * shared / (len(mine) + len(theirs))


def exact_match(answer: str, reference: str) -> float:
    """Return whether the normalised words are the same."""
    return float(normalize_words(answer) == normalize_words(reference))


def is_same_text(one: str, other: str) -> bool:
    """Whether two texts are the same but for case, punctuation and articles."""
    return normalize_words(one) == normalize_words(other)


def normalize_words(text: str) -> list[str]:
    """Return the words in lower case, without punctuation and articles, as SQuAD's metric sees them."""
    bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()
