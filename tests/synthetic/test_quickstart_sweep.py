"""The sweeps of β and γ with tiny sizes: two seeds with their own models, every run by its recipe, one page."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_rlhf.cli import main
from lit_rlhf.commands.support import quickstart_sweep, sweep_runs
from lit_rlhf.commands.support.quickstart_pipeline import copy_recipes
from lit_rlhf.evaluation.reports.sweeps import read_results
from lit_rlhf.models.export import export_model
from lit_rlhf.models.loading import load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model
from lit_rlhf.synthetic.build import SyntheticDataPaths

SHORT = ("--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--trainer.log_every_n_steps=1")
SMALL = ("--model.ppo.rollout_batch_size=16", "--model.ppo.micro_batch_size=8", "--model.sampling.max_new_tokens=6")


@pytest.fixture
def untrained(
    write_small_world: Callable[[Path, int], SyntheticDataPaths], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Replace training by random weights and run in this process; return the list of prepared seeds."""
    prepared: list[int] = []

    def prepare(out: Path, seed: int, stages: dict[str, Any], overlays: Sequence[str]) -> None:
        prepared.append(seed)
        base = write_small_world(out / "world", seed).base_init
        copy_recipes(out)
        for stage in ("pretraining", "sft"):
            shutil.copytree(base, out / stage / "model")
        tokenizer = load_tokenizer(str(base), ModelLoadingConfig())
        reward = load_scalar_model(str(base), tokenizer, ModelLoadingConfig())
        reward.center(0.0, 1.0)
        export_model(reward, tokenizer, out / "reward" / "model")

    monkeypatch.setattr(quickstart_sweep, "train_models", prepare)
    monkeypatch.setattr(sweep_runs, "start_process", lambda run, jobs: main(["fit", "-c", str(run.recipe)]))
    for name, few in (("sweep-beta", (0.01, 3.0)), ("sweep-gamma", (30.0,))):
        title, key, values, note = quickstart_sweep.SWEEPS[name]
        assert set(few) <= set(values)
        monkeypatch.setitem(quickstart_sweep.SWEEPS, name, (title, key, few, note))
    return prepared


def test_every_seed_has_its_own_data_and_the_page_shows_both_sweeps(untrained: list[int], tmp_path: Path) -> None:
    assert quickstart_sweep.run(tmp_path, [0, 3], 1, *SHORT, *SMALL) == 0
    assert untrained == [0, 3]
    results = {name: read_results(tmp_path / name) for name in ("sweep-beta", "sweep-gamma")}
    assert results["sweep-beta"].over == {"model.kl.coefficient": [0.01, 3.0]}
    assert results["sweep-gamma"].over == {"trainer.callbacks.PretrainingMix.coefficient": [30.0]}
    outcomes = [*results["sweep-beta"].runs, *results["sweep-gamma"].runs]
    assert [run.seed for run in outcomes] == [0, 3] * 3 and not any(run.error for run in outcomes)
    assert [run.metrics["reward/kl_coefficient"] for run in outcomes] == pytest.approx(
        [0.01] * 2 + [3.0] * 2 + [0.1] * 2
    )
    loss = [run.metrics["validation/pretraining_loss"] for run in outcomes]
    assert (
        loss[0] != loss[1] and max(loss[4] - loss[0], loss[5] - loss[1]) < -0.001
    )  # the pretraining mix lowers the loss
    assert all({"validation/score", "validation/kl"} <= set(run.metrics) for run in outcomes)
    recipe = yaml.safe_load((tmp_path / "sweep-gamma/runs/coefficient=30.0,seed=3/recipe.yaml").read_text())
    settings = recipe["model"]["init_args"]
    assert settings["model"] == str(tmp_path / "seed-3/sft/model")
    assert settings["reward"]["init_args"]["model"] == str(tmp_path / "seed-3/reward/model")
    assert recipe["data"]["init_args"]["path"] == str(tmp_path / "seed-3/world/ppo_prompts.jsonl")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 6 and page.count("<section>") == 2
    # a second call repeats neither models nor runs
    before = json.loads((tmp_path / "sweep-beta/results.json").read_text())
    assert quickstart_sweep.run(tmp_path, [0, 3], 1, *SHORT, *SMALL) == 0
    assert untrained == [0, 3]
    assert json.loads((tmp_path / "sweep-beta/results.json").read_text()) == before
