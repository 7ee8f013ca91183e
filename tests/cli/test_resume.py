"""An interrupted run that is resumed from its last checkpoint ends with the weights of an uninterrupted one."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.small_runs import demonstrations, write_rows

USER_CODE = """
import lightning.pytorch as L


class Interrupt(L.Callback):
    def __init__(self, epoch: int, batch: int = 0):
        self.epoch, self.batch = epoch, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            raise KeyboardInterrupt


def many_w3(prompts, responses, rows):
    return [response.split().count("w3") / 8 for response in responses]
"""


def recipe(model: dict, data: dict, kept: str) -> dict:
    scheduler = {"class_path": "lit_rlhf.schedules.CosineWithMinLR", "init_args": {"min_lr_ratio": 0.1}}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
    checkpoint = {"save_last": True, "every_n_epochs": 1, "dirpath": kept, "filename": "{epoch}", "save_top_k": -1}
    model["init_args"] |= {"optimizer": optimizer, "scheduler": scheduler}
    return {
        "seed_everything": 3,
        "model": model,
        "data": data,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 4,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 1.0,
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint},
                {"class_path": "lit_rlhf.callbacks.ExportModel"},
            ],
        },
    }


def sft(llama: str, folder: Path, validation: float, kept: str) -> dict:
    path = write_rows(folder / "demonstrations.jsonl", demonstrations(40))
    data = {"path": path, "validation_fraction": validation, "micro_batch_size": 4}
    return recipe(
        {"class_path": "lit_rlhf.modules.SFTModule", "init_args": {"model": llama}},
        {"class_path": "lit_rlhf.data.DemonstrationDataModule", "init_args": data},
        kept,
    )


def ppo(llama: str, folder: Path, validation: float, kept: str) -> dict:
    path = write_rows(folder / "prompts.jsonl", demonstrations(20))
    data = {"path": path} | ({"validation_path": path} if validation else {})
    adaptive = {"coefficient": 0.05, "target": 0.01, "horizon": 40}
    settings = {
        "model": llama,
        "reward": {"class_path": "lit_rlhf.rewards.FunctionReward", "init_args": {"function": "user_code.many_w3"}},
        "sampling": {"max_new_tokens": 6},
        "ppo": {"rollout_batch_size": 16, "micro_batch_size": 4, "ppo_epochs": 2, "critic_learning_rate": 1e-3},
        "kl": {"class_path": "lit_rlhf.rollout.AdaptiveKLController", "init_args": adaptive},
    }
    return recipe(
        {"class_path": "lit_rlhf.modules.PPOModule", "init_args": settings},
        {"class_path": "lit_rlhf.data.PromptDataModule", "init_args": data},
        kept,
    )


@pytest.mark.parametrize("validation", [0.0, 0.2], ids=["no_validation", "validation"])
@pytest.mark.parametrize("stage", [sft, ppo], ids=["sft", "ppo"])
def test_a_resumed_run_equals_an_uninterrupted_one(stage, validation, llama, tmp_path, monkeypatch, command) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "user_code", raising=False)
    (tmp_path / "user_code.py").write_text(USER_CODE)
    interrupt = "trainer: {callbacks+: [{class_path: user_code.Interrupt, init_args: {epoch: 2, batch: 1}}]}"
    (tmp_path / "interrupt.yaml").write_text(interrupt)

    def run(out: str, *more: str) -> int:
        text = yaml.safe_dump(stage(llama, tmp_path, validation, f"{out}/kept"))
        (tmp_path / "recipe.yaml").write_text(text)
        return command("fit", "-c", "recipe.yaml", f"--run_dir={out}", *more)[0]

    def checkpoint(out: str) -> dict:
        return torch.load(tmp_path / out / "kept" / "last.ckpt", weights_only=True)

    assert run("complete") == 0
    assert run("resumed", "-c", "interrupt.yaml") == 130
    assert checkpoint("resumed")["epoch"] == 1
    assert run("resumed", "--ckpt_path=last") == 0
    complete, resumed = checkpoint("complete"), checkpoint("resumed")
    assert complete["global_step"] == resumed["global_step"]
    assert complete["lr_schedulers"] == resumed["lr_schedulers"]
    for name, weight in complete["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], weight, atol=1e-7, rtol=1e-6, msg=name)
    assert complete.get("kl_controller", {}) == pytest.approx(resumed.get("kl_controller", {}), rel=1e-5)


def test_changed_settings_hold_and_are_printed_once(llama, tmp_path, monkeypatch, command) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sft(llama, tmp_path, 0.0, "out/kept")))
    start = "--ckpt_path=out/kept/epoch=1.ckpt"
    assert command("fit", "-c", "recipe.yaml", "--run_dir=out", "--trainer.max_epochs=2")[0] == 0
    code, _, stderr = command("fit", "-c", "recipe.yaml", "--run_dir=out", "--trainer.max_epochs=2", start)
    assert code == 0 and "differ" not in stderr
    changes = ["--model.optimizer.lr=5e-5", "--model.optimizer.weight_decay=0.5", "--data.micro_batch_size=2"]
    added = "--trainer.callbacks+={class_path: lit_rlhf.callbacks.EMA, init_args: {decay: 0.5}}"
    code, _, stderr = command("fit", "-c", "recipe.yaml", "--run_dir=out", *changes, added, start)
    assert code == 0
    lines = stderr.splitlines()
    at = lines.index("resumed with settings that differ from the checkpoint's:")
    assert [line.split() for line in lines[at + 1 : at + 7]] == [
        ["setting", "checkpoint", "now"],
        ["data.micro_batch_size", "4", "2"],
        ["model.optimizer.lr", "0.001", "5e-05"],
        ["model.optimizer.weight_decay", "0.01", "0.5"],
        ["trainer.callbacks.EMA", "–", "lit_rlhf.callbacks.EMA"],
        ["trainer.max_epochs", "2", "4"],
    ]
    content = torch.load(tmp_path / "out" / "kept" / "epoch=3.ckpt", weights_only=True)
    groups = content["optimizer_states"][0]["param_groups"]
    assert [(group["initial_lr"], group["weight_decay"]) for group in groups] == [(5e-5, 0.5), (5e-5, 0.0)]


def test_what_cannot_be_resumed_is_one_line_before_anything_is_loaded(llama, tmp_path, monkeypatch, command) -> None:
    monkeypatch.chdir(tmp_path)
    given = sft(llama, tmp_path, 0.0, "out/kept")
    given["trainer"]["callbacks"][0]["init_args"] |= {"every_n_train_steps": 1, "every_n_epochs": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    assert command("fit", "-c", "recipe.yaml", "--run_dir=out", "--trainer.max_steps=3")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for changes, line in (
        (
            ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"],
            "the checkpoint's optimizer is torch.optim",
        ),
        (["--data.micro_batch_size=5"], "after 24 rows of its epoch, which minibatches of 10 = micro_batch_size 5"),
        (
            ["--data.micro_batch_size=12"],
            "the 16 rows that the checkpoint left of its epoch fill no minibatch of 24",
        ),
        (["--data.seed=7"], "in the middle of an epoch whose order is of seed 0"),
    ):
        code, _, stderr = command("fit", "-c", "recipe.yaml", "--run_dir=out", "--ckpt_path=last", *changes)
        assert code == 2 and line in stderr.splitlines()[-1] and "Traceback" not in stderr, stderr
        assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


CHANGES = {
    "NaN": lambda weight: weight.fill_(float("nan")),
    "infinity": lambda weight: torch.where(weight == weight.max(), float("inf"), weight),
    "integers": lambda weight: weight.to(torch.int32),
    "complex": lambda weight: weight.to(torch.complex64),
}


@pytest.mark.parametrize(("stage", "kinds"), [("sft", ["NaN", "integers"]), ("ppo", ["infinity", "complex"])])
def test_a_checkpoint_of_no_numbers_is_one_line_in_every_command(stage, kinds, stages, command) -> None:
    assert command("fit", "-c", f"{stage}.yaml")[0] == 0
    last = stages / "runs" / stage / "checkpoints" / "last.ckpt"
    sound = last.read_bytes()
    for kind in kinds:
        last.write_bytes(sound)
        content = torch.load(last, weights_only=True)
        names = [name for name in content["state_dict"] if name.endswith("layers.1.mlp.up_proj.weight")]
        name = next(name for name in names if not name.startswith("critic."))  # which is not exported
        content["state_dict"][name] = CHANGES[kind](content["state_dict"][name])
        torch.save(content, last)
        for words in (
            ("fit", "-c", f"{stage}.yaml", "--ckpt_path=last", "--trainer.max_epochs=2"),
            ("validate", "-c", f"{stage}.yaml"),
            ("export", str(last), "exported"),
        ):
            code, _, err = command(*words)
            (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
            assert code == 2 and "layers.1.mlp.up_proj.weight' of " in line and "last.ckpt" in line, (kind, line)
            assert ("floating-point" if kind in ("integers", "complex") else "holds NaN or infinity") in line
    assert not (stages / "exported").exists()
