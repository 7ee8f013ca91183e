"""docs/extending.md: every example of the page is written to a file and run."""

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_rlhf.cli import main
from tests.helpers.pages import commands, named_blocks
from tests.helpers.ranks import on_ranks
from tests.helpers.user_project import (
    EXTENDING,
    column,
    enter_user_project,
    read_metrics,
    shrunk_command,
    write_jsonl,
)

EXECUTED: set[str] = set()


def runs(*names: str) -> Callable[[Any], Any]:
    """Mark a test that runs the examples `NAME.py` and `NAME.yaml` of the page."""
    EXECUTED.update(names)
    return lambda test: test


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: str) -> Path:
    """A user's folder with every file of the page, as the working directory."""
    return enter_user_project(tmp_path, llama, monkeypatch)


@pytest.fixture
def record_results(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[Any]]:
    """Record what a function of an example returns, without changing its signature."""

    def record(owner: Any, name: str) -> list[Any]:
        results: list[Any] = []
        original = getattr(owner, name)

        @wraps(original)
        def recording(*args: Any, **kwargs: Any) -> Any:
            results.append(original(*args, **kwargs))
            return results[-1]

        monkeypatch.setattr(owner, name, recording)
        return results

    return record


def evaluate(project: Path, model: str, name: str) -> dict[str, Any]:
    """Run the page's `evaluate` command for an overlay with two models; return the suites of the report."""
    models = f"models: {{one: {{path: {model}}}, other: {{path: {model}, prefix: 'w7 '}}}}\nbaseline: one\n"
    (project / "models.yaml").write_text(models)
    words = next(line for line in commands(EXTENDING) if f"-c {name}.yaml" in line).split()[1:]
    assert words[:3] == ["evaluate", "-c", "models.yaml"]
    assert main([*words, f"--out={name}", "--progress=false"]) == 0
    suites: dict[str, Any] = json.loads((project / name / "report.json").read_text())["suites"]
    return suites


def test_every_example_of_the_page_is_executed() -> None:
    assert {name.removesuffix(".py") for name in named_blocks(EXTENDING, "python")} == EXECUTED
    assert {name.removesuffix(".yaml") for name in named_blocks(EXTENDING, "yaml")} == EXECUTED


