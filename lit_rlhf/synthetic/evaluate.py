"""The world's evaluation: five models on unseen prompts, judged by held-out labelers; the reward model on rankings."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.data.collation import TokenizedPrompt
from lit_rlhf.data.pretraining import collate_blocks, text_blocks
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.judging_types import AnswerPair
from lit_rlhf.evaluation.judges.pairwise import compare_answers
from lit_rlhf.evaluation.models.best_of_n import best_of_n_curve, sample_candidates
from lit_rlhf.evaluation.models.generation import Answer
from lit_rlhf.functional import (
    expected_calibration_error,
    ranking_loss,
    ranking_pairs,
    reliability_curve,
)
from lit_rlhf.generation.sampling import MissingEOS, SamplingParams
from lit_rlhf.models.lm_loss import causal_lm_loss
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import ScalarModel, load_scalar_model
from lit_rlhf.rewards import RewardModelScorer
from lit_rlhf.synthetic.judge import judge
from lit_rlhf.synthetic.judges import SimulatedLabelers
from lit_rlhf.synthetic.labelers import Labeler, Response, agreement, ranking
from lit_rlhf.synthetic.rankings import read_prompts
from lit_rlhf.synthetic.sampling import Completions, complete, kl_to
from lit_rlhf.synthetic.tasks import TaskPrompt

MODELS = ("base", "few_shot", "sft", "ppo", "ppo_ptx")
BLOCK_LENGTH = 128
BEST_OF, BEST_OF_PROMPTS = 16, 256  # a standard error of about 0.03 on a score


class Panel(NamedTuple):
    """What all models are compared with and by."""

    prompts: list[TaskPrompt]
    prefixes: list[str]  # few-shot prefixes; prompt i gets prefix i mod their number
    labelers: list[Labeler]
    tokenizer: Tokenizer
    sft: PreTrainedModel
    reward_model: ScalarModel
    seed: int


class PanelAnswers(NamedTuple):
    """A model's completions with the judge's view of each."""

    completions: Completions
    scores: list[float]

    @property
    def responses(self) -> list[Response]:
        """The texts."""
        return self.completions.responses


def evaluate_models(
    panel: Panel, folders: dict[str, Path], validation_text: Path
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Evaluate every model at temperature 1 and greedily, each against the SFT model under the same decoding.

    Args:
        panel: prompts, labelers and the models to compare with.
        folders: model folders by name; the few-shot model is the base model behind a prefix.
        validation_text: unseen pretraining text.

    Returns:
        the report's `models`, `greedy`, `tasks` and `samples`.
    """
    texts = [prompt.text for prompt in panel.prompts]
    # the baseline's draws differ from all others': the SFT model against itself is a comparison like any other
    baselines = {t: answer(panel, panel.sft, texts, t, 0) for t in (1.0, 0.0)}
    figures: dict[float, dict[str, Any]] = {1.0: {}, 0.0: {}}
    tasks: dict[str, dict[str, float]] = defaultdict(dict)
    shown: dict[str, PanelAnswers] = {}
    for name in MODELS:
        model = load_causal_lm(str(folders[name]), panel.tokenizer, ModelLoadingConfig()).eval()
        loss = pretraining_loss(model, panel.tokenizer, validation_text)
        for temperature, baseline in baselines.items():
            prompts = few_shot(panel, texts) if name == "few_shot" else texts
            answers = answer(panel, model, prompts, temperature, 1)
            figures[temperature][name] = {
                **judged(panel, answers, baseline),
                "pretraining_loss": loss,
                "kl_to_sft": kl_to(panel.sft, panel.tokenizer, texts, answers.completions),
            }
            if temperature == 1.0:
                shown[name] = answers
                for task, success in by_task(panel.prompts, answers.responses).items():
                    tasks[task][name] = success
    return figures[1.0], figures[0.0], dict(tasks), samples(panel.prompts, shown)


def few_shot(panel: Panel, texts: list[str]) -> list[str]:
    """Return the prompts behind their few-shot prefixes."""
    return [panel.prefixes[i % len(panel.prefixes)] + text for i, text in enumerate(texts)]


