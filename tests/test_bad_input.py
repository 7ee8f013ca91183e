"""Bad input: exit code 2 and one line that names the cause, before any weight is read."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.cli import main
from tests.helpers.small_runs import demonstrations, rankings, write_rows

Fit = Callable[..., tuple[int, list[str], str]]


def make_recipe(module: str, model: dict[str, Any], data: str, settings: dict[str, Any]) -> dict[str, Any]:
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    return {
        "model": {"class_path": f"lit_rlhf.modules.{module}", "init_args": {**model, "optimizer": optimizer}},
        "data": {"class_path": f"lit_rlhf.data.{data}", "init_args": settings},
        "run_dir": "out",
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "logger": False,
            "enable_progress_bar": False,
        },
    }


@pytest.fixture
def project(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with valid recipes of the three steps and their data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(os.sys.modules, "mine", raising=False)
    write_rows(tmp_path / "demonstrations.jsonl", demonstrations(8))
    write_rows(tmp_path / "rankings.jsonl", rankings(8))
    (tmp_path / "mine.py").write_text(
        "def nan(prompts, responses, rows):\n    return [float('nan') for _ in responses]\n\n\n"
        "calls = []\n\n\ndef later_infinite(prompts, responses, rows):\n    calls.append(1)\n"
        "    return [float('inf')] * (len(calls) > 1) + [0.0] * (len(responses) - (len(calls) > 1))\n\n\n"
        "def words(prompts, responses, rows):\n    return [len(r.split()) for r in responses]\n"
    )
    recipes = {
        "sft": make_recipe("SFTModule", {"model": llama}, "DemonstrationDataModule", {"path": "demonstrations.jsonl"}),
        "reward": make_recipe("RewardModule", {"model": llama}, "ComparisonDataModule", {"path": "rankings.jsonl"}),
        "ppo": make_recipe(
            "PPOModule",
            {
                "model": llama,
                "reward": {"class_path": "lit_rlhf.rewards.FunctionReward", "init_args": {"function": "mine.words"}},
                "sampling": {"max_new_tokens": 4},
                "ppo": {"rollout_batch_size": 8, "micro_batch_size": 4},
            },
            "PromptDataModule",
            {"path": "demonstrations.jsonl"},
        ),
    }
    for name, recipe in recipes.items():
        if name != "ppo":
            recipe["data"]["init_args"]["micro_batch_size"] = 4
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models whose weights were read."""
    names: list[str] = []
    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        original = auto.from_pretrained.__func__

        def reading(cls: Any, name: str, *args: Any, _original: Any = original, **settings: Any) -> Any:
            names.append(name)
            return _original(cls, name, *args, **settings)

        monkeypatch.setattr(auto, "from_pretrained", classmethod(reading))
    return names


