"""A wrong name is refused before torch is imported, in the words of the parse; what is right is left to the parse."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_rlhf.commands import evaluate, fit
from lit_rlhf.commands.recipes import is_evaluation, is_overlay, shipped_recipes
from lit_rlhf.commands.support import early_checks
from lit_rlhf.commands.support.early_checks import known_options

KL = "model.kl: AdaptiveKLController has no setting"
# arguments after the recipe -> the line
WRONG = {
    "--trainer.max_step=3": "no setting 'trainer.max_step' (did you mean 'trainer.max_steps'?) [command line]",
    "--trainr.max_steps=3": "no setting 'trainr.max_steps' (did you mean 'trainer.max_steps'?) [command line]",
    "--ckpt_pat=last": "no setting 'ckpt_pat' (did you mean 'ckpt_path'?) [command line]",
    "--overwrit": "no setting 'overwrit' (did you mean 'overwrite'?) [command line]",
    "--model.kll=3": "model: PPOModule has no setting 'kll' (did you mean 'kl'?) [command line]",
    "--model.kl.targt=3": f"{KL} 'targt' (did you mean 'target'?) [command line]",
    "--model.init_args.kl.init_args.targt=3": f"{KL} 'targt' (did you mean 'target'?) [command line]",
    "--model.ppo.clip_rnge=3": "model.ppo: PPOConfig has no setting 'clip_rnge' (did you mean 'clip_range'?) "
    "[command line]",
    "--model.sampling.missing_eos.scor=3": "model.sampling.missing_eos: MissingEOS has no setting 'scor' (did you mean "
    "'score'?) [command line]",
    "--model.optimizer.lrr=3": "model.optimizer: AdamW has no setting 'lrr' (did you mean 'lr'?) [command line]",
    "--data.preprocessing.user_colum=3": "data.preprocessing: Preprocessing has no setting 'user_colum' (did you mean "
    "'user_column'?) [command line]",
    "-c=nested.yaml": f"{KL} 'horizn' (did you mean 'horizon'?) [nested.yaml:4]",
    "--data.pth=x": "data: PromptDataModule has no setting 'pth' (did you mean 'path'?) [command line]",
    "-c=section.yaml": "no setting 'trainr.max_steps' (did you mean 'trainer.max_steps'?) [section.yaml:2]",
    "-c=merged.yaml": "no setting 'trainer.max_step' (did you mean 'trainer.max_steps'?) [merged.yaml:1]",
    "-c=dotted.yaml": "no setting 'trainer.max_step' (did you mean 'trainer.max_steps'?) [dotted.yaml:1]",
    "-c=class.yaml": "model: PPOModule has no setting 'samplin' (did you mean 'sampling'?) [class.yaml:3]",
    "-c=init_args.yaml": "model: PPOModule has no setting 'init_arg' (did you mean 'init_args'?) [init_args.yaml:2]",
}
OVERLAYS = {
    "empty": "model: {init_args: {ppo: {}}}\ndata: {}\n",
    "merge": "model: &m {init_args: {model: m}}\ndata: {<<: [{init_args: {path: p}}]}\ntrainer: {<<: {max_steps: 3}}\n",
    "empty_section": "trianer: {}\n",
    "empty_setting": "trainer: {max_epoch: {}}\n",
    "section": "# an overlay\ntrainr:\n  max_steps: 3\n",
    "merged": "trainer: {<<: {max_step: 3}}\n",
    "dotted": "trainer.max_step: 3\n",
    "class": "model:\n  init_args:\n    samplin: {temperature: 0.5}\n",
    "init_args": "model:\n  init_arg: {seed: 3}\n",
    "nested": "model:\n  init_args:\n    kl:\n      horizn: 300\n",
}
RECIPE = """
model:
  class_path: lit_rlhf.modules.PPOModule
  init_args:
    model: m
    reward: {class_path: lit_rlhf.rewards.FunctionReward, init_args: {function: a.b}}
    kl: {class_path: lit_rlhf.rollout.AdaptiveKLController, init_args: {target: 2.0}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data: {class_path: lit_rlhf.data.PromptDataModule, init_args: {path: p}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ppo.yaml").write_text(RECIPE)
    for name, text in OVERLAYS.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


@pytest.mark.parametrize("word", WRONG)
def test_the_line_is_that_of_the_parse(
    word: str, folder: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (2, "", f"error: {WRONG[word]}\n")
    assert command("fit", "-c", "ppo.yaml", word) == expected
    monkeypatch.setattr(fit, "check_names", lambda *_: None)
    assert command("fit", "-c", "ppo.yaml", word) == expected


@pytest.mark.parametrize("name, wrong", [("empty_section", "trianer"), ("empty_setting", "trainer.max_epoch")])
def test_an_empty_mapping_has_a_name_too(name: str, wrong: str, folder: Path, command: Callable[..., Any]) -> None:
    code, _, err = command("fit", "-c", "ppo.yaml", "-c", f"{name}.yaml")  # the parse takes it
    assert code == 2 and f"no setting {wrong!r} (did you mean" in err and f"[{name}.yaml:1]" in err


def test_an_option_of_evaluate(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("evaluate", "-c", "evaluate/quickstart", "--sede=3")
    expected = (2, "", "error: no setting 'sede' (did you mean 'seed'?) [command line]\n")
    assert command(*args) == expected
    monkeypatch.setattr(evaluate, "check_names", lambda *_: None)
    assert command(*args) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["-c=ppo.yaml", "--trainer.max_step=3"],
        ["-c=ppo.yaml", "--model.kll=3"],
        ["-c=ppo.yaml", "--model.kl.targt=3"],
        ["-c=ppo.yaml", "--model.ppo.clip_rnge=3"],
        ["-c=ppo.yaml", "--model.optimizer.lrr=3"],
        ["-c=quickstart/pppo"],
        ["quickstart/ppo"],
    ],
)
def test_it_takes_under_two_seconds_and_no_torch(words: list[str], folder: Path) -> None:
    code = f"import sys; from lit_rlhf.cli import main; main({['fit', *words]}); print('torch' in sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout == "False\n" and done.stderr.startswith("error: ")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_no_shipped_recipe_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    recipes = shipped_recipes()
    overlays = [name for name in recipes if is_overlay(name)]
    for name in recipes:
        if is_overlay(name):
            continue
        kind = "evaluate" if is_evaluation(name) else "fit"
        for overlay in ["", *overlays] if name.startswith("small/ppo") else [""]:  # one overlay is for PPO alone
            args = ["-c", name, *(["-c", overlay] if overlay else [])]
            fit.check_names(kind, fit.read_arguments(args)[1])


@pytest.mark.parametrize("name", ["fit", "validate", "test", "evaluate"])
def test_every_option_of_the_parser_is_known(name: str, command: Callable[..., Any]) -> None:
    known = known_options(name)
    assert known is not None
    options, groups = known
    text = command(name, "--help" if name == "evaluate" else "--help-all")[1]
    found = [option.split(".") for option in re.findall(r"^ +(?:-\w,? )?--([\w.]+)", text, re.MULTILINE)]
    assert len(found) > 8
    for first, *rest in found:
        assert first in options and (first not in groups or not rest or rest[0] in (*groups[first], "help"))


@pytest.mark.parametrize(
    "words",
    [
        ["--model=toys.ToyModule", "--model.kll=3"],  # another class than the recipe's: its settings are not known here
        ["--model=toys.yaml", "--model.kll=3"],
        ["--trainer.callbacks+=EMA", "--trainer.callbacks.EMA.decay=0.9"],
        ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1"],
        ["--model.kl=FixedKLController", "--model.kl.coefficient=1", "--model.kl.target=1"],
        ["--model.ppo=ppo.yaml", "--model.ppo.of_a_class_in_that_file=1"],
        ["--model.help=PPOModule", "--model.kll=3"],
        ["--print_config=skip_null"],
        ["-c=empty.yaml"],
        ["-c=merge.yaml"],
    ],
)
def test_what_may_be_right_is_left_to_the_parse(words: list[str], folder: Path) -> None:
    fit.check_names("fit", fit.read_arguments(["-c", "ppo.yaml", *words])[1])


def test_a_class_goes_by_its_name(folder: Path, command: Callable[..., Any]) -> None:
    words = ("--model.model=m", "--model.reward=FunctionReward", "--model.reward.function=a.b", "--data.path=p")
    args = ("fit", "--model=PPOModule", "--data=PromptDataModule", "--trainer.callbacks+=EMA", *words)
    code, stdout, stderr = command(*args, "--print_config")
    assert code == 0, stderr
    for path in ("modules.PPOModule", "data.PromptDataModule", "callbacks.EMA", "rewards.FunctionReward"):
        assert f"class_path: lit_rlhf.{path}\n" in stdout
    line = "error: model: 'PPOModul' is no class path (did you mean 'PPOModule'?) [command line]\n"
    assert command("fit", "--model=PPOModul", "--data=PromptDataModule", "--data.path=p") == (2, "", line)


def test_a_recipe_without_its_option_is_named(folder: Path, command: Callable[..., Any]) -> None:
    for word in ("quickstart/ppo", "ppo.yaml"):
        assert command("fit", word) == (2, "", f"error: {word} needs -c in front of it: -c {word}\n")
        assert command("fit", "--trainer.max_steps=3", word)[2] == f"error: {word} needs -c in front of it: -c {word}\n"
    assert command("fit", "nothing")[2] == "error: unexpected argument 'nothing' [command line]\n"


@pytest.mark.parametrize("name", ["fit", "validate", "test"])
def test_help_fits_a_screen_and_names_the_classes(name: str, command: Callable[..., Any]) -> None:
    code, stdout, _ = command(name, "--help")
    lines = stdout.splitlines()
    assert code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 80
    for each in ("SFTModule", "RewardModule", "PPOModule", "PromptDataModule", "PretrainingMix", "EMA", "LogSamples"):
        assert each in stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, json; from lit_rlhf.cli import main; main(['fit', '--help']);"
        "print(json.dumps([n for n in ('torch', 'lightning', 'transformers', 'jsonargparse') if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


LOGGING = "trainer: {logger: [{class_path: CSVLogger}, {class_path: lightning.pytorch.loggers.WandbLogger}]}"


@pytest.mark.parametrize(
    "words, imported",
    [
        (["-c", "logged.yaml"], True),
        (["-c", "logged.yaml", "-c", "ppo.yaml"], True),
        (["-c", "logged.yaml", "-c", "logger/csv"], False),
        (["-c", "logger/csv", "-c", "logged.yaml"], True),
        (["-c", "logged.yaml", "--trainer.logger=false"], False),
        (["-c", "ppo.yaml", "--trainer.logger=WandbLogger"], True),
        (["-c", "logged.yaml", "--print_config"], False),
        (["-c", "ppo.yaml"], False),
    ],
)
def test_weights_and_biases_is_imported_before_torch_where_a_run_logs_to_it(
    words: list[str], imported: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "logged.yaml").write_text(LOGGING)
    names: list[str] = []
    monkeypatch.setattr(early_checks, "import_module", names.append)
    early_checks.import_wandb(fit.read_arguments(words)[1])
    assert names == ["wandb.apis.public"] * imported


def test_the_import_of_weights_and_biases_goes_before_that_of_torch(folder: Path) -> None:
    (folder / "logged.yaml").write_text(LOGGING)
    code = (
        "import sys; from lit_rlhf.commands import fit; fit.check_names = lambda *_: None;"
        'fit.import_named_classes = lambda *_: sys.exit(f\'{"torch" in sys.modules} {"wandb" in sys.modules}\');'
        "fit.run('fit', ['-c', 'ppo.yaml', '-c', 'logged.yaml'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "False True"
