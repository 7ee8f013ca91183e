"""A wrong setting is one line that says what, where and the nearest right name; exit code 2."""

from pathlib import Path

import pytest

OVERLAYS = {
    "unknown setting of a class": (
        "model: {init_args: {hiden: 8}}",
        "model: ToyModule has no setting 'hiden' (did you mean 'hidden'?) [overlay.yaml:2]",
    ),
    "init_args misspelled": (
        "model: {class_path: toys.ToyModule, init_arg: {hidden: 3}}",
        "model: ToyModule has no setting 'init_arg' (did you mean 'init_args'?) [overlay.yaml:2]",
    ),
    "unknown class": (
        "model: {class_path: toys.ToyModul}",
        "model: no 'ToyModul' in toys (did you mean 'ToyModule'?) [overlay.yaml:2]",
    ),
    "unknown module": (
        "model: {class_path: toyz.ToyModule}",
        "model: there is no module 'toyz' (did you mean 'toys'?) [overlay.yaml:2]",
    ),
    "unknown submodule": (
        "model: {class_path: lit_rlhf.module.SFTModule}",
        "model: no 'module' in lit_rlhf (did you mean 'modules'?) [overlay.yaml:2]",
    ),
    "no class path": (
        "model: {class_path: ToyModuleX}",
        "model: 'ToyModuleX' is no class path; write it in full, such as package.module.Class [overlay.yaml:2]",
    ),
    "missing package": (
        "model: {class_path: vllm.Engine}",
        "model: 'vllm.Engine' needs the package 'vllm', which is not installed: pip install vllm [overlay.yaml:2]",
    ),
    "a class of another kind": (
        "data: {class_path: toys.ToyModule}",
        "data: 'ToyModule' is no LightningDataModule; this setting takes a subclass of LightningDataModule "
        "[overlay.yaml:2]",
    ),
    "a class that lacks a method": (
        "model: {class_path: lit_rlhf.modules.PPOModule, init_args: {model: m, reward: {class_path: toys.NoScore}}}",
        "'toys.NoScore' lacks score, which a subclass of lit_rlhf.rewards.base.Reward must define [overlay.yaml:2]",
    ),
    "a setting without a default": (
        "data: {class_path: toys.NeedsPath}",
        "data: NeedsPath needs the setting path, which has no default [overlay.yaml:2]",
    ),
    "wrong type": (
        "model: {init_args: {hidden: many}}",
        "model.hidden: expected int, got 'many' [overlay.yaml:2]",
    ),
    "not one of the choices": (
        "model: {init_args: {kind: square}}",
        "model.kind: expected 'linear' or 'cubic', got 'square' [overlay.yaml:2]",
    ),
    "unknown setting of a nested group": (
        "model: {init_args: {clipping: {hihg: 1}}}",
        "model: clipping has no setting 'hihg' (did you mean 'high'?) [overlay.yaml:2]",
    ),
    "wrong type in a nested group": (
        "model: {init_args: {clipping: {high: x}}}",
        "model.clipping.high: expected float, got 'x' [overlay.yaml:2]",
    ),
    "unknown setting of a nested class": (
        "model: {init_args: {controller: {class_path: toys.Controller, init_args: {targt: 1}}}}",
        "model.controller: Controller has no setting 'targt' (did you mean 'target'?) [overlay.yaml:2]",
    ),
    "unknown optimizer": (
        "model: {init_args: {optimizer: {class_path: torch.optim.AdammW}}}",
        "model.optimizer: no 'AdammW' in torch.optim (did you mean 'AdamW'?) [overlay.yaml:2]",
    ),
    "unknown setting of the optimizer": (
        "model: {init_args: {optimizer: {class_path: torch.optim.AdamW, init_args: {lrr: 1}}}}",
        "model.optimizer: AdamW has no setting 'lrr' (did you mean 'lr'?) [overlay.yaml:2]",
    ),
    "wrong type in the optimizer": (
        "model: {init_args: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: fast}}}}",
        "model.optimizer.lr: expected float, got 'fast' [overlay.yaml:2]",
    ),
    "no optimizer": (
        "model: {init_args: {optimizer: {class_path: torch.optim.lr_scheduler.LinearLR}}}",
        "model.optimizer: 'LinearLR' is no Optimizer; this setting takes a subclass of Optimizer [overlay.yaml:2]",
    ),
    "unknown trainer setting": (
        "trainer: {max_step: 3}",
        "no setting 'trainer.max_step' (did you mean 'trainer.max_steps'?) [overlay.yaml:2]",
    ),
    "unknown section": (
        "trainr: {max_steps: 3}",
        "no setting 'trainr.max_steps' (did you mean 'trainer.max_steps'?) [overlay.yaml:2]",
    ),
    "wrong type in the trainer": (
        "trainer: {max_steps: many}",
        "trainer.max_steps: expected int, got 'many' [overlay.yaml:2]",
    ),
    "unknown callback": (
        "trainer: {callbacks+: [{class_path: lightning.pytorch.callbacks.ModelCheckpont}]}",
        "trainer.callbacks: no 'ModelCheckpont' in lightning.pytorch.callbacks (did you mean 'ModelCheckpoint'?) "
        "[overlay.yaml:2]",
    ),
    "unknown setting of a callback": (
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {montor: x}}]}",
        "trainer.callbacks: ModelCheckpoint has no setting 'montor' (did you mean 'monitor'?) [overlay.yaml:2]",
    ),
    "unknown setting of the logger": (
        "trainer: {logger: {class_path: lightning.pytorch.loggers.WandbLogger, init_args: {projekt: x}}}",
        "trainer.logger: WandbLogger has no setting 'projekt' (did you mean 'project'?) [overlay.yaml:2]",
    ),
    "unknown strategy class": (
        "trainer: {strategy: {class_path: lightning.pytorch.strategies.DDPStrategi}}",
        "trainer.strategy: no 'DDPStrategi' in lightning.pytorch.strategies (did you mean 'DDPStrategy'?) "
        "[overlay.yaml:2]",
    ),
    "a constructor's own complaint": (
        "model: {init_args: {controller: {class_path: toys.Controller, init_args: {target: -1}}}}",
        "target must be 0 or more, got -1.0",
    ),
    "a user's error in mid-run": (
        "model: {init_args: {fault: user}}",
        "prompts.jsonl, line 3: not JSON; fix the row",
    ),
    "not a mapping": ("[1, 2]", "overlay.yaml: a recipe is a mapping with keys such as trainer, model and data"),
    "no setting": ("", "overlay.yaml: a recipe is a mapping with keys such as trainer, model and data"),
    "no YAML": ("model: [1", "overlay.yaml, line 2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
}


