"""The graph of `lit-rlhf paper`: data, models of three sizes by the quickstart's recipes, a measurement per section."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import lit_rlhf
from lit_rlhf.commands.support.quickstart_pipeline import DEFAULT_OUT, collect_versions
from lit_rlhf.commands.support.recipe_copies import read_shipped_recipe
from lit_rlhf.commands.support.setting_paths import set_value
from lit_rlhf.commands.support.stage_graph import Stage, StageGraph, select_stages
from lit_rlhf.evaluation.reports.paper_report import write_paper_report
from lit_rlhf.models.export import make_directory
from lit_rlhf.synthetic.paper.build import REWARD_SIZE, SHAPES, PaperDataSizes
from lit_rlhf.synthetic.paper.preferences import (
    NAMED_ITERATIONS,
    NAMED_POLICY_STAGE,
    NAMED_REWARD_STAGE,
    POLICY_ITERATIONS,
    name_policy_stage,
    name_reward_stage,
)
from lit_rlhf.synthetic.paper.rank_groups import GROUPS, NUM_PROMPTS, SMALL_NUMBERS
from lit_rlhf.synthetic.paper.results import build_report, read_measured, write_results
from lit_rlhf.synthetic.paper.reward_models import FOLDS_STAGE, FREE_STAGE, ITERATIONS, STAGES_BY_SIZE
from lit_rlhf.synthetic.paper.sections import SECTIONS
from lit_rlhf.synthetic.paper.sweeps import SWEEP_SIZE, SWEEPS, SweepRun, name_sweep_stage

# expected seconds of the stages of each size on one core, for the order and the time left
SECONDS = {
    "pretraining": {"small": 70.0, "medium": 130.0, "large": 400.0},
    "sft": {"small": 30.0, "medium": 50.0, "large": 120.0},
    "ppo": {"small": 50.0, "medium": 70.0, "large": 180.0},
    "ppo-ptx": {"small": 60.0, "medium": 100.0, "large": 280.0},
    "reward": {"small": 25.0, "medium": 50.0, "large": 160.0},
}
NUM_RANKINGS = PaperDataSizes().reward_prompts
_TINY_PPO = ("--trainer.max_epochs=2", "--model.ppo.rollout_batch_size=64", "--trainer.log_every_n_steps=1")
# scale -> recipe -> further arguments of `lit-rlhf fit`
ARGUMENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "full": {"pretraining": ("--trainer.max_steps=1500", "--trainer.val_check_interval=1500")},
    "tiny": {
        "pretraining": ("--trainer.max_steps=20", "--trainer.val_check_interval=20"),
        "sft": ("--trainer.max_epochs=1",),
        "ppo": _TINY_PPO,
        "ppo-ptx": _TINY_PPO,
    },
}


def run(
    out: Path, seeds: Sequence[int], only: Sequence[str], processes: int, scale: str, overlays: Sequence[str]
) -> int:
    """Run what is not done of the sections' stages, write report and results; return the exit code.

    Args:
        out: folder; `seed-N/` holds data, models and measurements of a seed.
        seeds: of data, models and runs.
        only: keys of sections; all if empty. The page shows these and those that were measured before.
        processes: stages at a time.
        scale: "full" or "tiny".
        overlays: recipes for one more `-c` of every training stage.

    Raises:
        UserError: a stage failed.
    """
    make_directory(out)
    stages = [stage for seed in seeds for stage in build_stages(out, seed, scale, overlays)]
    needed = select_stages(stages, [name_stage(seed, key) for seed in seeds for key in only or SECTIONS])
    print(f"{len(only or SECTIONS)} sections, {len(seeds)} seeds: {len(needed)} stages in {out}", flush=True)
    StageGraph(needed, out, processes).run()
    graph = StageGraph(stages, out, processes)
    keys = [key for key in SECTIONS if all(graph.is_done(name_stage(seed, key)) for seed in seeds)]
    measured = {seed: {key: read_measured(out / name_seed(seed), key) for key in keys} for seed in seeds}
    report = build_report(measured, scale, collect_versions())
    write_paper_report(report, out / "report.json", out / "report.html")
    write_results(measured, scale, out / "results.json")
    print(f"\nreport: {out / 'report.html'}")
    return 0


def name_seed(seed: int) -> str:
    """Return the name of a seed's folder, with which the names of its stages begin."""
    return f"seed-{seed}"


