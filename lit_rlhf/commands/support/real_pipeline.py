"""`lit-rlhf real`: a real instruction model through all stages on real data, with the shipped recipes.

The recipes of `smollm2-135m/` are copied into the folder of the run, with its paths in them; each training stage is
`lit-rlhf fit` on its copy, and the evaluation is `lit-rlhf evaluate`. So each can be repeated, changed or resumed by
hand.
"""

import json
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
import yaml
from torch import Tensor

from lit_rlhf.commands.recipes import find_recipe
from lit_rlhf.commands.support.console import terminal_width
from lit_rlhf.commands.support.real_data import (
    COMPARISONS,
    EVALUATION_FILES,
    POLITENESS,
    RealDataSizes,
    check_data,
    list_files,
    to_name,
    write_real_data,
)
from lit_rlhf.commands.support.recipe_copies import copy_shipped_recipes, read_shipped_recipe
from lit_rlhf.commands.support.stage_runner import (
    StageRunner,
    StageState,
    describe_command,
    fit,
    format_values,
    is_verbose,
    read_curves,
    read_last_values,
    run_command,
    say,
)
from lit_rlhf.commands.support.sweep_recipes import compose_config
from lit_rlhf.data.collation import collate_rankings
from lit_rlhf.data.comparisons import tokenize_rankings
from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.records import Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows
from lit_rlhf.data.truncation import TruncationPolicy
from lit_rlhf.evaluation.reports.quickstart_report import TERMINAL_WIDTH
from lit_rlhf.evaluation.reports.real_report import format_real_table, write_real_report
from lit_rlhf.evaluation.reward_model_metrics import ScoredRankings, compute_reward_model_metrics
from lit_rlhf.hashing import hash_files
from lit_rlhf.models.catalog import fetch_model
from lit_rlhf.models.loading import load_causal_lm, load_stored_tokenizer, load_tokenizer
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora
from lit_rlhf.models.scalar_model import load_scalar_model
from lit_rlhf.packing.rankings import RankingInputs

MODEL, HUB_NAME, PAD_TOKEN = "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "<|endoftext|>"
RECIPES = "smollm2-135m"
RUN_FOLDER, GOLD_FOLDER = "runs/smollm2-135m", "runs/judge/reward"  # in the shipped recipes
Precision = Literal["auto", "32-true", "bf16-mixed"]
# stage -> the sources of comparisons that it is measured on
REWARD_MODELS = {"reward": COMPARISONS | POLITENESS, "gold": COMPARISONS | POLITENESS, "politeness": POLITENESS}
CURVES = {
    "sft": {"train/loss": "train/loss", "validation/loss": "validation/loss"},
    **{stage: {"train/loss": "train/loss", "train/accuracy": "train/accuracy"} for stage in REWARD_MODELS},
}
PPO_CURVES = (
    "reward/score",
    "reward/score_std",
    "reward/proxy",
    "reward/gold",
    "reward/kl",
    "response/length",
    "pretraining/loss",
)
HEADLINES = {
    "sft": {"train/loss": "train/loss", "validation/loss": "validation/loss"},
    **{stage: {"train/loss": "train/loss", "validation/accuracy": "validation/accuracy"} for stage in REWARD_MODELS},
    "ppo": {"reward/proxy": "proxy", "reward/gold": "gold", "reward/kl": "KL"},
    "ppo-ptx": {"reward/proxy": "proxy", "reward/gold": "gold", "reward/kl": "KL"},
}
TRAINING_STAGES = tuple(HEADLINES)
TIMED_SHAPE = (4, 96)  # sequences and tokens of the step that decides the precision
TIMED_SHORT = 32  # tokens of the step before
SCORED_RANKINGS = 8  # of a forward pass


class EvaluationSizes(NamedTuple):
    """Rows of each suite."""

    prompts: int
    toxicity: int
    questions: int  # of TruthfulQA
    endings: int  # of HellaSwag
    blocks: int  # of each text
    max_new_tokens: int


class RealScale(NamedTuple):
    """How much data, training and evaluation a run takes."""

    name: str
    about: str  # one line for the report
    sizes: RealDataSizes
    has_adapters: bool  # LoRA on one shared base, or all weights
    arguments: dict[str, tuple[str, ...]]  # training stage -> further arguments of `fit`
    evaluation: EvaluationSizes
    best_of: int
    seconds: dict[str, float]  # stage -> as measured, for the time that is left