@pytest.fixture
def fit(project: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Fit:
    """Run `lit-rlhf fit -c ARGS`; return the exit code, the "error:" lines, and everything printed."""

    def run(*args: str) -> tuple[int, list[str], str]:
        capfd.readouterr()
        caplog.clear()
        code = main(["fit", "-c", *args])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert not errors or err.splitlines()[-1] == errors[-1], "the error is the last line"
        return code, errors, out + err + caplog.text  # Lightning's logger writes to the stderr of its import

    return run


def assert_refused(result: tuple[int, list[str], str], *parts: str) -> None:
    code, errors, printed = result
    assert code == 2, printed
    assert len(errors) == 1, printed
    for part in parts:
        assert part in errors[0], f"{part!r} is not in {errors[0]!r}"


@pytest.mark.parametrize("recipe", ["sft.yaml", "reward.yaml", "ppo.yaml"])
def test_the_valid_recipes_run(recipe, fit, reads):
    code, errors, printed = fit(recipe)
    assert (code, errors) == (0, []), printed
    assert reads


UNKNOWN = {
    "recipe": (["quickstart/stf"], ["no recipe 'quickstart/stf'", "did you mean 'quickstart/sft'?"]),
    "key": (["sft.yaml", "--model.optimizr=x"], ["SFTModule has no setting 'optimizr'", "'optimizer'?"]),
    "trainer key": (["sft.yaml", "--trainer.max_epoch=3"], ["no setting 'trainer.max_epoch'", "'trainer.max_epochs'?"]),
    "key of a group": (
        ["ppo.yaml", "--model.ppo.rollout_bach=3"],
        ["no setting 'rollout_bach'", "'rollout_batch_size'?"],
    ),
    "class": (["sft.yaml", "--model=lit_rlhf.modules.SFTModul"], ["no 'SFTModul' in lit_rlhf.modules", "'SFTModule'?"]),
    "data class": (
        ["sft.yaml", "--data=lit_rlhf.data.DemonstrationModule"],
        ["no 'DemonstrationModule'", "'DemonstrationDataModule'?"],
    ),
    "reward class": (
        ["ppo.yaml", "--model.reward=lit_rlhf.rewards.PythonRewar"],
        ["no 'PythonRewar'", "'FunctionReward'?"],
    ),
    "reward function": (["ppo.yaml", "--model.reward.function=mine.word"], ["mine has no 'word'", "'words'?"]),
    "no optimizer": (["ppo.yaml", "--model.optimizer=null"], ["model.optimizer is null: name a class"]),
    "model folder": (["sft.yaml", "--model.model=./ou/model"], ["there is no folder './ou/model'"]),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_name_gets_the_nearest(kind, fit, reads):
    args, parts = UNKNOWN[kind]
    assert_refused(fit(*args), *parts)
    assert not reads


ROW = {"prompt": "w1 w2", "completion": "w3"}
RANKING = {"prompt": "w1", "completions": ["w2", "w3", "w4"], "ranks": [0, 1, 1]}
BAD_ROWS = {
    "missing file": ("sft", None, ["no data file 'demonstration.jsonl'", "did you mean 'demonstrations.jsonl'?"]),
    "no JSON": ("sft", [json.dumps(ROW), '{"prompt": "w1", '], ["bad.jsonl:2: this line does not parse as JSON"]),
    "no field": (
        "sft",
        [json.dumps(ROW), json.dumps({"prompt": "w1"})],
        ["bad.jsonl:2: no column 'completion'", "the row has 'prompt'"],
    ),
    "no field in the first row": (
        "sft",
        [json.dumps({"prompt": "w1", "text": "w2"})],
        ["bad.jsonl:1: no column 'completion'"],
    ),
    "a field of another kind": (
        "sft",
        [json.dumps({**ROW, "completion": 3})],
        ["bad.jsonl:1: column 'completion' must"],
    ),
    "empty file": ("sft", [], ["'bad.jsonl' is empty"]),
    "only blank lines": ("ppo", ["", ""], ["'bad.jsonl' is empty"]),
    "ranks of another length": (
        "reward",
        [json.dumps(RANKING), json.dumps({**RANKING, "ranks": [0, 1]})],
        ["bad.jsonl:2: 2 ranks for 3 completions"],
    ),
    "all tied": (
        "reward",
        [json.dumps({**RANKING, "ranks": [1, 1, 1]})] * 3,
        ["no ranking is left of 'bad.jsonl'", "3 all completions tied"],
    ),
    "fewer rows than a minibatch": ("sft", [json.dumps(ROW)], ["1 rows are fewer than one minibatch of 4"]),
    "every prompt too long": (
        "sft",
        [json.dumps({**ROW, "prompt": "w1 " * 30})] * 5,
        ["no row is left of 'bad.jsonl'", "5 prompt longer than 20 tokens"],
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_data_names_file_and_line(kind, fit, project, reads):
    recipe, lines, parts = BAD_ROWS[kind]
    path = "demonstration.jsonl" if lines is None else "bad.jsonl"
    if lines is not None:
        (project / path).write_text("".join(line + "\n" for line in lines))
    limit = [] if kind != "every prompt too long" else ["--data.max_prompt_length=20"]
    assert_refused(fit(f"{recipe}.yaml", f"--data.path={path}", *limit), *parts)
    assert not reads or kind == "fewer rows than a minibatch", "before any weight is read"


@pytest.mark.parametrize(
    ("policy", "said"),
    [("drop", "skipped: prompt longer than"), ("truncate", "of these: prompt truncated to its last")],
)
def test_overlong_prompts_follow_their_policy_and_are_counted(policy, said, fit, project):
    rows = [*demonstrations(8), {**ROW, "prompt": "w1 " * 30}]
    write_rows(project / "mixed.jsonl", rows)
    settings = ("--data.path=mixed.jsonl", "--data.max_prompt_length=20", f"--data.overlong_prompts={policy}")
    for recipe in ("sft.yaml", "ppo.yaml"):
        code, _, printed = fit(recipe, *settings, f"--run_dir={recipe}-out", "-v")
        assert code == 0, printed
        line = next(line for line in printed.splitlines() if said in line)
        assert "20 tokens" in line and "first: mixed.jsonl:9" in line and " 1  " in line


def test_some_tied_rankings_are_counted_and_skipped(fit, project):
    tied = {**RANKING, "ranks": [1, 1, 1]}
    write_rows(project / "some.jsonl", [*rankings(8), tied, tied])
    code, _, printed = fit("reward.yaml", "--data.path=some.jsonl", "-v")
    assert code == 0
    line = next(line for line in printed.splitlines() if "skipped: all completions tied" in line)
    assert " 2  first: some.jsonl:9" in line


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_more_tokens_than_the_model_has_positions_are_refused(recipe, fit, project, reads):
    long = "w1 " * 150  # the tiny models have 128 positions
    row = (
        {"prompt": long, "completions": ["w1", "w2"], "ranks": [0, 1]}
        if recipe == "reward"
        else {**ROW, "prompt": long}
    )
    write_rows(project / "long.jsonl", [row] * 8)
    assert_refused(
        fit(f"{recipe}.yaml", "--data.path=long.jsonl"), "more than the model's 128 positions", "max_prompt_length"
    )
    assert not reads


def test_pretraining_blocks_longer_than_the_model_are_refused(fit, project, reads):
    (project / "text.txt").write_text("w1 w2 " * 400)
    mix = "{class_path: lit_rlhf.callbacks.PretrainingMix, init_args: {path: text.txt, seq_len: 200}}"
    (project / "mix.yaml").write_text(f"trainer: {{callbacks+: [{mix}]}}")
    assert_refused(fit("sft.yaml", "-c", "mix.yaml"), "PretrainingMix: a block has 200 tokens", "model's 128 positions")
    text = ("--data=lit_rlhf.data.PretrainingDataModule", "--data.path=text.txt", "--data.seq_len=200")
    assert_refused(fit("sft.yaml", *text), "has 200 tokens", "model's 128 positions", "data.seq_len")
    assert not reads


def changed_model(llama: str, folder: Path, change: Callable[[Any], None]) -> str:
    """A copy of the tiny model with another tokenizer."""
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_a_padding_token_equal_to_the_end_token_is_refused(recipe, fit, llama, project, reads):
    def same(tokenizer: Any) -> None:
        tokenizer.pad_token = tokenizer.eos_token

    folder = changed_model(llama, project / "same", same)
    reads.clear()
    assert_refused(
        fit(f"{recipe}.yaml", f"--model.model={folder}"), "padding equal to its end token '<eos>'", "loading.pad_token"
    )
    assert not reads
    code, _, printed = fit(f"{recipe}.yaml", f"--model.model={folder}", "--model.loading.pad_token=<fill>")
    assert code == 0, printed


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_a_tokenizer_larger_than_the_vocabulary_is_refused(recipe, fit, llama, project, reads):
    folder = changed_model(llama, project / "larger", lambda tokenizer: tokenizer.add_tokens(["new", "newer"]))
    reads.clear()
    assert_refused(fit(f"{recipe}.yaml", f"--model.model={folder}"), "34 tokens, but a vocabulary of 32", folder)
    assert not reads


def test_a_reward_model_that_does_not_fit_the_policy_is_refused(fit, llama, project, reads):
    folder = changed_model(llama, project / "other", lambda tokenizer: None)
    vocabulary = Path(folder) / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"w3"', '"w?"').replace('"w4"', '"w3"').replace("w?", "w4"))
    reads.clear()
    reward = ("--model.reward=lit_rlhf.rewards.RewardModelScorer", f"--model.reward.model={folder}")
    assert_refused(fit("ppo.yaml", *reward), "has another tokenizer than the policy: the token 'w", folder)
    assert_refused(fit("ppo.yaml", f"--model.critic={folder}"), f"critic: '{folder}' has another tokenizer")
    assert_refused(fit("ppo.yaml", f"--model.reference={folder}"), f"reference: '{folder}' has another tokenizer")
    uncentered = ("--model.reward=lit_rlhf.rewards.RewardModelScorer", f"--model.reward.model={llama}")
    assert_refused(fit("ppo.yaml", *uncentered), "no centering constants", "CenterScores")
    assert not reads


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_an_adapter_that_does_not_fit_the_model_is_refused(recipe, fit, reads):
    for setting, *parts in (
        ("target_modules=[q_proj, k_prj]", "target_modules: 'k_prj' is no linear layer", "did you mean 'k_proj'?"),
        ("target_modules=[query_key_value]", "'query_key_value'", "there are q_proj, k_proj"),
        ("target_modules=q_proj", "model.adapter.target_modules is 'q_proj'", "a list of linear layers"),
        ("target_modules=[]", "model.adapter.target_modules is []", "'all-linear'"),
        ("rank=0", "model.adapter.rank is 0"),
    ):
        assert_refused(fit(f"{recipe}.yaml", f"--model.adapter.{setting}"), *parts)
    if recipe == "ppo":
        assert_refused(fit("ppo.yaml", "--model.adapter.dropout=0.1"), "model.adapter.dropout is 0.1: PPO needs 0")
    assert not reads


@pytest.mark.parametrize("recipe", ["sft", "ppo"])
def test_a_model_that_is_no_language_model_is_refused(recipe, fit, llama, project, reads):
    reward = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    reward.save_pretrained(project / "reward")
    AutoTokenizer.from_pretrained(llama).save_pretrained(project / "reward")
    reads.clear()
    assert_refused(fit(f"{recipe}.yaml", "--model.model=./reward"), "'./reward' is a LlamaForSequenceClassification")
    assert not reads


def test_sizes_that_do_not_divide_are_refused(fit, reads):
    assert_refused(
        fit("ppo.yaml", "--model.ppo.rollout_batch_size=10"),
        "rollout_batch_size 10 is not a multiple of the minibatch 4",
    )
    assert_refused(fit("ppo.yaml", "--model.ppo.micro_batch_size=0"), "ppo.micro_batch_size must be at least 1, got 0")
    assert_refused(fit("sft.yaml", "--data.micro_batch_size=0"), "micro_batch_size: 0 must be at least 1")
    assert not reads


def test_an_output_folder_that_cannot_be_written_is_refused(fit, project, reads):
    (project / "taken").write_text("")
    assert_refused(fit("sft.yaml", "--run_dir=taken/run"), "cannot write to the output folder taken/run")
    export = "{class_path: lit_rlhf.callbacks.ExportModel, init_args: {directory: ../taken/model}}"
    (project / "export.yaml").write_text(f"trainer: {{callbacks+: [{export}]}}")
    assert_refused(fit("sft.yaml", "-c", "export.yaml"), "cannot write to", "taken/model")
    assert not reads


@pytest.fixture
def checkpoint(fit: Fit, project: Path) -> str:
    """An SFT checkpoint."""
    assert fit("sft.yaml", "--trainer.max_epochs=1")[0] == 0
    return str(next(project.rglob("*.ckpt")))


@pytest.mark.parametrize("recipe", ["reward", "ppo"])
def test_a_checkpoint_of_another_module_is_refused(recipe, fit, checkpoint, reads):
    reads.clear()
    module = {"reward": "RewardModule", "ppo": "PPOModule"}[recipe]
    assert_refused(fit(f"{recipe}.yaml", f"--ckpt_path={checkpoint}"), "SFTModule", module)
    assert not reads


def test_a_missing_or_invalid_checkpoint_is_refused(fit, project, reads):
    (project / "text.ckpt").write_text("no checkpoint")
    assert_refused(fit("sft.yaml", "--ckpt_path=nowhere.ckpt"), "no checkpoint nowhere.ckpt")
    assert_refused(fit("sft.yaml", "--ckpt_path=text.ckpt"), "text.ckpt is no readable checkpoint")
    assert not reads


KEPT = (
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.dirpath=kept",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.callbacks.save_last=true",
)


def test_a_non_finite_reward_stops_and_keeps_the_last_checkpoint(fit, project):
    assert_refused(fit("ppo.yaml", "--model.reward.function=mine.nan", *KEPT), "8 of 8 scores at step 0 are not finite")
    assert not (project / "kept").exists()
    # the second iteration, of two steps each
    result = fit("ppo.yaml", "--model.reward.function=mine.later_infinite", *KEPT, "--overwrite")
    assert_refused(result, "1 of 8 scores at step 2 are not finite", "prompt")
    assert torch.load(project / "kept" / "last.ckpt", weights_only=True)["global_step"] == 2
    code, _, printed = fit("ppo.yaml", *KEPT, "--ckpt_path=kept/last.ckpt")
    assert code == 0, printed


def test_a_non_finite_loss_stops_and_keeps_the_last_checkpoint(fit, project):
    # at this learning rate the second loss overflows
    assert_refused(fit("sft.yaml", "--model.optimizer.lr=1e30", *KEPT), "the loss is nan at step 1 (epoch 0, batch 1)")
    saved = torch.load(project / "kept" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    code, _, printed = fit("sft.yaml", *KEPT, "--trainer.max_steps=1", "--ckpt_path=kept/last.ckpt")
    assert code == 0, printed


@pytest.mark.parametrize("name", ["warmup_iterations", "start_factor"])
def test_null_for_a_number_in_a_file_is_refused(name, fit, project):
    scheduler = {"class_path": "lit_rlhf.schedules.ConstantWithWarmup", "init_args": {name: None}}
    (project / "null.yaml").write_text(json.dumps({"model": {"init_args": {"scheduler": scheduler}}}))
    assert_refused(fit("sft.yaml", "-c", "null.yaml"), f"model.scheduler.{name}: expected float, got null")


def test_null_for_a_setting_that_may_be_missing_is_none(fit, project):
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"fused": None, "foreach": None}}
    (project / "null.yaml").write_text(json.dumps({"model": {"init_args": {"optimizer": optimizer}}}))
    assert fit("sft.yaml", "-c", "null.yaml")[0] == 0
