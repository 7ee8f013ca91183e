"""Section 5.2, whose preferences: reward models and policies that follow one group of labelers each, or a named one."""

from collections.abc import Mapping, Sequence

from lit_rlhf.synthetic.evaluate import score_candidates
from lit_rlhf.synthetic.labeler_groups import build_labeler_groups
from lit_rlhf.synthetic.labelers import Labeler, Response
from lit_rlhf.synthetic.paper.estimates import estimate_mean
from lit_rlhf.synthetic.paper.measurements import Context, Measured, rate_preference
from lit_rlhf.synthetic.paper.rank_groups import GROUPS, name_group
from lit_rlhf.synthetic.paper.reward_models import rank_unseen_prompts
from lit_rlhf.synthetic.paper.sweeps import SWEEP_SIZE
from lit_rlhf.synthetic.tasks import TaskPrompt

POLICY_ITERATIONS, NAMED_ITERATIONS = 12, 30  # of 256 episodes; the one policy learns all groups
NAMED_REWARD_STAGE, NAMED_POLICY_STAGE = "reward-named", f"ppo-named-{SWEEP_SIZE}"


def name_reward_stage(group: str) -> str:
    """Return the stage of the reward model of a group."""
    return f"reward-{group}"


def name_policy_stage(group: str) -> str:
    """Return the stage of the policy that follows the reward model of a group."""
    return f"ppo-{group}-{SWEEP_SIZE}"


def measure_preferences(context: Context) -> Measured:
    """Measure how well reward models predict each group, and how often each group prefers each policy to SFT."""
    labelers = build_labeler_groups(context.seed)
    prompts, texts = context.instructions, [prompt.text for prompt in context.instructions]
    separate = {group: context.complete(name_policy_stage(group), texts) for group in GROUPS}
    named = {
        group: context.complete(NAMED_POLICY_STAGE, [name_group(group, text) for text in texts]) for group in GROUPS
    }
    baseline = context.complete(f"sft-{SWEEP_SIZE}", texts, stream=0)
    return {
        **measure_group_accuracy(context, labelers),
        **{f"policy/{key}": value for key, value in judge_policies(labelers, prompts, separate, baseline).items()},
        **{f"named/{key}": value for key, value in judge_policies(labelers, prompts, named, baseline).items()},
    }


def measure_group_accuracy(context: Context, labelers: Mapping[str, Sequence[Labeler]]) -> Measured:
    """Measure the accuracy of every reward model on the rankings of every group.

    The one that is told the group is told the one whose rankings it predicts.
    """
    rankings = rank_unseen_prompts(context, labelers)
    measured = {}
    for followed in GROUPS:
        model = context.get_reward_model(name_reward_stage(followed))
        scores = score_candidates(model, context.tokenizer, rankings.candidates)
        for group in GROUPS:
            measured[f"accuracy/{followed}/{group}"] = rankings.rate_accuracy(scores, group)
    model = context.get_reward_model(NAMED_REWARD_STAGE)
    for group in GROUPS:
        candidates = [
            (TaskPrompt(name_group(group, prompt.text), prompt.task, prompt.target), responses)
            for prompt, responses in rankings.candidates
        ]
        scores = score_candidates(model, context.tokenizer, candidates)
        measured[f"accuracy/named/{group}"] = rankings.rate_accuracy(scores, group)
    return measured


def judge_policies(
    labelers: Mapping[str, Sequence[Labeler]],
    prompts: Sequence[TaskPrompt],
    responses: Mapping[str, Sequence[Response]],
    baseline: Sequence[Response],
) -> Measured:
    """Return how often each group prefers responses to those of a baseline.

    Args:
        labelers: by group.
        prompts: of the responses.
        responses: by the group that they follow.
        baseline: responses to compare with.

    Returns:
        followed/group -> win rate; "own" and "other": the means over groups of those that follow the judging group, and
        of those that follow another one.
    """
    rates = {
        (followed, group): rate_preference(labelers[group], prompts, answers, baseline)
        for followed, answers in responses.items()
        for group in labelers
    }
    measured = {f"{followed}/{group}": estimate_mean(values) for (followed, group), values in rates.items()}
    for name, is_own in (("own", True), ("other", False)):
        columns = [values for (followed, group), values in rates.items() if (followed == group) == is_own]
        measured[name] = estimate_mean([sum(row) / len(row) for row in zip(*columns, strict=True)])
    return measured
