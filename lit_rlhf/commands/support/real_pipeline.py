"""`lit-rlhf real`: a real instruction model through all stages on real data, with the shipped recipes.

The recipes of `smollm2-135m/` are copied into the folder of the run, with its paths in them; each training stage is
`lit-rlhf fit` on its copy, and the evaluation is `lit-rlhf evaluate`. So each can be repeated, changed or resumed by
hand.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import yaml

from lit_rlhf.commands.recipes import find_recipe
from lit_rlhf.commands.support.console import terminal_width
from lit_rlhf.commands.support.real_data import EVALUATION_FILES, check_data, list_files, to_name, write_real_data
from lit_rlhf.commands.support.real_measurements import measure_reward_model, read_machine, time_training_steps
from lit_rlhf.commands.support.real_scales import REWARD_MODELS, RealScale
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
from lit_rlhf.evaluation.reports.quickstart_report import TERMINAL_WIDTH
from lit_rlhf.evaluation.reports.real_report import format_real_table, write_real_report
from lit_rlhf.hashing import hash_files
from lit_rlhf.models.catalog import fetch_model
from lit_rlhf.models.loading import load_stored_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig

MODEL, HUB_NAME = "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"
RECIPES = "smollm2-135m"
RUN_FOLDER, GOLD_FOLDER = "runs/smollm2-135m", "runs/judge/reward"  # in the shipped recipes
Precision = Literal["auto", "32-true", "bf16-mixed"]
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
