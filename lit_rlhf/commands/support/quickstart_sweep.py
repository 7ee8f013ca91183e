"""Small versions of the paper's sweeps of β and γ (App. E.6, Figures 33 and 34), over several seeds."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import yaml

from lit_rlhf.commands.support.quickstart_pipeline import DEFAULT_OUT, check_overlays, train_models
from lit_rlhf.commands.support.stage_runner import StageRunner
from lit_rlhf.evaluation.reports.sweeps import read_results, write_sweep_page
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.synthetic.build import SyntheticDataPaths, SyntheticDataSizes
from lit_rlhf.synthetic.evaluate import compute_pretraining_loss, score_sft_samples

BETAS = (0.01, 0.1, 0.3, 1.0, 3.0)
GAMMAS = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)
SCORE, KL, LOSS = "validation/score", "validation/kl", "validation/pretraining_loss"
SWEEPS = {
    "sweep-beta": (
        "β, the KL coefficient: PPO without pretraining gradients",
        "model.kl.coefficient",
        BETAS,
        "γ = 0, and the KL is that to the base model, as in the paper (App. E.6, Figure 34): a larger β costs score, "
        "and at no β is the loss on unseen pretraining text that of the base model again.",
    ),
    "sweep-gamma": (
        "γ, the pretraining coefficient: PPO-ptx",
        "trainer.callbacks.PretrainingMix.coefficient",
        GAMMAS,
        "β = 0.1, and the KL is that to the SFT model (App. E.6, Figure 33): a larger γ costs score, and brings the "
        "loss on unseen pretraining text back.",
    ),
}


def run(out: Path, seeds: list[int], jobs: int, *arguments: str, overlays: Sequence[str] = ()) -> int:
    """Train the missing models of every seed, sweep β and γ, write `report.html`; return the exit code.

    Args:
        out: output folder; `seed-N/` holds data and models of a seed.
        seeds: of data, models and runs.
        jobs: number of concurrent runs.
        overlays: recipes for one more `-c` of every run.
        arguments: further arguments of every run, as of `lit-rlhf fit`.

    Raises:
        UserError: see `check_overlays`.
    """
    from lit_rlhf.cli import main

    check_overlays(seeds[0], overlays)
    for seed in seeds:
        trained = get_seed_folder(out, seed)
        if not (trained / "reward" / "model" / "config.json").is_file():
            runner = StageRunner(trained)
            runner.start_over()
            train_models(trained, seed, runner, overlays)
    recipes = write_recipes(out)
    metrics = ",".join((SCORE, KL, LOSS))
    options = ["--seeds", ",".join(map(str, seeds)), "--jobs", str(jobs), "--metrics", metrics, *arguments]
    options += [word for overlay in overlays for word in ("-c", overlay)]
    references, codes, sweeps = compute_references(out, seeds), [], []
    for name, (title, key, values, note) in SWEEPS.items():
        over = f"{key}={','.join(map(str, values))}"
        folder = str(out / name)
        codes.append(
            main(["sweep", "-c", str(recipes[name]), "--over", over, "--out", folder, "--title", title, *options])
        )
        if codes[-1] == 2:
            return 2
        sweeps.append(read_results(out / name)._replace(note=note, references=references))
    write_sweep_page(sweeps, "Sweeps of β and γ in miniature", out / "report.html")
    print(f"\nreport: {out / 'report.html'}")
    return max(codes)


def write_recipes(out: Path) -> dict[str, Path]:
    """Write the recipes of the sweeps with `{seed}` in the paths of data and models; return them by name."""
    written = {}
    for name in SWEEPS:
        recipe = yaml.safe_load((files("lit_rlhf") / "recipes" / "quickstart" / f"{name}.yaml").read_text())
        # flow style would parse the braces of {seed}
        text = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=False)
        written[name] = out / f"{name}.yaml"
        written[name].write_text(text.replace(DEFAULT_OUT, str(get_seed_folder(out, "{seed}"))))
    return written


def get_seed_folder(out: Path, seed: int | str) -> Path:
    """Return the folder with the data and models of a seed."""
    return out / f"seed-{seed}"


def compute_references(out: Path, seeds: list[int]) -> dict[str, dict[str, float]]:
    """Return the metrics of the SFT and base models, as means over seeds: metric -> label -> value."""
    values: dict[str, list[float]] = {"base": [], "SFT": [], "score": []}
    for seed in seeds:
        folder = get_seed_folder(out, seed)
        paths = SyntheticDataPaths.in_folder(folder / "world")
        for label, stage in (("base", "pretraining"), ("SFT", "sft")):
            model = str(folder / stage / "model")
            tokenizer = load_tokenizer(model, ModelLoadingConfig())
            loaded = load_causal_lm(model, tokenizer, ModelLoadingConfig()).eval()
            values[label].append(compute_pretraining_loss(loaded, tokenizer, paths.pretraining_validation))
        count = SyntheticDataSizes().evaluation_prompts
        values["score"].append(float(score_sft_samples(folder, paths.evaluation_prompts, count, 1, seed).mean()))
    loss = {label: fmean(values[label]) for label in ("base", "SFT")}
    return {SCORE: {"SFT": fmean(values["score"])}, LOSS: loss}
