"""Metrics of one completion of one row: the `process_results` functions of the task files."""

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lit_rlhf.evaluation.tasks.constraints import relaxed_variants, satisfies_constraint
from lit_rlhf.evaluation.tasks.readers import DO_NOT_KNOW, NOT_IN_BACKGROUND, Doc

Scores = dict[str, Any]


class OptionScore(tuple):  # type: ignore[type-arg]
    """lm-eval's pair (log-probability, is_greedy) with the number of tokens of the option."""

    num_tokens: int

    @classmethod
    def make(cls, logprob: float, is_greedy: bool, num_tokens: int) -> "OptionScore":
        """Return the score of an option."""
        score = cls((logprob, is_greedy))
        score.num_tokens = num_tokens
        return score


def multiple_choice(doc: Doc, results: Sequence[tuple[float, bool]]) -> Scores:
    """Choose the option with the highest mean log-probability per token.

    Appendix D says "lowest", which is a misprint: HellaSwag at 0.78 is impossible that way. `unnormalized accuracy`
    chooses by the sum, as lm-eval's `acc` does; results without token counts have only that.
    """
    scores = {}
    if all(isinstance(result, OptionScore) for result in results):
        means = [result[0] / result.num_tokens for result in results]  # type: ignore[attr-defined]
        scores["accuracy"] = float(argmax(means) == doc["gold"])
    sums = [result[0] for result in results]
    return {**scores, "unnormalized accuracy": float(argmax(sums) == doc["gold"])}


def argmax(values: Sequence[float]) -> int:
    """Return the index of the largest value; the first of equal ones."""
    return max(range(len(values)), key=lambda index: values[index])


def squad(doc: Doc, results: Sequence[str]) -> Scores:
    """Return SQuADv2's F1 and exact match. The prompt's fallback answer counts as its "no answer"."""
    answer = "" if is_same_text(results[0], NOT_IN_BACKGROUND) else results[0]
    answers = doc["answers"] or [""]
    scores = {
        "f1": max_over_references(f1, answer, answers),
        "exact": max_over_references(exact_match, answer, answers),
    }
    kind = "f1 of answerable" if doc["answers"] else "f1 of unanswerable"
    return {**scores, kind: scores["f1"]}


def quac(doc: Doc, results: Sequence[str]) -> Scores:
    """Return F1 and exact match with the nearest reference."""
    answer = DO_NOT_KNOW if is_same_text(results[0], DO_NOT_KNOW) else results[0]
    return {
        "f1": max_over_references(f1, answer, doc["answers"]),
        "exact": max_over_references(exact_match, answer, doc["answers"]),
    }


def drop(doc: Doc, results: Sequence[str]) -> Scores:
    """Return DROP's F1 and exact match, by lm-eval's function."""
    from lm_eval.tasks.drop.utils import get_metrics

    scores = [get_metrics(results[0].strip(), tuple(answer)) for answer in doc["answers"]]
    return {"exact": max(float(exact) for exact, _ in scores), "f1": max(float(f1) for _, f1 in scores)}


def wsc(doc: Doc, results: Sequence[str]) -> Scores:
    """Return 1 if the answer names the noun exactly when the pronoun refers to it (App. D.10)."""
    answer, noun = (normalize_words(text) for text in (results[0], doc["noun"]))
    names_noun = bool(answer) and (has_run(answer, noun) or has_run(noun, answer))
    return {"accuracy": float(names_noun == doc["same"])}


def has_run(words: Sequence[str], run: Sequence[str]) -> bool:
    """Return whether some words follow each other in others."""
    return any(words[start : start + len(run)] == run for start in range(len(words) - len(run) + 1))


def translation(doc: Doc, results: Sequence[str]) -> Scores:
    """Return the (reference, translation) pair of corpus BLEU."""
    return {"bleu": (doc["english"], results[0].strip())}


def summary(doc: Doc, results: Sequence[str]) -> Scores:
    """Return the F measure of ROUGE-L."""
    from rouge_score.rouge_scorer import RougeScorer

    score = RougeScorer(["rougeL"], use_stemmer=True).score(doc["summary"], results[0])
    return {"rouge-l": float(score["rougeL"].fmeasure)}


def exact(doc: Doc, results: Sequence[str]) -> Scores:
    """Return exact match, ignoring surrounding space and a final period."""
    return {"exact": float(results[0].strip().rstrip(".") == doc["target"].strip().rstrip("."))}


def ifeval(doc: Doc, results: Sequence[str]) -> Scores:
    """Return whether all constraints of a prompt hold, and which; "loose": for at least one relaxed variant."""
    constraints = json.loads(doc["constraints"])
    strict = [satisfies_constraint(name, settings, results[0]) for name, settings in constraints]
    loose = [
        any(satisfies_constraint(name, settings, text) for text in relaxed_variants(results[0]))
        for name, settings in constraints
    ]
    return {
        "prompts": float(all(strict)),
        "prompts, loose": float(all(loose)),
        "constraints": strict,
        "constraints, loose": loose,
    }


def mean_over_constraints(rows: Sequence[Sequence[bool]]) -> float:
    """Return the fraction of satisfied constraints over all rows."""
    satisfied = [each for row in rows for each in row]
    return sum(satisfied) / len(satisfied)


def max_over_references(score: Any, answer: str, references: Sequence[str]) -> float:
    """Return the maximum score over the references."""
    return max(float(score(answer, reference)) for reference in references)


def f1(answer: str, reference: str) -> float:
    """Return the F1 of the normalized words; if either text has none, 1 if both have none, else 0."""
    words, reference_words = normalize_words(answer), normalize_words(reference)
    if not words or not reference_words:
        return float(words == reference_words)
    shared = (Counter(words) & Counter(reference_words)).total()
    return 2 * shared / (len(words) + len(reference_words))


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if the normalized words are equal, else 0."""
    return float(normalize_words(answer) == normalize_words(reference))


def is_same_text(one: str, other: str) -> bool:
    """Return whether two texts are equal up to case, punctuation and articles."""
    return normalize_words(one) == normalize_words(other)


def normalize_words(text: str) -> list[str]:
    """Return the words in lower case, without punctuation and articles, as in SQuAD's metric."""
    stripped = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", stripped).split()
