"""The paper's sweeps of β and γ in miniature (App. E.6, Figures 33 and 34), in worlds of several seeds."""

from importlib.resources import files
from pathlib import Path
from statistics import fmean

import yaml

from lit_rlhf.commands.support.quickstart_pipeline import DEFAULT_OUT, train_models
from lit_rlhf.evaluation.reports.sweeps import read_results, write_page
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.synthetic.build import EVALUATION_PROMPTS, WorldPaths
from lit_rlhf.synthetic.evaluate import pretraining_loss, sft_scores

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


def run(out: Path, seeds: list[int], jobs: int, *more: str) -> int:
    """Train the models of every seed that are not there, sweep β and γ, write `report.html`; return the exit code.

    Args:
        out: folder of everything: `seed-N/` holds the models of a seed.
        seeds: of worlds, models and runs alike.
        jobs: runs at the same time.
        more: further arguments of every run, as `lit-rlhf fit` takes them.
    """
    from lit_rlhf.cli import main

    for seed in seeds:
        if not (world_of(out, seed) / "reward" / "model" / "config.json").is_file():
            train_models(world_of(out, seed), seed, {})
    recipes = write_recipes(out)
    words = ["--seeds", ",".join(map(str, seeds)), "--jobs", str(jobs), "--metrics", ",".join((SCORE, KL, LOSS)), *more]
    started, codes, swept = references(out, seeds), [], []
    for name, (title, key, values, note) in SWEEPS.items():
        over = f"{key}={','.join(map(str, values))}"
        codes.append(
            main(
                ["sweep", "-c", str(recipes[name]), "--over", over, "--out", str(out / name), "--title", title, *words]
            )
        )
        if codes[-1] == 2:
            return 2
        swept.append(read_results(out / name)._replace(note=note, references=started))
    write_page(swept, "Sweeps of β and γ in miniature", out / "report.html")
    print(f"\nreport: {out / 'report.html'}")
    return max(codes)


def write_recipes(out: Path) -> dict[str, Path]:
    """Write the recipes of the sweeps with `{seed}` in the paths of world and models; return them by name."""
    written = {}
    for name in SWEEPS:
        recipe = yaml.safe_load((files("lit_rlhf") / "recipes" / "quickstart" / f"{name}.yaml").read_text())
        # block style, in which a brace inside a text is a brace
        text = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=False)
        written[name] = out / f"{name}.yaml"
        written[name].write_text(text.replace(DEFAULT_OUT, str(world_of(out, "{seed}"))))
    return written


def world_of(out: Path, seed: int | str) -> Path:
    """Return the folder of a seed's world and models."""
    return out / f"seed-{seed}"


def references(out: Path, seeds: list[int]) -> dict[str, dict[str, float]]:
    """Return what the runs started from, as means over seeds: metric -> label -> value."""
    found: dict[str, list[float]] = {"base": [], "SFT": [], "score": []}
    for seed in seeds:
        folder = world_of(out, seed)
        paths = WorldPaths.under(folder / "world")
        for label, stage in (("base", "pretraining"), ("SFT", "sft")):
            model = str(folder / stage / "model")
            tokenizer = load_tokenizer(model, ModelLoadingConfig())
            loaded = load_causal_lm(model, tokenizer, ModelLoadingConfig()).eval()
            found[label].append(pretraining_loss(loaded, tokenizer, paths.pretraining_validation))
        found["score"].append(float(sft_scores(folder, paths.evaluation_prompts, EVALUATION_PROMPTS, 1, seed).mean()))
    loss = {label: fmean(found[label]) for label in ("base", "SFT")}
    return {SCORE: {"SFT": fmean(found["score"])}, LOSS: loss}
