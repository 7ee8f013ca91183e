"""A small PPO-ptx run from YAML in subprocesses that can be killed; its logs and final weights."""

import csv
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_rlhf.cli import main
from tests.helpers.small_runs import demonstrations, write_rows

USER_CODE = '''
import io
import os
import signal

import lightning.pytorch as L
import torch


def many_w3(prompts, responses, rows):
    return [response.split().count("w3") / 8 for response in responses]


class Fault(L.Callback):
    """Sends this process a signal at the n-th occurrence of an event: FAULT=KILL:generate:3, comma-separated."""

    def __init__(self):
        self.faults, self.counts = os.environ.get("FAULT", "").split(","), {}

    def reached(self, event):
        self.counts[event] = self.counts.get(event, 0) + 1
        for fault in self.faults:
            name, at, count = (fault or "none:none:0").split(":")
            if (at, int(count)) == (event, self.counts[event]):
                os.kill(os.getpid(), getattr(signal, f"SIG{name}"))

    def on_fit_start(self, trainer, pl_module):
        def count(*_):
            if not torch.is_grad_enabled():
                self.reached("generate")

        pl_module.policy.register_forward_hook(count)
        save = torch.save

        def save_in_halves(content, file, *args, **settings):
            buffer = io.BytesIO()
            save(content, buffer, *args, **settings)
            data = buffer.getvalue()
            file.write(data[: len(data) // 2])
            file.flush()
            self.reached("write")
            file.write(data[len(data) // 2 :])

        if "write" in os.environ.get("FAULT", ""):
            torch.save = save_in_halves

    def on_train_batch_start(self, *_):
        self.reached("batch")

    def on_before_optimizer_step(self, *_):
        self.reached("step")

    def on_train_batch_end(self, *_):
        self.reached("batch_end")

    def on_train_epoch_end(self, *_):
        self.reached("epoch_end")
'''


def write_project(folder: Path, llama: str, **trainer: Any) -> None:
    """Write recipe.yaml and its inputs: 8 iterations of 4 optimizer steps of 2 micro-batches."""
    (folder / "user_code.py").write_text(USER_CODE)
    text = write_rows(folder / "text.jsonl", [{"text": " ".join(f"w{i % 28}" for i in range(200))}])
    adaptive = {"coefficient": 0.05, "target": 0.01, "horizon": 40}
    model = {
        "model": llama,
        "reward": {"class_path": "lit_rlhf.rewards.FunctionReward", "init_args": {"function": "user_code.many_w3"}},
        "sampling": {"max_new_tokens": 6},
        "ppo": {"rollout_batch_size": 16, "micro_batch_size": 2, "critic_learning_rate": 1e-3},
        "kl": {"class_path": "lit_rlhf.rollout.AdaptiveKLController", "init_args": adaptive},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        "scheduler": {"class_path": "lit_rlhf.schedules.ConstantWithWarmup", "init_args": {"warmup_iterations": 2}},
    }
    callbacks = {
        "user_code.Fault": {},
        "lit_rlhf.callbacks.PretrainingMix": {"path": text, "coefficient": 0.5, "micro_batch_size": 2, "seq_len": 8},
        "lightning.pytorch.callbacks.ModelCheckpoint": {"every_n_train_steps": 1, "filename": "{step}"},
        "lit_rlhf.callbacks.LogSamples": {"every_n_epochs": 1, "rows": 2},
        "lit_rlhf.callbacks.ExportModel": {},
    }
    settings = {"accelerator": "cpu", "devices": 1, "max_epochs": 8, "accumulate_grad_batches": 2}
    settings |= {"log_every_n_steps": 1, "enable_progress_bar": False, "gradient_clip_val": 1.0}
    recipe = {
        "seed_everything": 3,
        "model": {"class_path": "lit_rlhf.modules.PPOModule", "init_args": model},
        "data": {
            "class_path": "lit_rlhf.data.PromptDataModule",
            "init_args": {"path": write_rows(folder / "prompts.jsonl", demonstrations(20))},
        },
        "trainer": {
            **settings,
            "callbacks": [{"class_path": name, "init_args": given} for name, given in callbacks.items()],
            **trainer,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def fit(out: str, *more: str) -> int:
    """Train into the folder `out` of the working directory, in this process."""
    return main(["fit", "-c", "recipe.yaml", f"--run_dir={out}", *more])


def fit_in_a_process(out: str, fault: str = "", *more: str) -> int:
    """Train in a fork of this process; return its exit code, negative if a signal killed it."""
    child = os.fork()
    if child == 0:
        os.environ["FAULT"] = fault
        sys.stdout = sys.stderr = log = Path(f"{out}.log").open("a", buffering=1)  # noqa: SIM115 (until the end)
        os.dup2(log.fileno(), 2)
        code = 1
        try:
            code = fit(out, *more)
        finally:
            log.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def logged(out: str) -> list[dict[str, str]]:
    """Return every row of metrics.csv, without times."""
    with open(Path(out) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [
        {name: value for name, value in row.items() if value and not name.startswith(("time/", "throughput/"))}
        for row in rows
    ]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights and the optimizer's moments of a checkpoint by name."""
    content = torch.load(checkpoint, weights_only=True)
    moments = {
        f"{number}.{name}": value
        for number, state in content["optimizer_states"][0]["state"].items()
        for name, value in state.items()
    }
    return content["state_dict"] | moments


def assert_same_run(one: str, other: str, step: int) -> None:
    """Check that weights, moments and logs are identical."""
    mine, theirs = (weights(Path(out) / "checkpoints" / f"step={step}.ckpt") for out in (one, other))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name
    assert logged(one) == logged(other)
    assert (Path(one) / "samples.jsonl").read_text() == (Path(other) / "samples.jsonl").read_text()
    for name in ("model.safetensors", "config.json"):
        assert (Path(one) / "model" / name).read_bytes() == (Path(other) / "model" / name).read_bytes()