def error_lines(stderr: str) -> list[str]:
    """Return the lines of stderr without Lightning's information."""
    return [line for line in stderr.splitlines() if line and not line.startswith(("GPU available", "`Trainer"))]


@pytest.mark.parametrize("kind", OVERLAYS)
def test_a_wrong_overlay_is_one_line(project: Path, command, kind: str) -> None:
    overlay, expected = OVERLAYS[kind]
    (project / "overlay.yaml").write_text(f"# an overlay\n{overlay}")
    code, _, stderr = command("fit", "-c", "recipe.yaml", "-c", "overlay.yaml")
    assert (code, error_lines(stderr)) == (2, [f"error: {expected}"])


ARGUMENTS = {
    "--model.hiden=3": "model: ToyModule has no setting 'hiden' (did you mean 'hidden'?) [command line]",
    "--model.hidden=many": "model.hidden: expected int, got 'many' [command line]",
    "--model=toys.ToyModul": "model: no 'ToyModul' in toys (did you mean 'ToyModule'?) [command line]",
    "--model.clipping.hihg=1": "model: clipping has no setting 'hihg' (did you mean 'high'?) [command line]",
    "--trainer.max_step=3": "no setting 'trainer.max_step' (did you mean 'trainer.max_steps'?) [command line]",
    "--ckpt_pat=last": "no setting 'ckpt_pat' (did you mean 'ckpt_path'?) [command line]",
    "--seed_everything=x": "seed_everything: expected bool or int, got 'x' [command line]",
    "surplus": "unexpected argument 'surplus' [command line]",
    "--ckpt_path=no.ckpt": "ckpt_path: there is no checkpoint no.ckpt",
    "-c": "-c needs the name of a recipe or a file; lit-rlhf recipes ls lists the recipes",
    "--config=nowhere": "-c nowhere: no such file, and no recipe 'nowhere'; lit-rlhf recipes ls lists them",
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_wrong_argument_is_one_line(project: Path, command, argument: str) -> None:
    code, _, stderr = command("fit", "-c", "recipe.yaml", argument)
    assert (code, error_lines(stderr)) == (2, [f"error: {ARGUMENTS[argument]}"])


@pytest.mark.parametrize(
    "args, expected",
    [
        (["fti"], "no command 'fti' (did you mean 'fit'?); lit-rlhf --help lists them"),
        (["fit"], "the run lacks data, model: name a recipe with -c; lit-rlhf recipes ls lists them"),
        (["generate", "--modl", "x"], "lit-rlhf generate has no option '--modl' (did you mean '--model'?)"),
        (["generate"], "lit-rlhf generate: the following arguments are required: --model"),
        (["quickstart", "--seed", "x"], "lit-rlhf quickstart: argument --seed: invalid int value: 'x'"),
        (["export", "no.ckpt", "out"], "there is no checkpoint no.ckpt"),
    ],
)
def test_a_wrong_command_is_one_line(project: Path, command, args: list[str], expected: str) -> None:
    code, _, stderr = command(*args)
    assert (code, stderr) == (2, f"error: {expected}\n")


def test_the_later_file_is_the_one_named(project: Path, command) -> None:
    (project / "first.yaml").write_text("model: {init_args: {hidden: 3}}")
    (project / "second.yaml").write_text("\n\nmodel:\n  init_args:\n    hidden: x\n")
    _, _, stderr = command("fit", "-c", "recipe.yaml", "-c", "first.yaml", "-c", "second.yaml")
    assert "[second.yaml:5]" in stderr


def test_an_output_folder_that_is_a_file_is_refused_before_the_model(project: Path, command) -> None:
    (project / "taken").write_text("")
    code, _, stderr = command("fit", "-c", "recipe.yaml", "--run_dir=taken/run", "--model.fault=ours")
    assert code == 2
    assert error_lines(stderr) == [
        "error: cannot write to the output folder taken/run (Not a directory): set run_dir to another"
    ]


def test_an_accelerator_that_is_not_there_is_the_users_error(project: Path, command) -> None:
    code, _, stderr = command("fit", "-c", "recipe.yaml", "--trainer.accelerator=tpu")
    assert code == 2
    assert len(error_lines(stderr)) == 1


def test_a_strategy_that_is_none_is_the_users_error(project: Path, command) -> None:
    code, _, stderr = command("fit", "-c", "recipe.yaml", "--trainer.strategy=dpd")
    assert code == 2
    assert error_lines(stderr)[0].startswith("error: trainer: You selected an invalid strategy name")


def test_a_loss_that_is_no_number_stops_the_run(project: Path, command) -> None:
    code, _, stderr = command("fit", "-c", "recipe.yaml", "--model.fault=nan")
    assert code == 2
    assert "nan at step 0" in error_lines(stderr)[0]


def test_what_is_not_the_users_error_propagates(project: Path, command) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        command("fit", "-c", "recipe.yaml", "--model.fault=ours")