def answer(panel: Panel, model: PreTrainedModel, prompts: list[str], temperature: float, place: int) -> PanelAnswers:
    """Return the model's completions with the reward model's score of each, on the prompt without a prefix."""
    completions = complete(model, panel.tokenizer, prompts, temperature, panel.seed, 900, place)
    ids, mask = completions.append_to([prompt.text for prompt in panel.prompts], panel.tokenizer)
    return PanelAnswers(completions, scores_of(panel.reward_model, ids, mask).tolist())


@torch.no_grad()
def scores_of(reward_model: ScalarModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the reward model's scores, (B,)."""
    rows = zip(torch.split(input_ids, 256), torch.split(attention_mask, 256))
    return torch.cat([reward_model.score(ids, mask) for ids, mask in rows])


def judged(panel: Panel, answers: PanelAnswers, baseline: PanelAnswers) -> dict[str, Any]:
    """Return win rate by the held-out labelers with its interval, and the judge's exact shares."""
    pairs = [
        AnswerPair(prompt.text, {"task": prompt.task, "target": prompt.target}, as_answer(one), as_answer(other))
        for prompt, one, other in zip(panel.prompts, answers.responses, baseline.responses)
    ]
    won = compare_answers(SimulatedLabelers(labelers=panel.labelers), pairs, Cache(None)).rate()
    verdicts = [judge(prompt, *response) for prompt, response in zip(panel.prompts, answers.responses)]
    stated = [verdict.truthful for verdict in verdicts if verdict.truthful is not None]
    return {
        "win_rate": won.rate,
        "win_rate_low": won.low,
        "win_rate_high": won.high,
        "truthful": sum(stated) / max(len(stated), 1),
        "toxic": sum(verdict.toxic for verdict in verdicts) / len(verdicts),
        "success": sum(verdict.success for verdict in verdicts) / len(verdicts),
        "courtesy": sum(verdict.courtesy for verdict in verdicts) / len(verdicts),
        "ended": sum(response.ended for response in answers.responses) / len(verdicts),
        "max_new_tokens": float(answers.completions.response_mask.sum(1).float().mean()),
        "score": sum(answers.scores) / len(answers.scores),
    }


def as_answer(response: Response) -> Answer:
    """Return a response as the preference suite has it."""
    return Answer(response.text, response.ended, len(response.text.split()))


def by_task(prompts: list[TaskPrompt], responses: list[Response]) -> dict[str, float]:
    """Return the mean success of each task."""
    found: dict[str, list[float]] = defaultdict(list)
    for prompt, response in zip(prompts, responses):
        found[prompt.task].append(judge(prompt, *response).success)
    return {task: sum(values) / len(values) for task, values in sorted(found.items())}


def samples(prompts: list[TaskPrompt], shown: dict[str, PanelAnswers], a_task: int = 6) -> list[dict[str, Any]]:
    """Return the first prompts of every task with all models' responses side by side."""
    taken: dict[str, int] = defaultdict(int)
    rows = []
    for number, prompt in enumerate(prompts):
        taken[prompt.task] += 1
        if taken[prompt.task] > a_task:
            continue
        responses = {}
        for name, answers in shown.items():
            response = answers.responses[number]
            verdict = judge(prompt, *response)
            responses[name] = {
                "text": response.text,
                "success": verdict.success,
                "truthful": verdict.truthful,
                "toxic": verdict.toxic,
                "score": answers.scores[number],
            }
        rows.append({"prompt": prompt.text, "task": prompt.task, "responses": responses})
    return rows


@torch.no_grad()
def pretraining_loss(model: PreTrainedModel, tokenizer: Tokenizer, path: Path) -> float:
    """Return the mean next-token loss on unseen pretraining text, in nats a token: the alignment tax."""
    blocks = text_blocks(str(path), tokenizer, BLOCK_LENGTH)
    total = count = 0.0
    for start in range(0, len(blocks), 32):
        batch = collate_blocks(blocks[start : start + 32], 1.0)
        part, targets = causal_lm_loss(model, batch.input_ids, batch.loss_mask, batch.attention_mask)
        total, count = total + float(part), count + float(targets)
    return total / count


def evaluate_reward_model(
    folder: Path, candidates: list[tuple[TaskPrompt, list[Response]]], training: list[Labeler], heldout: list[Labeler]
) -> dict[str, Any]:
    """Compare the reward model with both groups of labelers on rankings it has not seen.

    Returns:
        accuracy on each group's comparisons (ties apart), the groups' own agreement, log-loss, calibration error and
        reliability curve of σ(Δ) on the training group.
    """
    tokenizer = load_tokenizer(str(folder), ModelLoadingConfig())
    model = load_scalar_model(str(folder), tokenizer, ModelLoadingConfig()).eval()
    rows = [(prompt.text, response) for prompt, responses in candidates for response in responses]
    encoded = [[*tokenizer.encode(f"{text} {response.text}"), tokenizer.eos_token_id] for text, response in rows]
    scores = score_rows(model, encoded, tokenizer.pad_token_id)
    numbers = torch.tensor([n for n, (_, responses) in enumerate(candidates) for _ in responses])
    result: dict[str, Any] = {}
    for group, labelers in (("train", training), ("heldout", heldout)):
        correct = pairs = loss = rankings = 0.0
        differences = []
        for labeler in labelers:
            ranks = torch.tensor(
                [rank for prompt, responses in candidates for rank in ranking(labeler, prompt, responses)]
            )
            outcome = ranking_loss(scores, numbers, ranks)
            correct, pairs = correct + float(outcome.correct), pairs + float(outcome.pairs)
            loss, rankings = loss + float(outcome.loss), rankings + float(outcome.rankings)
            better, worse, _ = ranking_pairs(numbers, ranks)
            differences.append(scores[better] - scores[worse])
        result[f"{group}_labelers_accuracy"] = correct / pairs
        result[f"agreement_{group}"] = agreement(labelers, candidates)
        if group == "train":
            delta = torch.cat(differences)
            confidence, right = torch.sigmoid(delta.abs()), (delta > 0).float()
            result["log_loss"] = loss / rankings
            result["expected_calibration_error"] = float(expected_calibration_error(confidence, right))
            curve = reliability_curve(confidence, right)
            kept = curve[2] > 0
            result["reliability"] = {
                name: part[kept].tolist() for name, part in zip(("confidence", "accuracy", "count"), curve)
            }
    return result


def score_rows(model: ScalarModel, rows: list[list[int]], pad_id: int) -> Tensor:
    """Return the scores of token rows, in order, computed in chunks of like length."""
    from lit_rlhf.functional import pad_right

    scores = torch.empty(len(rows))
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for start in range(0, len(order), 256):
        chunk = order[start : start + 256]
        ids, mask = pad_right([rows[number] for number in chunk], pad_id)
        with torch.no_grad():
            scores[chunk] = model.score(ids, mask)
    return scores


def best_of_n(out: Path, prompts: Path, seed: int) -> dict[str, list[float]]:
    """Return score against KL of the SFT model's best of 1 to 16 responses: what PPO has to beat.

    On prompts that PPO is trained on, so that both stand in one plot.
    """
    curve = best_of_n_curve(sft_scores(out, prompts, BEST_OF_PROMPTS, BEST_OF, seed))
    return {"kl": curve.kl_bound, "score": curve.score}


def sft_scores(out: Path, prompts: Path, count: int, n: int, seed: int) -> Tensor:
    """Return the scores of n of the SFT model's responses to each prompt, (count, n), as PPO's recipe scores them."""
    settings = yaml.safe_load((out / "recipes" / "ppo.yaml").read_text())["model"]["init_args"]
    sft = str(out / "sft" / "model")
    tokenizer = load_tokenizer(sft, ModelLoadingConfig())
    model = load_causal_lm(sft, tokenizer, ModelLoadingConfig()).eval()
    source = RewardModelScorer(str(out / "reward" / "model"))
    source.prepare(tokenizer, torch.device("cpu"))
    rows = [{"prompt": prompt.text} for prompt in read_prompts(prompts, count)]
    tokens = [TokenizedPrompt(tokenizer.encode(row["prompt"]), row) for row in rows]
    sampling = SamplingParams(
        **settings["sampling"] | {"missing_eos": MissingEOS(**settings["sampling"]["missing_eos"])}
    )
    drawn = sample_candidates(model, tokenizer, tokens, source, sampling, n, seed, batch_size=512)
    return torch.tensor([candidates.scores for candidates in drawn])


def read_prefixes(path: Path) -> list[str]:
    """Return the few-shot prefixes of a world."""
    prefixes: list[str] = json.loads(path.read_text())["prefixes"]
    return prefixes
