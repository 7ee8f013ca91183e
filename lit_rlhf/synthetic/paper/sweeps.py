"""The sweeps of App. E.6 and E.7 with the smallest models: their values, and what is measured of every run."""

from typing import NamedTuple

from lit_rlhf.synthetic.evaluate import compute_scores
from lit_rlhf.synthetic.paper.benchmarks import BENCHMARKS, write_shots
from lit_rlhf.synthetic.paper.estimates import estimate_mean
from lit_rlhf.synthetic.paper.measurements import NUM_SHOTS, SIZES, Context, Measured, rate_likert, score_exercises
from lit_rlhf.synthetic.sampling import complete_prompts

SWEEP_SIZE = SIZES[0]
SWEEP_BENCHMARKS = ("reading", "discrete")  # like the paper's SQuADv2 and DROP


class SweepRun(NamedTuple):
    """Settings of one run of PPO-ptx."""

    beta: float = 0.1
    gamma: float = 1.0
    iterations: int = 12  # of 256 episodes
    reference: str = "sft"  # what β keeps the policy near to: "sft", or "pretraining" as in Figure 34


# sweep -> label on its axis -> run
SWEEPS: dict[str, dict[str, SweepRun]] = {
    "gamma": {f"{value:g}": SweepRun(gamma=value) for value in (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)},
    "beta": {
        f"{value:g}": SweepRun(beta=value, gamma=0.0, reference="pretraining") for value in (0.01, 0.1, 0.3, 1.0, 3.0)
    },
    "both": {f"{value:g}": SweepRun(beta=value) for value in (0.0, 0.01, 0.1, 0.3, 3.0)},
    "episodes": {f"{256 * count:,}": SweepRun(iterations=count) for count in (3, 6, 12, 24, 48)},
}


def name_sweep_stage(sweep: str, label: str) -> str:
    """Return the name of the stage of a run; a file name without a dot or a comma."""
    return f"sweep-{sweep}-{label.replace('.', '_').replace(',', '')}"


def measure_sweeps(context: Context) -> Measured:
    """Measure Figures 33 to 36: score, Likert rating and two benchmarks of every run, and of SFT and the base model."""
    stages = {
        f"{sweep}/{label}": name_sweep_stage(sweep, label) for sweep, runs in SWEEPS.items() for label in runs
    } | {"base": f"pretraining-{SWEEP_SIZE}", "sft": f"sft-{SWEEP_SIZE}"}
    reward_model = context.get_reward_model("reward")
    prompts, texts = context.instructions, [prompt.text for prompt in context.instructions]
    exercises = {}
    for task in SWEEP_BENCHMARKS:
        rng = context.make_rng(f"sweep {task}")
        items = [BENCHMARKS[task](rng) for _ in prompts]
        exercises[task] = (
            [write_shots(rng, BENCHMARKS[task], NUM_SHOTS["few"]) + each.context for each in items],
            items,
        )
    measured = {}
    for name, stage in stages.items():
        answers = complete_prompts(context.get_model(stage), context.tokenizer, texts, 1.0, context.seed, 960)
        scores = compute_scores(reward_model, *answers.append_to(texts, context.tokenizer))
        measured[f"score/{name}"] = estimate_mean(scores.tolist(), "points")
        ratings = rate_likert(context.labelers["training"], prompts, answers.responses)
        measured[f"likert/{name}"] = estimate_mean(ratings, "points")
        for task, (contexts, items) in exercises.items():
            measured[f"{task}/{name}"] = estimate_mean(score_exercises(context, stage, contexts, items))
    return measured
