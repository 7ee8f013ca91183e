"""`lit-rlhf best-of-n`: sample n responses per prompt, keep the best by a reward; the baseline of a PPO run."""

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from lit_rlhf.commands.support.argument_parser import Parser
from lit_rlhf.commands.support.log_filters import install_log_filters
from lit_rlhf.errors import UserError
from lit_rlhf.paths import written_whole

if TYPE_CHECKING:
    from lit_rlhf.evaluation.models.best_of_n import BestOfNCurve
    from lit_rlhf.models.loading_config import ModelLoadingConfig
    from lit_rlhf.rewards import Reward


def run(command: str, args: list[str]) -> int:
    """Sample, score, write the best response to each prompt, and print the score of the best of 1 to n."""
    parser = Parser(
        prog="lit-rlhf best-of-n",
        description="sample n responses per prompt, keep the best by a reward; the baseline of a PPO run",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="policy: a transformers folder, or a hub name")
    parser.add_argument(
        "--reward",
        required=True,
        metavar="REWARD",
        help="a reward model's folder, a function such as my_file.my_function, or the address of a server",
    )
    parser.add_argument("--prompts", required=True, metavar="FILE", help="rows {'prompt'}, as for PPO")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSON lines; must not exist yet")
    parser.add_argument("--n", type=int, default=16, metavar="N", help="responses per prompt [%(default)s]")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    parser.add_argument("--template", help="prompt template, as data.template")
    parser.add_argument("--max-prompt-length", type=int, default=1024, metavar="N", help="[%(default)s]")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="[%(default)s]")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="[%(default)s]")
    parser.add_argument(
        "--missing-eos-score", type=float, metavar="S", help="score of a response without an end token, as in PPO"
    )
    parser.add_argument("--missing-eos-penalty", type=float, metavar="S", help="or: subtracted from its score")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="responses at a time [%(default)s]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="sampling seed [%(default)s]")
    settings = parser.parse(args)
    check_settings(settings)
    install_log_filters()
    from lit_rlhf.commands.support.sample_lineage import write_sample_lineage
    from lit_rlhf.lineage.writing import Start

    start = Start.now()
    curve = sample_and_write(settings)
    models = [("policy", settings.model)] + [("reward model", settings.reward)] * is_model(settings.reward)
    write_sample_lineage(settings.out, start, command, args, settings, models, [("prompts", settings.prompts)])
    print(format_curve(curve))
    print(f"\n{settings.out}: the best of {settings.n} for each prompt\n{curve_path(settings.out)}: this table")
    return 0


def check_settings(settings: Namespace) -> None:
    """Refuse invalid settings before anything is loaded."""
    for name in ("n", "limit", "batch_size", "max_prompt_length"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    if settings.missing_eos_score is not None and settings.missing_eos_penalty is not None:
        raise UserError("--missing-eos-score and --missing-eos-penalty exclude each other")
    if settings.temperature <= 0:
        raise UserError(f"--temperature must be above 0, got {settings.temperature}: greedy responses are all the same")
    for path in (settings.out, curve_path(settings.out)):
        if path.exists():
            raise UserError(f"--out: {path} exists already; remove it or name another file")
    if not settings.out.parent.is_dir():
        raise UserError(f"--out: there is no folder {settings.out.parent}")


def curve_path(out: Path) -> Path:
    """Return the file of the curve, in the folder of the responses."""
    return out.with_name(f"{out.stem}.curve.json")


def sample_and_write(settings: Namespace) -> "BestOfNCurve":
    """Sample, score and write; return the `BestOfNCurve`."""
    import torch

    from lit_rlhf.data.prompt_template import PromptTemplate
    from lit_rlhf.data.prompts import read_prompts
    from lit_rlhf.data.truncation import TruncationPolicy
    from lit_rlhf.evaluation.models.best_of_n import (
        check_fits_max_positions,
        compute_best_of_n_curve,
        sample_candidates,
    )
    from lit_rlhf.generation.sampling import MissingEOS, SamplingParams
    from lit_rlhf.models.loading import load_causal_lm, load_config, load_tokenizer
    from lit_rlhf.models.loading_config import ModelLoadingConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loading = ModelLoadingConfig(dtype=settings.dtype)
    score, penalty = settings.missing_eos_score, settings.missing_eos_penalty
    missing_eos = None if score is None and penalty is None else MissingEOS(score, penalty)
    sampling = SamplingParams(settings.max_new_tokens, settings.temperature, missing_eos=missing_eos)
    tokenizer = load_tokenizer(settings.model, loading)
    lengths = TruncationPolicy(settings.max_prompt_length).validated()
    template = PromptTemplate(tokenizer, settings.template)
    prompts = read_prompts(settings.prompts, "auto", template, lengths)[: settings.limit]
    check_fits_max_positions(load_config(settings.model, loading), prompts, sampling)
    reward = build_reward(settings.reward, loading)
    reward.prepare(tokenizer, device)
    policy = load_causal_lm(settings.model, tokenizer, loading).to(device).eval()
    scores = []
    sampled = sample_candidates(
        policy, tokenizer, prompts, reward, sampling, settings.n, settings.seed, settings.batch_size
    )
    with written_whole(settings.out) as part, part.open("w", encoding="utf-8") as file:
        for candidates in sampled:
            best = candidates.best_index
            row = {**candidates.row, "completion": candidates.responses[best], "score": candidates.scores[best]}
            file.write(json.dumps(row | {"scores": candidates.scores}, default=str) + "\n")
            scores.append(candidates.scores)
    curve = compute_best_of_n_curve(torch.tensor(scores))
    curve_path(settings.out).write_text(json.dumps(curve._asdict(), indent=1) + "\n")
    return curve


def build_reward(reward: str, loading: "ModelLoadingConfig") -> "Reward":
    """Return the `Reward` of an address, a folder or hub name, or a function."""
    from lit_rlhf.rewards import FunctionReward, RemoteReward, RewardModelScorer

    if "://" in reward:
        return RemoteReward(reward)
    if is_model(reward):
        return RewardModelScorer(reward, require_centered=False, loading=loading)
    return FunctionReward(reward)


def is_model(reward: str) -> bool:
    """Return whether a reward is a folder or hub name, and neither an address nor a function."""
    return "://" not in reward and ("/" in reward or Path(reward).exists())


def format_curve(curve: "BestOfNCurve") -> str:
    """Return the curve at powers of two and at n, as text."""
    shown = [k for k in curve.k if k & (k - 1) == 0 or k == curve.k[-1]]
    lines = ["  n   mean score   ± s.e.   KL at most (nats per response)"]
    lines += [
        f"{k:>3}   {curve.score[k - 1]:>10.4f}   {curve.standard_error[k - 1]:>6.4f}   {curve.kl_bound[k - 1]:>6.3f}"
        for k in shown
    ]
    return "\n".join(lines)
