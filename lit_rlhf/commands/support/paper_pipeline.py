"""The graph of `lit-rlhf paper`: data, models of three sizes by the quickstart's recipes, a measurement per section."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path

import yaml

import lit_rlhf
from lit_rlhf.commands.support.quickstart_pipeline import DEFAULT_OUT, collect_versions
from lit_rlhf.commands.support.setting_paths import set_value
from lit_rlhf.commands.support.stage_graph import Stage, StageGraph, select_stages
from lit_rlhf.commands.support.stage_runner import replace_texts
from lit_rlhf.evaluation.reports.paper_report import write_paper_report
from lit_rlhf.models.export import make_directory
from lit_rlhf.synthetic.paper.build import SHAPES
from lit_rlhf.synthetic.paper.results import build_report, read_measured
from lit_rlhf.synthetic.paper.sections import SECTIONS, Section
from lit_rlhf.synthetic.paper.sweeps import SWEEP_SIZE, SWEEPS, SweepRun, name_sweep_stage

REWARD_SIZE = "medium"  # one reward model for all policies, of the middle size, as the paper's of 6B
# expected seconds of the stages of each size on one core, for the order and the time left
SECONDS = {
    "pretraining": {"small": 70.0, "medium": 130.0, "large": 400.0},
    "sft": {"small": 30.0, "medium": 50.0, "large": 120.0},
    "ppo": {"small": 50.0, "medium": 70.0, "large": 180.0},
    "ppo-ptx": {"small": 60.0, "medium": 100.0, "large": 280.0},
}
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
    """Run what is not done of the sections' stages, write `report.html` and `report.json`; return the exit code.

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
    folder = out / name_seed(seed)
    make_directory(folder / "recipes")
    version = lit_rlhf.__version__
    module = "lit_rlhf.synthetic.paper"
    options = ("--seed", str(seed))
    stages = [Stage("world", (f"{module}.build", str(folder / "world"), *options, "--scale", scale), seconds=15)]

    def train(
        name: str,
        recipe: str,
        inputs: Sequence[str],
        paths: Mapping[str, str],
        seconds: float,
        change: Callable[[str], str] = str,
    ) -> None:
        """Add a run of `quickstart/RECIPE` with other paths in it, and further changes of its text."""
        target = folder / "recipes" / f"{name}.yaml"
        text = (files("lit_rlhf") / "recipes" / "quickstart" / f"{recipe}.yaml").read_text()
        target.write_text(change(replace_paths(text, {**paths, "world": "world"}, folder)))
        merged = [word for path in (str(target), *overlays) for word in ("-c", path)]
        further = ARGUMENTS[scale].get(recipe, ())
        command = ("fit", *merged, f"--seed_everything={seed}", f"--data.seed={seed}", "--overwrite", *further)
        settings = "\n".join(path.read_text() for path in (target, *map(Path, overlays)))
        stages.append(Stage(name, ("lit_rlhf", *command), tuple(inputs), seconds, settings))

    def train_size(recipe: str, size: str, inputs: Sequence[str]) -> None:
        """Add a training stage of one size."""
        paths = {f"{stage}/model": f"{stage}-{size}/model" for stage in ("pretraining", "sft")}
        paths |= {"reward": "reward", "world/base_init": f"world/base_init_{size}", f"{recipe}\n": f"{recipe}-{size}\n"}
        train(f"{recipe}-{size}", recipe, inputs, paths, SECONDS[recipe][size])

    for size in SHAPES:
        train_size("pretraining", size, ["world"])
        train_size("sft", size, [f"pretraining-{size}"])
    stages.append(Stage("rankings", (f"{module}.rank", str(folder), *options), (f"sft-{REWARD_SIZE}",), 40))
    paths = {"sft/model": f"sft-{REWARD_SIZE}/model", "reward": "reward"}
    train("reward", "reward", ["rankings"], paths, 60)
    for size in SHAPES:
        for recipe in ("ppo", "ppo-ptx"):
            train_size(recipe, size, [f"sft-{size}", "reward"])
    largest = list(SHAPES)[-1]
    for mix in ("flan", "t0"):
        paths = {
            "pretraining/model": f"pretraining-{largest}/model",
            "sft\n": f"{mix}-{largest}\n",
            "world/demonstrations.jsonl": f"world/{mix}.jsonl",
        }
        train(f"{mix}-{largest}", "sft", [f"pretraining-{largest}"], paths, SECONDS["sft"][largest])
    models = {f"{stage}/model": f"{stage}-{SWEEP_SIZE}/model" for stage in ("pretraining", "sft")}
    for sweep, runs in SWEEPS.items():
        for label, settings in runs.items():
            name = name_sweep_stage(sweep, label)
            paths = {**models, "reward": "reward", "ppo-ptx\n": f"{name}\n"}
            reference = folder / f"{settings.reference}-{SWEEP_SIZE}" / "model"
            change = partial(set_sweep_run, run=settings, reference=reference, is_tiny=scale == "tiny")
            seconds = 10 + SECONDS["ppo-ptx"][SWEEP_SIZE] * settings.iterations / 25
            train(name, "ppo-ptx", [f"sft-{SWEEP_SIZE}", "reward"], paths, seconds, change)
    stages += [build_section_stage(section, folder, seed) for section in SECTIONS.values()]
    return [
        stage._replace(
            name=name_stage(seed, stage.name),
            inputs=tuple(name_stage(seed, name) for name in stage.inputs),
            settings=f"{version}\n{stage.settings}",
        )
        for stage in stages
    ]


def replace_paths(text: str, paths: Mapping[str, str], folder: Path) -> str:
    """Return a shipped recipe with other paths in it.

    Args:
        text: the recipe.
        paths: path below the quickstart's folder, or its beginning -> path below `folder`; the longest that fits holds.
        folder: of the seed.
    """
    return replace_texts(text, {f"{DEFAULT_OUT}/{path}": f"{folder}/{new}" for path, new in paths.items()})


def set_sweep_run(text: str, run: SweepRun, reference: Path, is_tiny: bool) -> str:
    """Return the recipe of PPO-ptx with the settings of a run of a sweep.

    Args:
        text: the recipe.
        run: its settings.
        reference: the model that β keeps the policy near to.
        is_tiny: leave the number of iterations to the arguments of a tiny run.
    """
    recipe = yaml.safe_load(text)
    controller = {"class_path": "lit_rlhf.rollout.FixedKLController", "init_args": {"coefficient": run.beta}}
    recipe["model"]["init_args"] |= {"kl": controller, "reference": str(reference)}
    recipe = set_value(recipe, "trainer.callbacks.PretrainingMix.coefficient", run.gamma)
    if not is_tiny:
        recipe["trainer"]["max_epochs"] = run.iterations
    return str(yaml.safe_dump(recipe, sort_keys=False))


def build_section_stage(section: Section, folder: Path, seed: int) -> Stage:
    """Return the stage that measures a section."""
    command = ("lit_rlhf.synthetic.paper.results", str(folder), section.key, "--seed", str(seed))
    return Stage(section.key, command, tuple(section.stages), 45)