def name_stage(seed: int, name: str) -> str:
    """Return the name of a seed's stage in the graph."""
    return f"{name_seed(seed)}-{name}"


def build_stages(out: Path, seed: int, scale: str, overlays: Sequence[str] = ()) -> list[Stage]:
    """Return all stages of a seed, inputs before their users, and write their recipes.

    Args:
        out: folder of the run.
        seed: of data, models and runs.
        scale: "full" or "tiny".
        overlays: recipes for one more `-c`.
    """
    seed_stages = SeedStages(out / name_seed(seed), seed, scale, overlays)
    for add in (add_models, add_public_mixtures, add_sweeps, add_reward_models, add_group_policies):
        add(seed_stages)
    for section in SECTIONS.values():
        seed_stages.call(section.key, "results", section.stages, 45, section.key)
    return [
        stage._replace(
            name=name_stage(seed, stage.name),
            inputs=tuple(name_stage(seed, name) for name in stage.inputs),
            settings=f"{lit_rlhf.__version__}\n{stage.settings}",
        )
        for stage in seed_stages.stages
    ]


class SeedStages:
    """The stages of a seed so far; adding one writes its recipe.

    Args:
        folder: of the seed.
        seed: of data, models and runs.
        scale: "full" or "tiny".
        overlays: recipes for one more `-c` of every training.
    """

    def __init__(self, folder: Path, seed: int, scale: str, overlays: Sequence[str]) -> None:
        self.folder, self.seed, self.scale, self.overlays = folder, seed, scale, overlays
        self.stages: list[Stage] = []
        make_directory(folder / "recipes")

    def call(self, name: str, module: str, inputs: Sequence[str], seconds: float, *arguments: str) -> None:
        """Add a call of a module of the paper's world."""
        command = (f"lit_rlhf.synthetic.paper.{module}", str(self.folder), *arguments, "--seed", str(self.seed))
        self.stages.append(Stage(name, command, tuple(inputs), seconds))

    def train(
        self,
        name: str,
        recipe: str,
        inputs: Sequence[str],
        paths: Mapping[str, str],
        seconds: float,
        change: Callable[[str], str] = str,
    ) -> None:
        """Add a run of `quickstart/RECIPE` with other paths in it, and further changes of its text."""
        seeds = (f"--seed_everything={self.seed}", f"--data.seed={self.seed}", "--overwrite")
        further = ARGUMENTS[self.scale].get(recipe, ())
        self.run_recipe(name, ("fit",), recipe, inputs, paths, seconds, (*seeds, *further), change)

    def run_recipe(
        self,
        name: str,
        command: Sequence[str],
        recipe: str,
        inputs: Sequence[str],
        paths: Mapping[str, str],
        seconds: float,
        arguments: Sequence[str],
        change: Callable[[str], str] = str,
    ) -> None:
        """Add `lit-rlhf COMMAND -c RECIPE …` with other paths in the recipe, and further changes of its text."""
        target = self.folder / "recipes" / f"{name}.yaml"
        texts = locate_paths({"world": "world", **paths}, self.folder)
        target.write_text(change(read_shipped_recipe(f"quickstart/{recipe}", texts)))
        merged = [word for path in (str(target), *self.overlays) for word in ("-c", path)]
        settings = "\n".join(path.read_text() for path in (target, *map(Path, self.overlays)))
        self.stages.append(Stage(name, ("lit_rlhf", *command, *merged, *arguments), tuple(inputs), seconds, settings))

    def train_size(self, recipe: str, size: str, inputs: Sequence[str]) -> None:
        """Add a training stage of one size."""
        paths = {f"{stage}/model": f"{stage}-{size}/model" for stage in ("pretraining", "sft")}
        paths |= {"reward": "reward", "world/base_init": f"world/base_init_{size}", f"{recipe}\n": f"{recipe}-{size}\n"}
        factor = SHAPES["small"].hidden_size / SHAPES[size].hidden_size if recipe == "pretraining" else 1.0
        change = partial(scale_learning_rate, factor=factor)
        self.train(f"{recipe}-{size}", recipe, inputs, paths, SECONDS[recipe][size], change)


