"""Evaluation of the quickstart: five models on unseen prompts by held-out labelers; the reward model on rankings."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.data.collation import TokenizedPrompt
from lit_rlhf.data.pretraining import collate_blocks, load_text_blocks
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.judging_types import CompletionPair
from lit_rlhf.evaluation.judges.pairwise import compare_completions
from lit_rlhf.evaluation.models.best_of_n import compute_best_of_n_curve, sample_candidates
from lit_rlhf.evaluation.models.generation import Completion
from lit_rlhf.evaluation.win_rate import WinRate
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
from lit_rlhf.models.scoring import score_rows
from lit_rlhf.rewards import RewardModelScorer
from lit_rlhf.synthetic.judge import judge
from lit_rlhf.synthetic.judges import SimulatedLabelers
from lit_rlhf.synthetic.labelers import Labeler, Response, compute_agreement, rank_responses
from lit_rlhf.synthetic.rankings import read_prompts
from lit_rlhf.synthetic.sampling import Completions, complete_prompts, compute_kl
from lit_rlhf.synthetic.tasks import TaskPrompt

MODELS = ("base", "few_shot", "sft", "ppo", "ppo_ptx")
SEQ_LEN = 128  # tokens per sequence of validation text
BEST_OF_N = 16
SCORING_BATCH_SIZE = 256


class EvaluationContext(NamedTuple):
    """Prompts, labelers and models that every evaluated model shares."""

    prompts: list[TaskPrompt]
    prefixes: list[str]  # few-shot prefixes; prompt i gets prefix i modulo their number
    labelers: list[Labeler]
    tokenizer: Tokenizer
    sft: PreTrainedModel
    reward_model: ScalarModel
    seed: int


class ScoredCompletions(NamedTuple):
    """Completions of a model with the score of each by the reward model."""

    completions: Completions
    scores: list[float]

    @property
    def responses(self) -> list[Response]:
        """The completions as text, (B,)."""
        return self.completions.responses


def evaluate_models(
    context: EvaluationContext, folders: dict[str, Path], validation_text: Path
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Evaluate every model at temperature 1 and greedily, each against the SFT model with the same decoding.

    Args:
        context: prompts, labelers and the models to compare with.
        folders: model folders by name; the few-shot model is the base model with prefixed prompts.
        validation_text: unseen pretraining text.

    Returns:
        the report's `models`, `greedy`, `tasks` and `samples`.
    """
    texts = [prompt.text for prompt in context.prompts]
    # the baseline has its own sampling noise, so the SFT model against itself is a comparison like any other
    baselines = {t: generate_and_score(context, context.sft, texts, t, 0) for t in (1.0, 0.0)}
    metrics: dict[float, dict[str, Any]] = {1.0: {}, 0.0: {}}
    tasks: dict[str, dict[str, float]] = defaultdict(dict)
    sampled: dict[str, ScoredCompletions] = {}
    for name in MODELS:
        model = load_causal_lm(str(folders[name]), context.tokenizer, ModelLoadingConfig()).eval()
        loss = compute_pretraining_loss(model, context.tokenizer, validation_text)
        for temperature, baseline in baselines.items():
            prompts = prepend_few_shot_prefixes(context, texts) if name == "few_shot" else texts
            answers = generate_and_score(context, model, prompts, temperature, 1)
            metrics[temperature][name] = {
                **compute_metrics(context, answers, baseline),
                "pretraining_loss": loss,
                "kl_to_sft": compute_kl(context.sft, context.tokenizer, texts, answers.completions),
            }
            if temperature == 1.0:
                sampled[name] = answers
                for task, success in compute_success_by_task(context.prompts, answers.responses).items():
                    tasks[task][name] = success
    return metrics[1.0], metrics[0.0], dict(tasks), collect_samples(context.prompts, sampled)


def prepend_few_shot_prefixes(context: EvaluationContext, texts: list[str]) -> list[str]:
    """Return the prompts, each with its few-shot prefix in front."""
    return [context.prefixes[i % len(context.prefixes)] + text for i, text in enumerate(texts)]


def generate_and_score(
    context: EvaluationContext, model: PreTrainedModel, prompts: list[str], temperature: float, stream: int
) -> ScoredCompletions:
    """Sample one completion per prompt and score it with the reward model, on the prompt without its prefix.

    Args:
        context: the prompts without prefixes, and the reward model.
        model: the model.
        prompts: the texts to complete.
        temperature: 1 to sample, 0 for greedy decoding.
        stream: number of the random stream.
    """
    completions = complete_prompts(model, context.tokenizer, prompts, temperature, context.seed, 900, stream)
    ids, mask = completions.append_to([prompt.text for prompt in context.prompts], context.tokenizer)
    return ScoredCompletions(completions, compute_scores(context.reward_model, ids, mask).tolist())