def _ppo(iterations: int, episodes: int, micro_batch_size: int, tokens: int, *more: str) -> tuple[str, ...]:
    return (
        f"--trainer.max_epochs={iterations}",
        f"--model.ppo.rollout_batch_size={episodes}",
        f"--model.ppo.micro_batch_size={micro_batch_size}",
        f"--model.sampling.max_new_tokens={tokens}",
        *more,
    )


_LORA_RATES = {"sft": "--model.optimizer.lr=3.0e-4", "reward": "--model.optimizer.lr=5.0e-4"}
_FEW_PROBES = "--trainer.callbacks.RewardModelReport.probes=8"  # each is six more answers to score
_SMALL_STEPS = ("--data.micro_batch_size=4", "--trainer.accumulate_grad_batches=1")  # few rankings, many steps
# few episodes: several of each prompt, which is computed once for them; many steps, and a KL of some nats within them
_SMALL_MINIBATCHES = (
    "--model.ppo.samples_per_prompt=4",
    "--trainer.accumulate_grad_batches=1",
    "--model.optimizer.lr=5.0e-4",
    "--model.scheduler.init_args.warmup_iterations=1",
    "--model.kl.coefficient=0.05",
)
CPU = RealScale(
    "cpu",
    "subsets of the data that fit into 100 minutes on two CPU cores; adapters (LoRA) on one shared base",
    RealDataSizes(
        demonstrations=360,
        rankings=240,
        easy_pairs=460,
        validation_rankings=150,
        prompts=2000,
        evaluation_prompts=96,
        max_prompt_tokens=128,
        max_completion_tokens=96,
        max_ranked_tokens=128,
    ),
    has_adapters=True,
    arguments={
        "sft": ("--trainer.max_epochs=1", _LORA_RATES["sft"]),
        **dict.fromkeys(REWARD_MODELS, (*_SMALL_STEPS, _LORA_RATES["reward"], _FEW_PROBES)),
        "ppo": _ppo(12, 64, 8, 64, *_SMALL_MINIBATCHES),
        "ppo-ptx": _ppo(12, 64, 8, 64, *_SMALL_MINIBATCHES),
    },
    evaluation=EvaluationSizes(40, 48, 16, 40, 8, 64),
    best_of=4,
    seconds={
        "model": 40,
        "data": 5,
        "precision": 20,
        "sft": 255,
        "reward": 660,
        "gold": 690,
        "politeness": 200,
        "accuracy": 265,
        "ppo": 1045,
        "ppo-ptx": 1185,
        "evaluation": 1245,
    },
)
_FEW_STEPS = (
    "--trainer.max_steps=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.limit_val_batches=1",
    "--data.micro_batch_size=2",
)
TINY = RealScale(
    "tiny",
    "a handful of steps: the procedure at work, and no results",
    RealDataSizes(
        demonstrations=32,
        rankings=24,
        easy_pairs=24,
        validation_rankings=12,
        prompts=64,
        evaluation_prompts=4,
        max_prompt_tokens=64,
        max_completion_tokens=32,
        max_ranked_tokens=32,
    ),
    has_adapters=True,
    arguments={
        "sft": (*_FEW_STEPS, _LORA_RATES["sft"]),
        **dict.fromkeys(REWARD_MODELS, (*_FEW_STEPS, _LORA_RATES["reward"])),
        "ppo": _ppo(2, 4, 2, 8),
        "ppo-ptx": _ppo(2, 4, 2, 8),
    },
    evaluation=EvaluationSizes(4, 4, 2, 2, 1, 8),
    best_of=2,
    seconds={},
)
FULL = RealScale(
    "full",
    "all the data, all weights, and the proportions of the paper: hours on a CPU, for a GPU",
    RealDataSizes(None, None, None, 300, None, 256, 256, 256, 512),
    has_adapters=False,
    arguments={},
    evaluation=EvaluationSizes(256, 1000, 400, 1000, 100, 128),
    best_of=8,
    seconds={},
)
SCALES = {scale.name: scale for scale in (TINY, CPU, FULL)}