def scale_learning_rate(text: str, factor: float) -> str:
    """Return a recipe with another learning rate.

    With 3e-3 at all sizes, the loss of the large base model ended above that of the small one (0.874 and 0.867 nats).
    Under Adam the best rate of a matrix falls with the width of its input (Yang et al., 2022), as GPT-3's does with its
    size.

    Args:
        text: the recipe.
        factor: of the rate.
    """
    recipe = yaml.safe_load(text)
    recipe["model"]["init_args"]["optimizer"]["init_args"]["lr"] *= factor
    return text if factor == 1 else str(yaml.safe_dump(recipe, sort_keys=False))


def add_models(stages: SeedStages) -> None:
    """Add the data, and base model, SFT, PPO and PPO-ptx of all sizes, with the reward model of all policies."""
    command = ("lit_rlhf.synthetic.paper.build", str(stages.folder / "world"), "--seed", str(stages.seed))
    stages.stages.append(Stage("world", (*command, "--scale", stages.scale), seconds=15))
    for size in SHAPES:
        stages.train_size("pretraining", size, ["world"])
        stages.train_size("sft", size, [f"pretraining-{size}"])
    stages.call("rankings", "rank", [f"sft-{REWARD_SIZE}"], 40)
    train_reward_model(stages, "reward", "rankings", "rankings.jsonl")
    for size in SHAPES:
        for recipe in ("ppo", "ppo-ptx"):
            stages.train_size(recipe, size, [f"sft-{size}", "reward"])


def add_public_mixtures(stages: SeedStages) -> None:
    """Add the largest base model tuned on public-style mixtures."""
    largest = list(SHAPES)[-1]
    for mix in ("flan", "t0"):
        paths = {
            "pretraining/model": f"pretraining-{largest}/model",
            "sft\n": f"{mix}-{largest}\n",
            "world/demonstrations.jsonl": f"world/{mix}.jsonl",
        }
        stages.train(f"{mix}-{largest}", "sft", [f"pretraining-{largest}"], paths, SECONDS["sft"][largest])


def add_sweeps(stages: SeedStages) -> None:
    """Add the runs of the sweeps."""
    models = {f"{stage}/model": f"{stage}-{SWEEP_SIZE}/model" for stage in ("pretraining", "sft")}
    for sweep, runs in SWEEPS.items():
        for label, settings in runs.items():
            name = name_sweep_stage(sweep, label)
            paths = {**models, "reward": "reward", "ppo-ptx\n": f"{name}\n"}
            reference = stages.folder / f"{settings.reference}-{SWEEP_SIZE}" / "model"
            change = partial(set_sweep_run, run=settings, reference=reference, is_tiny=stages.scale == "tiny")
            seconds = 10 + SECONDS["ppo-ptx"][SWEEP_SIZE] * settings.iterations / 25
            stages.train(name, "ppo-ptx", [f"sft-{SWEEP_SIZE}", "reward"], paths, seconds, change)


def add_reward_models(stages: SeedStages) -> None:
    """Add what the section on reward models needs: folds, sizes, fewer rankings, PPO without a KL penalty."""
    stages.call("group-rankings", "rank_groups", ["rankings"], 30)
    paths = reward_paths(FOLDS_STAGE, "rankings_of_groups.jsonl")
    out = ("--out", str(stages.folder / FOLDS_STAGE), "--overwrite", f"--data.seed={stages.seed}")
    arguments = ("--group-column", "labeler_group", "--seeds", "1", *out)
    stages.run_recipe(FOLDS_STAGE, ("labelers", "folds"), "reward", ["group-rankings"], paths, 180, arguments)
    for size, name in STAGES_BY_SIZE.items():
        if size != REWARD_SIZE:
            train_reward_model(stages, name, "rankings", "rankings.jsonl", size)
    for number in SMALL_NUMBERS:
        train_reward_model(stages, f"reward-{number}", "group-rankings", f"rankings_{number}.jsonl", count=number)
    train_policy(stages, FREE_STAGE, "reward", max(ITERATIONS), change=keep_policies_without_kl)


def add_group_policies(stages: SeedStages) -> None:
    """Add reward models and policies that follow one group of labelers each, and those that are told the group."""
    for group in GROUPS:
        name = name_reward_stage(group)
        train_reward_model(stages, name, "group-rankings", f"rankings_{group}.jsonl", count=NUM_PROMPTS)
        train_policy(stages, name_policy_stage(group), name, POLICY_ITERATIONS)
    train_reward_model(stages, NAMED_REWARD_STAGE, "group-rankings", "rankings_named.jsonl")
    prompts = {"world/ppo_prompts.jsonl": "world/ppo_prompts_named.jsonl"}
    train_policy(stages, NAMED_POLICY_STAGE, NAMED_REWARD_STAGE, NAMED_ITERATIONS, prompts)