@torch.no_grad()
def compute_scores(reward_model: ScalarModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the scores of the reward model for rows of (B, T) token ids and attention mask, (B,)."""
    chunks = zip(torch.split(input_ids, SCORING_BATCH_SIZE), torch.split(attention_mask, SCORING_BATCH_SIZE))
    return torch.cat([reward_model.score(ids, mask) for ids, mask in chunks])


def compute_metrics(
    context: EvaluationContext, answers: ScoredCompletions, baseline: ScoredCompletions
) -> dict[str, Any]:
    """Return the win rate by the held-out labelers with its interval, and means of the judge's verdicts."""
    win_rate = compare_responses(context.labelers, context.prompts, answers.responses, baseline.responses)
    verdicts = [judge(prompt, *response) for prompt, response in zip(context.prompts, answers.responses)]
    stated = [verdict.truthful for verdict in verdicts if verdict.truthful is not None]
    return {
        "win_rate": win_rate.rate,
        "win_rate_low": win_rate.low,
        "win_rate_high": win_rate.high,
        "truthful": sum(stated) / max(len(stated), 1),
        "toxic": sum(verdict.toxic for verdict in verdicts) / len(verdicts),
        "success": sum(verdict.success for verdict in verdicts) / len(verdicts),
        "courtesy": sum(verdict.courtesy for verdict in verdicts) / len(verdicts),
        "ended": sum(response.finished for response in answers.responses) / len(verdicts),
        "response_length": float(answers.completions.response_mask.sum(1).float().mean()),
        "score": sum(answers.scores) / len(answers.scores),
    }


def compare_responses(
    labelers: list[Labeler], prompts: Sequence[TaskPrompt], ours: Sequence[Response], theirs: Sequence[Response]
) -> WinRate:
    """Return how often labelers prefer our response to theirs, with an interval clustered by prompt."""
    pairs = [
        CompletionPair(
            prompt.text, {"task": prompt.task, "target": prompt.target}, to_completion(one), to_completion(other)
        )
        for prompt, one, other in zip(prompts, ours, theirs, strict=True)
    ]
    return compare_completions(SimulatedLabelers(labelers=labelers), pairs, Cache(None)).compute_win_rate()


def to_completion(response: Response) -> Completion:
    """Convert a response to a completion of the preference suite."""
    return Completion(response.text, response.finished, len(response.text.split()))


def compute_success_by_task(prompts: list[TaskPrompt], responses: list[Response]) -> dict[str, float]:
    """Return the mean success per task."""
    success: dict[str, list[float]] = defaultdict(list)
    for prompt, response in zip(prompts, responses):
        success[prompt.task].append(judge(prompt, *response).success)
    return {task: sum(values) / len(values) for task, values in sorted(success.items())}


def collect_samples(
    prompts: list[TaskPrompt], answers_by_model: dict[str, ScoredCompletions], per_task: int = 6
) -> list[dict[str, Any]]:
    """Return the first `per_task` prompts of every task with the responses of all models."""
    count: dict[str, int] = defaultdict(int)
    rows = []
    for index, prompt in enumerate(prompts):
        count[prompt.task] += 1
        if count[prompt.task] > per_task:
            continue
        responses = {}
        for name, answers in answers_by_model.items():
            response = answers.responses[index]
            verdict = judge(prompt, *response)
            responses[name] = {
                "text": response.text,
                "success": verdict.success,
                "truthful": verdict.truthful,
                "toxic": verdict.toxic,
                "score": answers.scores[index],
            }
        rows.append({"prompt": prompt.text, "task": prompt.task, "responses": responses})
    return rows


@torch.no_grad()
def compute_pretraining_loss(model: PreTrainedModel, tokenizer: Tokenizer, path: Path) -> float:
    """Return the mean next-token loss on unseen pretraining text, in nats per token: the alignment tax."""
    blocks = load_text_blocks(str(path), tokenizer, SEQ_LEN)
    total = count = 0.0
    for start in range(0, len(blocks), 32):
        batch = collate_blocks(blocks[start : start + 32], 1.0)
        loss, targets = causal_lm_loss(model, batch.input_ids, batch.loss_mask, batch.attention_mask)
        total, count = total + float(loss), count + float(targets)
    return total / count


def evaluate_reward_model(
    folder: Path, candidates: list[tuple[TaskPrompt, list[Response]]], training: list[Labeler], heldout: list[Labeler]
) -> dict[str, Any]:
    """Compare the reward model with both groups of labelers on unseen rankings.

    Args:
        folder: the reward model.
        candidates: prompts with K responses each.
        training: the labelers of the training data.
        heldout: the other labelers.

    Returns:
        accuracy on the comparisons of each group (without ties), agreement within each group, and log-loss,
        calibration error and reliability curve of σ(Δ) on the training group.
    """
    tokenizer = load_tokenizer(str(folder), ModelLoadingConfig())
    model = load_scalar_model(str(folder), tokenizer, ModelLoadingConfig()).eval()
    scores = score_candidates(model, tokenizer, candidates)
    ranking = torch.tensor([n for n, (_, responses) in enumerate(candidates) for _ in responses])
    result: dict[str, Any] = {}
    for group, labelers in (("train", training), ("heldout", heldout)):
        correct = pairs = loss = rankings = 0.0
        differences = []
        for labeler in labelers:
            ranks = torch.tensor(
                [rank for prompt, responses in candidates for rank in rank_responses(labeler, prompt, responses)]
            )
            outcome = ranking_loss(scores, ranking, ranks)
            correct, pairs = correct + float(outcome.correct), pairs + float(outcome.pairs)
            loss, rankings = loss + float(outcome.loss), rankings + float(outcome.rankings)
            better, worse, _ = ranking_pairs(ranking, ranks)
            differences.append(scores[better] - scores[worse])
        result[f"{group}_labelers_accuracy"] = correct / pairs
        result[f"agreement_{group}"] = compute_agreement(labelers, candidates)
        if group == "train":
            delta = torch.cat(differences)
            confidence, right = torch.sigmoid(delta.abs()), (delta > 0).float()
            result["log_loss"] = loss / rankings
            result["expected_calibration_error"] = float(expected_calibration_error(confidence, right))
            curve = reliability_curve(confidence, right)
            filled = curve[2] > 0
            result["reliability"] = {
                name: column[filled].tolist() for name, column in zip(("confidence", "accuracy", "count"), curve)
            }
    return result


def score_candidates(
    model: ScalarModel, tokenizer: Tokenizer, candidates: Sequence[tuple[TaskPrompt, list[Response]]]
) -> Tensor:
    """Return the score of every response by a reward model, in the order of prompts and responses, (N,)."""
    texts = [f"{prompt.text} {response.text}" for prompt, responses in candidates for response in responses]
    encoded = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    return score_rows(model, encoded, tokenizer.pad_token_id, SCORING_BATCH_SIZE)


def evaluate_best_of_n(out: Path, prompts: Path, count: int, seed: int) -> dict[str, list[float]]:
    """Return score against KL for the best of 1 to 16 responses of the SFT model to `count` prompts: PPO's baseline.

    The prompts are training prompts of PPO, so that both curves can be compared.
    """
    curve = compute_best_of_n_curve(score_sft_samples(out, prompts, count, BEST_OF_N, seed))
    return {"kl": curve.kl_bound, "score": curve.score}


def score_sft_samples(out: Path, prompts: Path, count: int, n: int, seed: int) -> Tensor:
    """Return the scores of n SFT responses per prompt, (count, n), sampled and scored as in the PPO recipe."""
    settings = yaml.safe_load((out / "recipes" / "ppo.yaml").read_text())["model"]["init_args"]
    sft = str(out / "sft" / "model")
    tokenizer = load_tokenizer(sft, ModelLoadingConfig())
    model = load_causal_lm(sft, tokenizer, ModelLoadingConfig()).eval()
    reward = RewardModelScorer(str(out / "reward" / "model"))
    reward.prepare(tokenizer, torch.device("cpu"))
    rows = [{"prompt": prompt.text} for prompt in read_prompts(prompts, count)]
    tokens = [TokenizedPrompt(tokenizer.encode(row["prompt"]), row) for row in rows]
    sampling = SamplingParams(
        **settings["sampling"] | {"missing_eos": MissingEOS(**settings["sampling"]["missing_eos"])}
    )
    samples = sample_candidates(model, tokenizer, tokens, reward, sampling, n, seed, batch_size=512)
    return torch.tensor([candidates.scores for candidates in samples])


def read_few_shot_prefixes(path: Path) -> list[str]:
    """Read the few-shot prefixes of a synthetic data set."""
    prefixes: list[str] = json.loads(path.read_text())["prefixes"]
    return prefixes
