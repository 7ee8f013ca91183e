"""Section on reward models: within and across labeler groups, over size and rankings, and what happens beyond them."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.evaluation.reward_model_metrics import ScoredRankings, build_untied_pairs
from lit_rlhf.evaluation.win_rate import win_rate
from lit_rlhf.functional import best_of_n_kl, expected_best_of_k
from lit_rlhf.models.export import export_checkpoint
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import ScalarModel
from lit_rlhf.synthetic.evaluate import compute_scores, score_candidates
from lit_rlhf.synthetic.labeler_groups import PromptsWithResponses
from lit_rlhf.synthetic.labelers import Labeler, Response, rank_responses
from lit_rlhf.synthetic.paper.build import REWARD_SIZE, PaperDataSizes
from lit_rlhf.synthetic.paper.estimates import Estimate, estimate_mean
from lit_rlhf.synthetic.paper.measurements import SIZES, Context, Measured, exactly, rate_preference
from lit_rlhf.synthetic.paper.rank_groups import SMALL_NUMBERS
from lit_rlhf.synthetic.paper.sweeps import SWEEP_SIZE, name_sweep_stage
from lit_rlhf.synthetic.rankings import sample_completions
from lit_rlhf.synthetic.sampling import complete_prompts, compute_kl

FOLDS_STAGE = "labeler-folds"
FREE_STAGE = f"ppo-without-kl-{SWEEP_SIZE}"  # PPO with β = 0, whose policies after every iteration are kept
ITERATIONS = (3, 6, 12, 24, 48)  # of 256 episodes, after which policies are measured; those of the sweep over episodes
BEST_OF = (1, 2, 4, 8, 16, 32)
NUM_BEST_OF_PROMPTS = 256
RANKED_GROUPS = {"training_labelers": "training", "heldout_labelers": "held_out"}  # kind in a panel -> labelers
# label on the axis of rankings -> stage; the reward model of all policies is trained on all of them
STAGES_BY_NUMBER = {f"{number:,}": f"reward-{number}" for number in SMALL_NUMBERS}
STAGES_BY_NUMBER[f"{PaperDataSizes().reward_prompts:,}"] = "reward"
STAGES_BY_SIZE = {size: "reward" if size == REWARD_SIZE else f"reward-{size}" for size in SIZES}


class GroupRankings:
    """Responses to prompts, ranked by groups of labelers.

    Args:
        candidates: prompts with their responses, N in all.
        labelers: by group.
    """

    def __init__(self, candidates: PromptsWithResponses, labelers: Mapping[str, Sequence[Labeler]]) -> None:
        self.candidates = candidates
        self.prompt_index = torch.tensor([n for n, (_, responses) in enumerate(candidates) for _ in responses])
        self.ranks = {group: [self._rank(each) for each in members] for group, members in labelers.items()}

    def _rank(self, labeler: Labeler) -> Tensor:
        """Return the rank of every response, (N,)."""
        ranks = [rank for prompt, responses in self.candidates for rank in rank_responses(labeler, prompt, responses)]
        return torch.tensor(ranks)

    def rate_accuracy(self, scores: Tensor, group: str) -> Estimate:
        """Return the fraction of a group's comparisons, without ties, that scores (N,) predict.

        The interval is clustered by prompt.
        """
        correct: list[float] = []
        prompts: list[int] = []
        for ranks in self.ranks[group]:
            pairs = build_untied_pairs(ScoredRankings(scores, self.prompt_index, ranks, torch.zeros_like(ranks)))
            correct += pairs.correct.tolist()
            prompts += pairs.ranking_index.tolist()
        found = win_rate(correct, prompts)
        return Estimate(found.rate, found.low, found.high)


def rank_unseen_prompts(context: Context, labelers: Mapping[str, Sequence[Labeler]]) -> GroupRankings:
    """Let groups rank responses to unseen prompts by the models that the rankings of training are from."""
    sft, base = (context.folder / f"{stage}-{REWARD_SIZE}" / "model" for stage in ("sft", "pretraining"))
    return GroupRankings(sample_completions(context.instructions, sft, base, context.seed, 4), labelers)


def measure_reward_models(context: Context) -> Measured:
    """Measure the reward models: five folds, accuracy over size and rankings, score and preference against KL."""
    return measure_folds(context.folder) | measure_accuracy(context) | measure_overoptimization(context)


def measure_folds(folder: Path) -> Measured:
    """Measure the accuracy on labelers of the training set and on held-out ones; the interval is that of the folds."""
    runs = json.loads((folder / FOLDS_STAGE / "folds.json").read_text())["runs"]
    return {f"folds/{group}": estimate_mean([run[group] for run in runs]) for group in RANKED_GROUPS}


def measure_accuracy(context: Context) -> Measured:
    """Measure the accuracy over the size of the reward model and over its rankings, on unseen prompts."""
    rankings = rank_unseen_prompts(context, context.labelers)
    stages = {f"size/{size}": stage for size, stage in STAGES_BY_SIZE.items()}
    stages |= {f"rankings/{label}": stage for label, stage in STAGES_BY_NUMBER.items()}
    measured = {}
    for name, stage in stages.items():
        scores = score_candidates(context.get_reward_model(stage), context.tokenizer, rankings.candidates)
        for kind, group in RANKED_GROUPS.items():
            measured[f"{name}/{kind}"] = rankings.rate_accuracy(scores, group)
    return measured


def measure_overoptimization(context: Context) -> Measured:
    """Measure KL to SFT, mean score and how often labelers prefer the response to one of SFT.

    Of the best of n responses of SFT; of PPO without a KL penalty, as it goes on; and of PPO-ptx, whose runs are those
    of the sweep over episodes. All with the smallest models and the reward model of all policies.
    """
    prompts, labelers = context.instructions, context.labelers["training"]
    texts = [prompt.text for prompt in prompts]
    reward_model, sft_stage = context.get_reward_model("reward"), f"sft-{SWEEP_SIZE}"
    sft, baseline = context.get_model(sft_stage), context.complete(sft_stage, texts, stream=2)

    def measure(name: str, policy: PreTrainedModel) -> Measured:
        answers = complete_prompts(policy, context.tokenizer, texts, 1.0, context.seed, 970)
        scores = compute_scores(reward_model, *answers.append_to(texts, context.tokenizer))
        preferences = rate_preference(labelers, prompts, answers.responses, baseline)
        return {
            f"kl/{name}": exactly(compute_kl(sft, context.tokenizer, texts, answers)),
            f"score/{name}": estimate_mean(scores.tolist(), "points"),
            f"preference/{name}": estimate_mean(preferences),
        }

    start = measure("ppo/0", sft)
    measured = start | {name.replace("ppo", "ppo_ptx"): value for name, value in start.items()}
    for count, policy in zip(ITERATIONS, load_policies(context), strict=True):
        stage = name_sweep_stage("episodes", f"{256 * count:,}")
        measured |= measure(f"ppo/{count}", policy) | measure(f"ppo_ptx/{count}", context.get_model(stage))
    return measured | measure_best_of_n(context, sft, reward_model, baseline)


def measure_best_of_n(
    context: Context, sft: PreTrainedModel, reward_model: ScalarModel, baseline: Sequence[Response]
) -> Measured:
    """Measure the same of the best of n responses of SFT; the KL is that of responses whose scores all differ."""
    most, count = max(BEST_OF), min(NUM_BEST_OF_PROMPTS, len(baseline))
    prompts = [prompt for prompt in context.instructions[:count] for _ in range(most)]
    theirs = [response for response in baseline[:count] for _ in range(most)]
    texts = [prompt.text for prompt in prompts]
    answers = complete_prompts(sft, context.tokenizer, texts, 1.0, context.seed, 971)
    scores = compute_scores(reward_model, *answers.append_to(texts, context.tokenizer)).view(count, most)
    preferences = rate_preference(context.labelers["training"], prompts, answers.responses, theirs)
    best_scores = expected_best_of_k(scores)
    best_preferences = expected_best_of_k(scores, torch.tensor(preferences).view(count, most))
    measured = {}
    for n in BEST_OF:
        measured[f"kl/best_of_n/{n}"] = exactly(float(best_of_n_kl(torch.tensor(n))))
        measured[f"score/best_of_n/{n}"] = estimate_mean(best_scores[:, n - 1].tolist(), "points")
        measured[f"preference/best_of_n/{n}"] = estimate_mean(best_preferences[:, n - 1].tolist())
    return measured


def load_policies(context: Context) -> Iterator[PreTrainedModel]:
    """Yield the policies of the run without a KL penalty after `ITERATIONS`."""
    for checkpoint in select_checkpoints(context.folder / FREE_STAGE / "checkpoints"):
        with TemporaryDirectory() as folder:
            export_checkpoint(checkpoint, Path(folder) / "model")
            yield load_causal_lm(str(Path(folder) / "model"), context.tokenizer, ModelLoadingConfig()).eval()


def select_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints after `ITERATIONS`, or at these fractions of a shorter run."""
    kept = sorted(folder.glob("epoch=*.ckpt"), key=lambda path: int(path.stem.removeprefix("epoch=")))
    return [kept[math.ceil(len(kept) * count / max(ITERATIONS)) - 1] for count in ITERATIONS]