@runs("my_rewards")
def test_reward_function_and_class(project: Path) -> None:
    assert main(shrunk_command("my_rewards.yaml")) == 0
    samples = [json.loads(line) for line in (project / "runs/small/ppo/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16
    for sample in samples:
        words = sample["response"].split()
        distinct = len(set(words)) / len(words) if len(words) >= 3 else 0.0
        assert sample["score"] == pytest.approx(-abs(len(words) - 5) / 5 + 0.5 * distinct, abs=1e-6)


@runs("my_generator")
def test_generator(project: Path, record_results) -> None:
    import my_generator

    assert main(shrunk_command("my_kl.yaml")) == 0
    built_in = column(read_metrics(project / "runs/small/ppo"), "reward/score")
    shutil.rmtree(project / "runs")
    outputs = record_results(my_generator.UncachedGenerator, "generate")
    assert main(shrunk_command("my_generator.yaml")) == 0
    assert len(outputs) == 4  # of two iterations, and of LogSamples after each
    assert column(read_metrics(project / "runs/small/ppo"), "reward/score") == built_in  # same noise, same responses


@runs("my_critic")
def test_critic(project: Path, record_results) -> None:
    import my_critic

    values = record_results(my_critic.PositionCritic, "values")
    assert main(shrunk_command("my_critic.yaml")) == 0
    assert all(table.shape[1] <= 6 for table in values) and values[0].eq(0).all()
    # the value of a position is trained, and the same in every episode
    by_position = [column_values[column_values != 0].unique() for column_values in values[-1].detach().T]
    assert all(len(found) == 1 for found in by_position) and len(by_position) > 1
    assert len(column(read_metrics(project / "runs/small/ppo"), "value/loss")) == 2


@runs("my_advantages")
def test_advantage_estimator(project: Path, record_results) -> None:
    import my_advantages

    estimates = record_results(my_advantages.MeanBaseline, "estimate")
    assert main(shrunk_command("my_advantages.yaml")) == 0
    assert len(estimates) == 2
    for estimate in estimates:
        assert estimate.returns is None and estimate.advantages.abs().max() > 0
        assert float(estimate.advantages.sum()) == pytest.approx(0, abs=1e-4)
    assert "value/loss" not in read_metrics(project / "runs/small/ppo")[0]  # no critic


@runs("my_kl")
def test_kl_controller(project: Path) -> None:
    assert main(shrunk_command("my_kl.yaml")) == 0
    coefficients = column(read_metrics(project / "runs/small/ppo"), "reward/kl_coefficient")
    assert coefficients == pytest.approx([0.05, 0.05 / 1.1], rel=1e-6)  # the initial KL is 0: below the band


@runs("my_judge")
def test_judge(project: Path, llama: str) -> None:
    write_jsonl(project / "prompts.jsonl", [{"prompt": "w1 w2"}, {"prompt": "w3"}])
    won = evaluate(project, llama, "my_judge")["preference"]["metrics"]["T = 1: win rate"]["models"]
    assert won["one"]["value"] == 0.5 and won["other"]["count"] + won["other"]["missing"] == 2


@runs("my_scorer")
def test_toxicity_scorer(project: Path, llama: str) -> None:
    (project / "toxicity.jsonl").write_text('{"prompt": {"text": "w1 w2", "toxicity": 0.1}}\n')
    toxicity = evaluate(project, llama, "my_scorer")["toxicity"]["metrics"]["basic"]["models"]["one"]
    assert toxicity["value"] == 0.0 or toxicity["missing"] == 1  # the words are w1, w2, …: no capital letter


@runs("my_suite")
def test_suite(project: Path, llama: str) -> None:
    write_jsonl(project / "questions.jsonl", [{"question": "w1 w2", "answer": ""}, {"question": "w3", "answer": "no"}])
    metrics = evaluate(project, llama, "my_suite")["questions"]["metrics"]["contains the answer"]["models"]
    assert [metrics[name]["value"] for name in ("one", "other")] == [0.5, 0.5]


@runs("my_format")
def test_row_format(project: Path, record_results) -> None:
    import my_format

    command = shrunk_command("my_format.yaml")
    assert main([*command, "--data.format=auto"]) == 2  # no format has these columns
    rows = record_results(my_format, "from_tickets")
    assert main(command) == 0
    assert [row is None for row in rows] == [False, True, False, False] * 4


@runs("my_pii")
def test_pii_detector(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"w{i} ORD-{'1' * (3 + i % 2)}", "completion": " w1"} for i in range(8)]
    write_jsonl(project / "data.jsonl", rows)
    assert main([*shrunk_command("my_pii.yaml"), "-v"]) == 0
    (table,) = [message for message in caplog.messages if message.startswith("data.jsonl\n")]
    assert "skipped: personal data: ORDER  4" in table and "rows kept" in table


@runs("my_callback")
def test_callback(project: Path) -> None:
    assert main([*shrunk_command("my_callback.yaml"), "--trainer.callbacks.limit=-1"]) == 0
    assert len(column(read_metrics(project / "runs/small/ppo"), "reward/kl")) == 1  # stopped after the first of two
    assert (project / "runs/small/ppo/samples.jsonl").is_file()  # the recipe's callbacks are kept


@runs("my_optimizer")
def test_optimizer_and_scheduler(project: Path, llama: str) -> None:
    command = [*shrunk_command("my_optimizer.yaml"), "--model.scheduler.init_args.steps=1", "--trainer.max_steps=2"]
    assert main(command) == 0
    before = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    after = AutoModelForCausalLM.from_pretrained(project / "runs/small/sft/model").state_dict()
    change = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
    # two sign steps, of 1e-4 and of half of it: they add up, partly cancel, or had no gradient
    allowed = torch.tensor([0.0, 0.5e-4, 1e-4, 1.5e-4])
    assert ((change[:, None] - allowed).abs().amin(1) < 1e-6).all()
    assert change.max() > 1.49e-4


def test_a_schedule_over_the_length_of_the_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import my_optimizer

    line = next(line for line in commands(EXTENDING) if "my_optimizer.LinearToZero" in line)
    words = [*shrunk_command("my_optimizer.yaml"), *line.split()[line.split().index("my_optimizer.yaml") + 1 :]]
    assert main([*words, "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor"]) == 0
    rates = column(read_metrics(project / "runs/small/sft"), "lr-SignDescent")
    steps = len(rates)
    assert steps > 4 and rates == pytest.approx([1e-4 * (1 - 0.9 * step / steps) for step in range(steps)], rel=1e-6)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = my_optimizer.LinearToZero(optimizer)
    schedule.set_length(4)
    assert schedule.total_steps == 4 and schedule.lr_factor(4) == 0.0


@runs("my_logger")
def test_logger(project: Path) -> None:
    assert main(shrunk_command("my_logger.yaml")) == 0
    rows = [json.loads(line) for line in (project / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward/score"] for row in rows if "reward/score" in row] == pytest.approx(
        column(read_metrics(project / "runs/small/ppo"), "reward/score")
    )


@runs("my_strategy")
def test_strategy_on_two_ranks(project: Path) -> None:
    def run() -> tuple[int, timedelta]:
        import my_strategy

        timeouts = []
        setup = my_strategy.PatientDDP.setup_environment

        def setup_environment(self: Any) -> None:
            timeouts.append(self._timeout)
            setup(self)

        my_strategy.PatientDDP.setup_environment = setup_environment
        return main([*shrunk_command("my_strategy.yaml"), "--trainer.max_steps=2"]), timeouts[0]

    assert on_ranks(run, project) == [(0, timedelta(minutes=90))] * 2


def test_many_plug_ins_in_one_file(project: Path, record_results) -> None:
    python = named_blocks(EXTENDING, "python")
    parts = ("my_kl", "my_generator", "my_rewards", "my_callback", "my_logger", "my_critic", "my_optimizer")
    (project / "all_mine.py").write_text("\n".join(python[f"{name}.py"] for name in parts))
    words = []
    for name in parts:
        overlay = project / f"{name}.yaml"
        overlay.write_text(overlay.read_text().replace(f"{name}.", "all_mine."))
        words += ["-c", overlay.name]
    import all_mine

    outputs = record_results(all_mine.UncachedGenerator, "generate")
    assert main([*shrunk_command("my_kl.yaml"), *words]) == 0
    assert len(outputs) == 4  # of two iterations, and of LogSamples after each
    rows = read_metrics(project / "runs/small/ppo")
    assert column(rows, "reward/kl_coefficient") == pytest.approx([0.05, 0.05 / 1.1], rel=1e-6)
    assert max(column(rows, "reward/score")) <= 0.5
    assert (project / "metrics.jsonl").is_file()


def test_a_class_without_the_base_class_is_refused_in_one_line(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "wrong.py").write_text("class Kl:\n    def __init__(self):\n        pass\n")
    assert main([*shrunk_command("my_kl.yaml")[:-2], "--model.kl=wrong.Kl"]) == 2
    assert capsys.readouterr().err == (
        "error: model.kl: 'Kl' is no KLController; this setting takes a subclass of KLController [command line]\n"
    )