class RealRun:
    """One run of `lit-rlhf real`.

    Args:
        out: its folder.
        data: the data folder.
        scale: how much of everything.
        seed: of the choice of rows and of every stage.
        overlays: recipes for one more `-c` of every training stage.
        model: a model folder in place of the catalog's.
        precision: "auto" times a training step in both, and takes the faster.
    """

    def __init__(
        self,
        out: Path,
        data: Path,
        scale: RealScale,
        seed: int = 0,
        overlays: Sequence[str] = (),
        model: Path | None = None,
        precision: Precision = "auto",
    ) -> None:
        self.out, self.data, self.scale, self.seed = out, data, scale, seed
        self.overlays, self.model, self.precision = list(overlays), model, precision
        self.runner = StageRunner(out, scale.seconds)
        self.recipes: dict[str, Path] = {}

    def run(self) -> int:
        """Run every stage that is not done, write `report.json` and `report.html`, print the table; return 0."""
        check_data(self.data)
        check_packages()
        self.check_overlays()
        say(f"InstructGPT's procedure, a real model, real data, seed {self.seed}, in {self.out}: {self.scale.about}.")
        base = self.runner.run("model", self.get_model, "a model folder", str(self.model or MODEL))
        content = hash_files(list_files(self.data))  # and not the path: the same folder has several
        chosen_rows = [content, self.scale.sizes._asdict(), self.seed]
        counts = self.runner.run("data", self.write_data, "subsets, split by prompt", chosen_rows)
        chosen = self.runner.run("precision", self.choose_precision, "time a training step", self.precision)
        self.write_recipes(chosen["precision"], self.out / "recipes")
        for stage in ("sft", *REWARD_MODELS):
            self.fit(stage)
        reward_models = self.runner.run("accuracy", self.measure_reward_models, "reward models on held-out prompts")
        for stage in ("ppo", "ppo-ptx"):
            self.fit(stage)
        evaluation = self.recipes["evaluate"]
        arguments = ["evaluate", "-c", str(evaluation)]
        settings = evaluation.read_text(encoding="utf-8")
        self.runner.run("evaluation", self.evaluate, describe_command(arguments), settings, has_bar=True)
        report = self.collect_report(base, counts, chosen, reward_models)
        write_real_report(report, self.out / "report.json", self.out / "report.html")
        print(f"\n{format_real_table(report, terminal_width(sys.stdout) or TERMINAL_WIDTH)}")
        print(f"\nreport: {self.out / 'report.html'}\nnext: lit-rlhf chat --model {self.out / 'ppo-ptx' / 'model'}")
        return 0

    def check_overlays(self) -> None:
        """Refuse overlays that a training stage would refuse, before the first stage.

        Raises:
            UserError: raised by `fit`.
        """
        if self.overlays:
            with TemporaryDirectory() as folder:  # the recipes of an earlier call stay
                self.write_recipes("32-true", Path(folder))
                for stage in TRAINING_STAGES:
                    compose_config(self.build_fit_arguments(stage))

    def collect_report(
        self, base: str, counts: dict[str, int], chosen: dict[str, Any], reward_models: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the report, from what the stages returned and wrote."""
        return {
            "seed": self.seed,
            "scale": self.scale.name,
            "about": self.scale.about,
            "model": base,
            "rows": counts,
            "precision": chosen,
            "reward_models": reward_models,
            "curves": {stage: self.read_curves(stage) for stage in TRAINING_STAGES},
            "evaluation": self.read_evaluation(),
            "stages": self.runner.seconds,
            "seconds_total": sum(self.runner.seconds.values()),
            "peak_memory_gib": self.runner.peak_memory_gib,
            "versions": read_machine(),
        }

    @property
    def base(self) -> Path:
        """The folder of the untrained model."""
        return self.model or self.out / "base"

    def get_model(self, state: StageState) -> str:
        """Get the model, unless a folder was given; return where it came from."""
        origin = str(self.model) if self.model else fetch_model(MODEL, self.base)
        state.headline = origin
        return origin

    def write_data(self, state: StageState) -> dict[str, int]:
        """Write the data; return the rows of each file."""
        tokenizer = load_stored_tokenizer(str(self.base), ModelLoadingConfig())
        counts = write_real_data(self.data, self.out / "data", tokenizer, self.scale.sizes, self.seed)
        shown = ("demonstrations", "rankings", "rankings_gold", "prompts")
        state.headline = ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in shown)
        return counts

    def choose_precision(self, state: StageState) -> dict[str, Any]:
        """Time a training step in both precisions; return the faster one, and what was measured."""
        if self.precision != "auto":
            state.headline = self.precision
            return {"precision": self.precision, "tokens_per_second": {}}
        if torch.cuda.is_available():
            state.headline = "bf16-mixed, on a GPU"
            return {"precision": "bf16-mixed", "tokens_per_second": {}}
        speeds = time_training_steps(self.base, self.scale.has_adapters)
        best = max(speeds, key=speeds.__getitem__)
        state.headline = "; ".join(f"{name} {speed:,.0f} tokens/s" for name, speed in speeds.items()) + f": {best}"
        return {"precision": best, "tokens_per_second": speeds}

    def write_recipes(self, precision: str, folder: Path) -> None:
        """Copy the recipes with the paths of this run, and write the overlays that it adds."""
        texts = {name: str(self.data / file) for name, file in EVALUATION_FILES.items()}
        texts |= {"data/": f"{self.out}/data/", HUB_NAME: str(self.base)}
        texts |= {GOLD_FOLDER: f"{self.out}/gold", RUN_FOLDER: str(self.out)}
        self.recipes = copy_shipped_recipes(RECIPES, texts, folder)
        evaluation = read_shipped_recipe("evaluate/smollm2-135m", texts)
        self.recipes["evaluate"] = folder / "evaluate.yaml"
        settings = self.size_evaluation(yaml.safe_load(evaluation))
        self.recipes["evaluate"].write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        # over 49 thousand tokens, some log-probs in bfloat16 differ by more than the clip range between the generator's
        # pass and that of the update
        half_precision = {} if precision == "32-true" else {"ppo": {"old_logprobs": "recompute"}}
        overlays: dict[str, dict[str, Any]] = {
            "precision": {"trainer": {"precision": precision}},
            "gold": {
                "run_dir": f"{self.out}/gold",
                "data": {"init_args": {"path": f"{self.out}/data/rankings_gold.jsonl"}},
            },
            "politeness": {
                "run_dir": f"{self.out}/politeness",
                "data": {
                    "init_args": {
                        "path": f"{self.out}/data/easy_pairs.jsonl",
                        "validation_path": f"{self.out}/data/validation_politeness.jsonl",
                    }
                },
            },
            "validation": {
                "data": {
                    "init_args": {
                        "validation_path": f"{self.out}/data/rankings_validation.jsonl",
                        "validation_fraction": 0.0,
                    }
                }
            },
            "watched": {"model": {"init_args": self.watched_reward() | half_precision}},
            "ptx": {
                "run_dir": f"{self.out}/ppo-ptx",
                "trainer": {
                    "callbacks+": [
                        {
                            "class_path": "lit_rlhf.callbacks.PretrainingMix",
                            "init_args": {
                                "path": f"{self.out}/data/pretraining.jsonl",
                                "coefficient": 0.5,
                                "micro_batch_size": 2,
                                "seq_len": 128,
                            },
                        }
                    ]
                },
            },
        }
        for name, overlay in overlays.items():
            self.recipes[f"with-{name}"] = folder / f"with-{name}.yaml"
            self.recipes[f"with-{name}"].write_text(yaml.safe_dump(overlay, sort_keys=False), encoding="utf-8")

    def size_evaluation(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Return the recipe of the evaluation with the seed and the sizes of this run."""
        sizes = self.scale.evaluation
        suites = {name: suite["init_args"] for name, suite in recipe["suites"].items()}
        for name, count in (
            ("preference", sizes.prompts),
            ("scores", sizes.prompts),
            ("toxicity", sizes.toxicity),
            ("truthfulness", sizes.questions),
            ("text", sizes.blocks),
        ):
            suites[name]["limit"] = count
        for benchmark in suites["benchmarks"]["tasks"]:
            benchmark["limit"] = sizes.endings
        for name in ("preference", "scores", "samples"):
            suites[name]["max_new_tokens"] = sizes.max_new_tokens
        models = {
            (f"best of {self.scale.best_of}" if "best_of" in model else name): model
            for name, model in recipe["models"].items()
        }
        for model in models.values():
            if "best_of" in model:
                model["best_of"]["n"] = self.scale.best_of
        return recipe | {"models": models, "seed": self.seed, "batch_size": 32, "max_batch_tokens": 8192}

    def watched_reward(self) -> dict[str, Any]:
        """Return a reward that is the proxy's score alone, and logs the gold model's beside it."""

        def part(stage: str) -> dict[str, Any]:
            if self.scale.has_adapters:
                path = f"{self.out}/{stage}/checkpoints/last.ckpt"
                return {"class_path": "lit_rlhf.rewards.LoRARewardModel", "init_args": {"checkpoint": path}}
            return {
                "class_path": "lit_rlhf.rewards.RewardModelScorer",
                "init_args": {"model": f"{self.out}/{stage}/model"},
            }

        names = {"rewards": [part("reward"), part("gold")], "weights": [1.0, 0.0], "names": ["proxy", "gold"]}
        if self.scale.has_adapters:
            critic = {"checkpoint": f"{self.out}/reward/checkpoints/last.ckpt"}
            critic_class = "lit_rlhf.modules.LoRACritic"
        else:
            critic, critic_class = {"model": f"{self.out}/reward/model"}, "lit_rlhf.modules.SeparateCritic"
        return {
            "reward": {"class_path": "lit_rlhf.rewards.WeightedSum", "init_args": names},
            "critic": {"class_path": critic_class, "init_args": critic},
        }

    def build_fit_arguments(self, stage: str) -> list[str]:
        """Return the arguments of `lit-rlhf fit` for a stage."""
        has_adapters = self.scale.has_adapters
        lora = [str(find_recipe("adapter/lora"))] if has_adapters else []
        recipes = {
            "sft": ["sft", *lora],
            "reward": ["reward", *lora, "with-validation"],
            "gold": ["reward", *lora, "with-validation", "with-gold"],
            "politeness": ["reward", *lora, "with-validation", "with-politeness"],
            "ppo": ["ppo-lora" if has_adapters else "ppo", "with-watched"],
            "ppo-ptx": ["ppo-lora", "with-watched", "with-ptx"] if has_adapters else ["ppo-ptx", "with-watched"],
        }[stage]
        files = [*(str(self.recipes.get(name, name)) for name in [*recipes, "with-precision"]), *self.overlays]
        words = [word for file in files for word in ("-c", file)]
        run_dir = [f"--run_dir={self.out}/{stage}"]
        seeds = [f"--seed_everything={self.seed}", f"--data.seed={self.seed}"]
        more = [f"--data.max_prompt_length={self.scale.sizes.max_prompt_tokens}"]
        sizes = self.scale.sizes
        lengths = dict.fromkeys(REWARD_MODELS, sizes.max_ranked_tokens) | {"sft": sizes.max_completion_tokens}
        if stage in lengths:  # a completion has an end token as well
            more.append(f"--data.max_completion_length={lengths[stage] + 1}")
        if stage in REWARD_MODELS:
            more.append(f"--trainer.callbacks.CenterScores.path={self.out}/data/centering.jsonl")
        return [*words, *run_dir, *seeds, *more, *self.scale.arguments.get(stage, ())]

    def fit(self, stage: str) -> None:
        """Train a stage."""
        arguments = self.build_fit_arguments(stage)

        def train(state: StageState) -> dict[str, float]:
            if not state.resumes:  # a call that ends before the first step must not leave those of other settings
                shutil.rmtree(self.out / stage / "checkpoints", ignore_errors=True)
            fit(arguments, state.resumes)
            last = read_last_values(self.out / stage, HEADLINES[stage])
            state.headline = format_values(last)
            return last

        paths = [path for word, path in pairwise(arguments) if word == "-c"]
        recipes = [yaml.safe_dump(yaml.safe_load(Path(path).read_text(encoding="utf-8"))) for path in paths]
        others = [argument for argument in arguments if argument not in ("-c", *paths)]
        description = describe_command(["fit", *arguments])
        self.runner.run(stage, train, description, [others, recipes], has_bar=True)

    def measure_reward_models(self, state: StageState) -> dict[str, Any]:
        """Return accuracy with interval and calibration of the reward models on their sources' held-out rankings."""
        found = {}
        for stage, sources in REWARD_MODELS.items():
            files = {name: self.out / "data" / f"validation_{name}.jsonl" for name in map(to_name, sources)}
            found[stage] = measure_reward_model(self.out / stage / "model", files, self.scale.sizes)
        state.headline = "proxy " + ", ".join(
            f"{name} {metrics['accuracy']['value']:.3f}"
            for stage in ("reward", "politeness")
            for name, metrics in found[stage].items()
            if "accuracy" in metrics
        )
        return found

    def evaluate(self, state: StageState) -> None:
        """Run the evaluation, which caches its rows, so that it goes on where it was."""
        with nullcontext() if is_verbose() else redirect_stdout(StringIO()):  # its tables are in the report
            run_command(["evaluate", "-c", str(self.recipes["evaluate"])])
        report = self.read_evaluation()
        rates = report["suites"]["preference"]["metrics"]["T = 1: win rate"]["models"]
        state.headline = "preferred to SFT by gold: " + ", ".join(
            f"{name} {rates[name]['value']:.3f}" for name in ("PPO", "PPO-ptx")
        )

    def read_evaluation(self) -> dict[str, Any]:
        """Return the report of the evaluation, its models in the order of the recipe."""
        report: dict[str, Any] = json.loads((self.out / "evaluate" / "report.json").read_text(encoding="utf-8"))
        names = yaml.safe_load(self.recipes["evaluate"].read_text(encoding="utf-8"))["models"]
        return report | {"models": {name: report["models"][name] for name in names}}

    def read_curves(self, stage: str) -> dict[str, list[list[float]]]:
        """Read the curves of a stage: against the step, and of PPO against the iteration."""
        if stage in CURVES:
            return read_curves(self.out / stage, CURVES[stage], "step")
        return read_curves(self.out / stage, {name: name for name in PPO_CURVES}, "epoch")


def check_packages() -> None:
    """Refuse to begin without the packages that the evaluation needs an hour later.

    Raises:
        ModuleNotFoundError: names the first that is missing.
    """
    for name in ("profanity_check", "lm_eval"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def measure_reward_model(folder: Path, files: Mapping[str, Path], sizes: RealDataSizes) -> dict[str, Any]:
    """Return the metrics of a reward model on rankings.

    Args:
        folder: of the reward model.
        files: name -> rankings.
        sizes: with the length limits.
    """
    tokenizer = load_tokenizer(str(folder), ModelLoadingConfig())
    model = load_scalar_model(str(folder), tokenizer, ModelLoadingConfig()).eval()
    limits = TruncationPolicy(sizes.max_prompt_tokens, sizes.max_ranked_tokens + 1)
    found = {}
    for name, path in files.items():
        report = DatasetReport(str(path))
        records = read_records(read_rows(path), "ranking", Ranking, "auto", report)
        rankings = tokenize_rankings(records, PromptTemplate(tokenizer, "chat"), limits, report)
        rankings.sort(key=lambda ranking: len(ranking.prompt) + max(map(len, ranking.completions)))
        parts = []
        for start in range(0, len(rankings), SCORED_RANKINGS):
            batch = collate_rankings(rankings[start : start + SCORED_RANKINGS], 1.0, tokenizer.pad_token_id)
            rows = RankingInputs(batch.input_ids, batch.attention_mask, batch.prompt_length, batch.ranking_index)
            lengths = rows.length - rows.prompt_length
            with torch.no_grad():
                scores = model.score_rankings(rows)
            parts.append(ScoredRankings(scores, start + batch.ranking_index, batch.ranks, lengths))
        scored = ScoredRankings(*(torch.cat(column) for column in zip(*parts, strict=True)))
        metrics = compute_reward_model_metrics(scored)
        shown = ("rankings", "pairs", "accuracy", "calibration_error", "log_loss", "score", "reliability")
        found[name] = {key: metrics[key] for key in shown if key in metrics}
    return found


def time_training_steps(folder: Path, has_adapters: bool, repeats: int = 2) -> dict[str, float]:
    """Return the tokens per second of forward and backward pass of the language model in each precision.

    Args:
        folder: of the model.
        has_adapters: whether LoRA is trained, or all weights.
        repeats: the fastest of so many counts, after two short ones, which decide where they differ by far.
    """
    loading = ModelLoadingConfig(pad_token=PAD_TOKEN)
    tokenizer = load_tokenizer(str(folder), loading)
    model = load_causal_lm(str(folder), tokenizer, loading)
    if has_adapters:
        add_lora(model, LoRA())
    ids = torch.randint(0, len(tokenizer), TIMED_SHAPE, generator=torch.Generator().manual_seed(0))

    def measure_speed(precision: str, ids: Tensor, repeats: int) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            model.zero_grad()
            seconds.append(time.perf_counter() - start)
        return ids.numel() / min(seconds)

    precisions = ("32-true", "bf16-mixed")
    # where products in bfloat16 are emulated, a whole step in it takes minutes
    speeds = {precision: measure_speed(precision, ids[:1, :TIMED_SHORT], 2) for precision in precisions}
    if max(speeds.values()) > 4 * min(speeds.values()):
        return speeds
    return {precision: measure_speed(precision, ids, repeats) for precision in precisions}


def read_machine() -> dict[str, str]:
    """Return the versions of Python and packages, the processor and the number of threads."""
    packages = ("lit-rlhf", "torch", "lightning", "transformers")
    found = {
        "python": platform.python_version(),
        "processor": read_processor(),
        "threads": str(torch.get_num_threads()),
    }
    return found | {package: version(package) for package in packages}


def read_processor() -> str:
    """Return the name of the GPU, or else of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