def reward_paths(name: str, rankings: str, size: str = REWARD_SIZE) -> dict[str, str]:
    """Return the paths of a reward model's recipe: its name, a file of rankings, and the size of its SFT model."""
    return {"sft/model": f"sft-{size}/model", "reward": name, "world/rankings.jsonl": f"world/{rankings}"}


def train_reward_model(
    stages: SeedStages, name: str, data: str, rankings: str, size: str = REWARD_SIZE, count: int = NUM_RANKINGS
) -> None:
    """Add a reward model.

    Args:
        stages: of the seed.
        name: of the stage.
        data: the stage that writes the rankings.
        rankings: their file in `world/`.
        size: of the model.
        count: of the rankings.
    """
    inputs = [data] if size == REWARD_SIZE else [data, f"sft-{size}"]  # the data is sampled with models of that size
    seconds = 10 + SECONDS["reward"][size] * count / NUM_RANKINGS
    stages.train(name, "reward", inputs, reward_paths(name, rankings, size), seconds)


def train_policy(
    stages: SeedStages,
    name: str,
    reward: str,
    iterations: int,
    paths: Mapping[str, str] = {},
    change: Callable[[dict[str, Any]], None] = lambda recipe: None,
) -> None:
    """Add a short run of PPO of the size of the sweeps.

    Args:
        stages: of the seed.
        name: of the stage.
        reward: the stage of its reward model.
        iterations: of 256 episodes.
        paths: further paths of the recipe.
        change: changes further settings of the recipe.
    """

    def set_run(text: str) -> str:
        recipe = yaml.safe_load(text)
        recipe["trainer"]["max_epochs"] = iterations  # which the arguments of a tiny run replace
        change(recipe)
        return str(yaml.safe_dump(recipe, sort_keys=False))

    sft = f"sft-{SWEEP_SIZE}"
    own = {"sft/model": f"{sft}/model", "reward": reward, "ppo\n": f"{name}\n", **paths}
    seconds = 10 + SECONDS["ppo"][SWEEP_SIZE] * iterations / 25
    stages.train(name, "ppo", [sft, reward], own, seconds, set_run)


def keep_policies_without_kl(recipe: dict[str, Any]) -> None:
    """Take the KL penalty out of a recipe of PPO, and keep the weights after every iteration."""
    recipe["model"]["init_args"]["kl"] = fix_kl_coefficient(0.0)
    kept = {"filename": "{epoch}", "every_n_epochs": 1, "save_top_k": -1, "save_weights_only": True}
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": kept}
    recipe["trainer"]["callbacks"].append(checkpoint)


def fix_kl_coefficient(coefficient: float) -> dict[str, Any]:
    """Return the settings of a KL controller that keeps a coefficient."""
    return {"class_path": "lit_rlhf.rollout.FixedKLController", "init_args": {"coefficient": coefficient}}


def locate_paths(paths: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Return what replaces which text of a recipe of the quickstart.

    Args:
        paths: path below the quickstart's folder, or its beginning -> path below `folder`.
        folder: of the seed.
    """
    return {f"{DEFAULT_OUT}/{path}": f"{folder}/{new}" for path, new in paths.items()}


def set_sweep_run(text: str, run: SweepRun, reference: Path, is_tiny: bool) -> str:
    """Return the recipe of PPO-ptx with the settings of a run of a sweep.

    Args:
        text: the recipe.
        run: its settings.
        reference: the model that β keeps the policy near to.
        is_tiny: leave the number of iterations to the arguments of a tiny run.
    """
    recipe = yaml.safe_load(text)
    recipe["model"]["init_args"] |= {"kl": fix_kl_coefficient(run.beta), "reference": str(reference)}
    recipe = set_value(recipe, "trainer.callbacks.PretrainingMix.coefficient", run.gamma)
    if not is_tiny:
        recipe["trainer"]["max_epochs"] = run.iterations
    return str(yaml.safe_dump(recipe, sort_keys=False))
