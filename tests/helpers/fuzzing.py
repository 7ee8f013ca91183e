"""Valid inputs of every command, and seeded ways to break one of them."""

import hashlib
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.helpers.small_runs import demonstrations, rankings, write_rows

# values of another type, of no type, and out of any range
VALUES = (None, True, [], {}, "text", "", -1, 0, 0.5, 10**30, math.nan, -math.inf, [1, 2], {"a": 1}, "../x", ["\udcff"])
REWARD = "def words(prompts, responses, rows):\n    return [len(response.split()) for response in responses]\n"


class Case(NamedTuple):
    """A command: its arguments, and the inputs that it reads."""

    args: list[str]
    inputs: list[str]


FIT = ["--run_dir=out", "--trainer.fast_dev_run=false", "--trainer.max_epochs=1", "--trainer.max_steps=1"]
PPO = [*FIT[:-1], "--model.ppo.rollout_batch_size=4"]
SAMPLE = ["--n=2", "--max-new-tokens=3", "--out=best.jsonl"]
POLICY = ["model/config.json", "model/tokenizer.json", "model/tokenizer_config.json", "model/model.safetensors"]
SCORER = [name.replace("model/", "reward_model/", 1) for name in POLICY]
GENERATION = "model/generation_config.json"
CASES = {
    "sft": Case(["fit", "-c", "sft.yaml", *FIT], ["sft.yaml", "demonstrations.jsonl", *POLICY]),
    "reward": Case(["fit", "-c", "reward.yaml", *FIT], ["reward.yaml", "rankings.jsonl", *POLICY]),
    "ppo": Case(["fit", "-c", "ppo.yaml", *PPO], ["ppo.yaml", "prompts.jsonl", GENERATION, *POLICY, *SCORER]),
    "resume": Case(
        ["fit", "-c", "sft.yaml", *FIT[:-2], "--trainer.max_epochs=2", "--ckpt_path=last.ckpt"],
        ["sft.yaml", "demonstrations.jsonl", "last.ckpt"],
    ),
    "validate": Case(
        ["validate", "-c", "sft.yaml", "--run_dir=out", "--ckpt_path=last.ckpt"],
        ["sft.yaml", "demonstrations.jsonl", "last.ckpt", "model/config.json", "model/tokenizer.json"],
    ),
    "plan": Case(["plan", "-c", "ppo.yaml", "--gpu=h100-80gb"], ["ppo.yaml", "model/config.json"]),
    "export": Case(["export", "last.ckpt", "out"], ["last.ckpt"]),
    "generate": Case(["generate", "--model=model", "--prompt=w1 w2", "--max-new-tokens=3"], [GENERATION, *POLICY]),
    "rank": Case(["rank", "--model=reward_model", "rankings.jsonl", "--out=best.jsonl"], ["rankings.jsonl", *SCORER]),
    "best-of-n": Case(
        ["best-of-n", "--model=model", "--reward=./reward_model", "--prompts=prompts.jsonl", *SAMPLE],
        ["prompts.jsonl", GENERATION, *POLICY, *SCORER],
    ),
    "evaluate": Case(
        ["evaluate", "-c", "evaluate.yaml", "--progress=false"],
        ["evaluate.yaml", "prompts.jsonl", GENERATION, *POLICY, *SCORER],
    ),
    "sweep": Case(
        ["sweep", "-c", "sft.yaml", *FIT[1:], "--over=model.optimizer.lr=0.1", "--out=out"],
        ["sft.yaml", "demonstrations.jsonl"],
    ),
    "recipes": Case(["recipes", "cp", "quickstart/sft", "best.jsonl"], []),
    "labelers": Case(["labelers", "agreement", "rankings.jsonl", "--out=best.jsonl"], ["rankings.jsonl"]),
}
SETTINGS = ("model", "data", "trainer", "suites", "baseline", "seed", "out", "optimizer", "scheduler", "argument")
OUTPUTS = ("out", "best.jsonl", "best.jsonl.lineage.json", "best.curve.json")


def write_inputs(folder: Path, policy: str, scorer: str, checkpoint: Path | None) -> None:
    """Write the valid inputs of all commands: recipes, data, a policy, a reward model and a checkpoint."""
    shutil.copytree(policy, folder / "model")
    shutil.copytree(scorer, folder / "reward_model")
    if checkpoint is not None:
        shutil.copy(checkpoint, folder / "last.ckpt")
    (folder / "fuzz_reward.py").write_text(REWARD)
    write_rows(folder / "demonstrations.jsonl", demonstrations(8))
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"], "use_case": "a"} for row in demonstrations(4)])
    names = ("anna", "bert")
    rows = [{**row, "labeler": names[i // 4]} for i, row in enumerate(rankings(4) * 2)]
    write_rows(folder / "rankings.jsonl", rows)
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "betas": [0.9, 0.95]}}
    trainer = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    scheduler = {"class_path": "lit_rlhf.schedules.ConstantWithWarmup", "init_args": {"warmup_iterations": 2}}
    sft = {"model": "model", "optimizer": optimizer, "scheduler": scheduler}
    reward = {"class_path": "lit_rlhf.rewards.RewardModelScorer", "init_args": {"model": "reward_model"}}
    ppo = {
        "model": "model",
        "reward": {**reward, "init_args": {**reward["init_args"], "require_centered": False}},
        "sampling": {"max_new_tokens": 3, "temperature": 1.0},
        "ppo": {"rollout_batch_size": 4, "micro_batch_size": 2},
        "optimizer": optimizer,
    }
    batches = {"micro_batch_size": 4, "validation_path": "demonstrations.jsonl"}
    export = [{"class_path": "lit_rlhf.callbacks.ExportModel"}]
    for name, module, settings, data, given in (
        ("sft", "SFTModule", sft, "DemonstrationDataModule", {"path": "demonstrations.jsonl", **batches}),
        ("reward", "RewardModule", sft, "ComparisonDataModule", {"path": "rankings.jsonl", "micro_batch_size": 4}),
        ("ppo", "PPOModule", ppo, "PromptDataModule", {"path": "prompts.jsonl"}),
    ):
        recipe = {
            "seed_everything": 1,
            "model": {"class_path": f"lit_rlhf.modules.{module}", "init_args": settings},
            "data": {"class_path": f"lit_rlhf.data.{data}", "init_args": given},
            "trainer": {**trainer, "callbacks": export},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    judge = {"class_path": "lit_rlhf.evaluation.RewardModelJudge", "init_args": {"model": "reward_model"}}
    suite = {"path": "prompts.jsonl", "judges": {"scorer": judge}, "max_new_tokens": 3}
    evaluation = {
        "models": {"base": {"path": "model"}, "same": {"path": "model"}},
        "baseline": "base",
        "suites": {"quality": {"class_path": "lit_rlhf.evaluation.PairwisePreference", "init_args": suite}},
        "out": "out",
        "seed": 0,
    }
    (folder / "evaluate.yaml").write_text(yaml.safe_dump(evaluation, sort_keys=False))


def hash_files(folder: Path) -> dict[str, str]:
    """Return the hash of every file but outputs, byte code and caches of imports."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in (*OUTPUTS, "__pycache__")
    }


class Breakage(NamedTuple):
    """What was broken: the words of which a message must contain one, and whether the input is invalid for sure."""

    what: str
    names: tuple[str, ...]
    invalid: bool


def break_one(draw: int, folder: Path, name: str) -> tuple[list[str], Breakage]:
    """Break one input of a command, or its arguments; return the arguments and what was broken."""
    generator = random.Random(draw)
    case = CASES[name]
    target = generator.choice([*case.inputs, "arguments", "arguments"] if case.inputs else ["arguments"])
    if target == "arguments":
        return break_arguments(generator, case.args)
    path = folder / target
    kinds = {".yaml": YAML, ".json": JSON, ".jsonl": ROWS, ".safetensors": WEIGHTS, ".ckpt": CHECKPOINT}[path.suffix]
    kind = generator.choice(kinds)
    what, invalid = kind(generator, path)
    names = (target, Path(target).parts[0], *(SETTINGS if path.suffix == ".yaml" else ()))
    return case.args, Breakage(f"{target}: {kind.__name__} {what}", names, invalid)


def break_arguments(generator: random.Random, args: list[str]) -> tuple[list[str], Breakage]:
    """Misspell, repeat, remove or empty an argument, or give it a value of another kind."""
    args, at = list(args), generator.randrange(len(args))
    word = args[at]
    kind = generator.choice(["misspelled", "removed", "repeated", "empty", "value"])
    key, equals, _ = word.partition("=")
    if kind == "misspelled":
        args[at] = misspell(generator, key) + word[len(key) :]
    elif kind == "removed":
        del args[at]
    elif kind == "repeated":
        args.insert(at, word)
    elif kind == "empty":
        args[at] = key + equals if equals else ""
    else:
        value = generator.choice(["abc", "-1", "1e999", "nan", "[", "{a: }", "null", "0", "\udcff", "a\nb", "1" * 40])
        args[at] = f"{key}={value}" if equals else value
    names = tuple(
        part
        for part in (word, key, key.lstrip("-"), args[at] if at < len(args) else "", *args[at - 1 : at], args[0])
        if part
    )
    # a file of another name is a file too, where it is written
    invalid = kind == "misspelled" and word not in ("out", "best.jsonl")
    return args, Breakage(f"arguments: {word!r} {kind}: {args}", (*names, "argument", "command", *SETTINGS), invalid)


def misspell(generator: random.Random, word: str) -> str:
    """Repeat, drop or swap a letter."""
    at = generator.choice([i for i, letter in enumerate(word) if letter.isalpha()])
    if len(word) > 3 and generator.random() < 0.5:
        return word[:at] + word[at + 1 :]
    return word[:at] + word[at] + word[at:]


def list_paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every entry of nested dicts and lists, at most 20 of each list."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    return [found for key, each in entries for found in [(*path, key), *list_paths(each, (*path, key))]]


def parent_of(value: Any, path: tuple[Any, ...]) -> Any:
    """Return what holds the entry at a path."""
    for key in path[:-1]:
        value = value[key]
    return value


def remove_entry(generator: random.Random, value: Any) -> str:
    """Remove an entry of nested dicts and lists."""
    path = generator.choice(list_paths(value))
    del parent_of(value, path)[path[-1]]
    return f"{path} removed"


def change_entry(generator: random.Random, value: Any) -> str:
    """Give an entry of nested dicts and lists a value of another type."""
    path, new = generator.choice(list_paths(value)), generator.choice(VALUES)
    parent_of(value, path)[path[-1]] = new
    return f"{path} = {new!r}"


def cut_file(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Keep the first bytes of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: generator.randrange(len(data) - 2)])
    return f"to {path.stat().st_size} of {len(data)} bytes", path.suffix not in (".yaml", ".jsonl")


def flip_bytes(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Flip bits of one to three bytes; of a binary file often in its header."""
    data = bytearray(path.read_bytes())
    places = []
    for _ in range(generator.randint(1, 3)):
        end = len(data) if path.suffix not in (".safetensors", ".ckpt") or generator.random() < 0.5 else 300
        places.append(generator.randrange(min(end, len(data))))
        data[places[-1]] ^= 1 << generator.randrange(8)
    path.write_bytes(data)
    return f"at {places}", False


def empty_file(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Leave a file of no bytes."""
    path.write_bytes(b"")
    return "", True


def remove_file(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Remove the file; tokenizer_config.json and generation_config.json are optional."""
    path.unlink()
    return "", path.name not in ("tokenizer_config.json", "generation_config.json")


def make_folder(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Put an empty folder in the place of the file."""
    path.unlink()
    path.mkdir()
    return "", path.name not in ("tokenizer_config.json", "generation_config.json")


def other_encoding(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Write the text in another encoding."""
    encoding = generator.choice(["utf-16", "utf-32", "utf-8-sig"])
    path.write_bytes(path.read_text().encode(encoding))
    return encoding, False


def remove_json(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Remove a field of a JSON file."""
    value = json.loads(path.read_text())
    what = remove_entry(generator, value)
    path.write_text(json.dumps(value))
    return what, False


def change_json(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Change a field of a JSON file to another type."""
    value = json.loads(path.read_text())
    what = change_entry(generator, value)
    path.write_text(json.dumps(value))
    return what, False


def wrap_json(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Make the JSON file a list or a text."""
    path.write_text(generator.choice(["[]", "null", '"text"', "[{}]", "{}", "17", "NaN"]))
    return path.read_text(), path.name in ("config.json", "tokenizer.json")


def remove_setting(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Remove a setting of a recipe."""
    value = yaml.safe_load(path.read_text())
    what = remove_entry(generator, value)
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return what, False


def change_setting(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Change a setting of a recipe to another type."""
    value = yaml.safe_load(path.read_text())
    what = change_entry(generator, value)
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return what, False


def misspell_setting(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Misspell a key; names that the user chooses (of models, suites and judges) are no settings."""
    lines = path.read_text().splitlines()
    free = ("base", "same", "quality", "scorer")
    keys = [i for i, line in enumerate(lines) if (key := re.match(r"[\s-]*(\w+):", line)) and key[1] not in free]
    at = generator.choice(keys)
    key = re.match(r"[\s-]*(\w+):", lines[at])
    assert key
    lines[at] = lines[at].replace(key[1], misspell(generator, key[1]), 1)
    path.write_text("\n".join(lines) + "\n")
    return lines[at].strip(), True


def repeat_setting(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Write a key with its value twice."""
    lines = path.read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if re.match(r"\s*\w+: \S", line)]
    at = generator.choice(keys)
    lines.insert(at, lines[at])
    path.write_text("\n".join(lines) + "\n")
    return lines[at].strip(), True


def break_indentation(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Indent a line by one space or a tab more or less."""
    lines = path.read_text().splitlines()
    at = generator.randrange(len(lines))
    lines[at] = generator.choice([" ", "\t", "   "]) + lines[at] if generator.random() < 0.6 else lines[at].lstrip()
    path.write_text("\n".join(lines) + "\n")
    return repr(lines[at]), False


def change_row(generator: random.Random, path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change one row of JSON lines."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[generator.randrange(len(rows))])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def remove_column(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Remove a field of one row."""
    gone = []
    change_row(generator, path, lambda row: gone.append(field := generator.choice(list(row))) or row.pop(field))
    return str(gone), False


def change_column(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Change a field of one row to another type."""
    what = []
    change_row(generator, path, lambda row: what.append(change_entry(generator, row)))
    return str(what), False


def misspell_column(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Misspell a field of one row."""
    what = []

    def change(row: dict[str, Any]) -> None:
        field = generator.choice(list(row))
        what.append(misspell(generator, field))
        row[what[0]] = row.pop(field)

    change_row(generator, path, change)
    return str(what), False


def half_surrogate(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Put half of a character of two code units in the prompt of a row."""
    change_row(generator, path, lambda row: row.update(prompt=row["prompt"] + " \ud83d"))
    return "", True


def cut_line(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Cut one line in its middle."""
    lines = path.read_text().splitlines()
    at = generator.randrange(len(lines))
    lines[at] = lines[at][: generator.randrange(1, len(lines[at]))]
    path.write_text("\n".join(lines) + "\n")
    return lines[at], True


def change_tensor(generator: random.Random, tensors: dict[str, Any]) -> tuple[str, bool]:
    """Remove, rename, transpose or cut a tensor, or put NaN in it."""
    name = generator.choice([name for name, value in tensors.items() if isinstance(value, torch.Tensor)])
    kind = generator.choice(["removed", "renamed", "cut", "NaN", "integers", "complex"])
    tensor = tensors.pop(name)
    if kind == "renamed":
        tensors[misspell(generator, name)] = tensor
    elif kind == "cut":
        tensors[name] = tensor[: len(tensor) // 2].clone() if tensor.dim() else tensor.reshape(1)
    elif kind == "NaN":
        tensors[name] = torch.full_like(tensor, math.nan)
    elif kind == "integers":
        tensors[name] = tensor.to(torch.int64)
    elif kind == "complex":
        tensors[name] = tensor.to(torch.complex64)
    return f"{name} {kind}", True


def change_weight(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Change a tensor of a weights file."""
    tensors = load_file(path)
    what, invalid = change_tensor(generator, tensors)
    save_file(tensors, path, {"format": "pt"})
    return what, invalid


def change_checkpoint(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Change a tensor of the weights in a checkpoint."""
    content = torch.load(path, weights_only=False)
    what, invalid = change_tensor(generator, content["state_dict"])
    torch.save(content, path)
    return what, invalid


def change_checkpoint_entry(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Remove an entry of a checkpoint, or change its type."""
    content = torch.load(path, weights_only=False)
    change = generator.choice([remove_entry, change_entry])
    part = generator.choice([content, content["hyper_parameters"]]) if "hyper_parameters" in content else content
    names = dict.fromkeys(part)
    if change is remove_entry:
        what = remove_entry(generator, names)
        for key in set(part) - set(names):
            del part[key]
    else:
        what = change_entry(generator, names)
        part.update({key: value for key, value in names.items() if f"({key!r},) = " in what})
    torch.save(content, path)
    return what, False


ANY = (cut_file, flip_bytes, empty_file, remove_file, make_folder)
Kind = Callable[[random.Random, Path], tuple[str, bool]]
YAML: tuple[Kind, ...] = (
    *(remove_setting, change_setting, change_setting, misspell_setting, repeat_setting, break_indentation),
    *(flip_bytes, cut_file, empty_file, other_encoding),
)
JSON: tuple[Kind, ...] = (*ANY, remove_json, change_json, change_json, wrap_json, other_encoding)
ROWS: tuple[Kind, ...] = (
    *(*ANY, remove_column, change_column, change_column, misspell_column, half_surrogate, cut_line, other_encoding),
)
WEIGHTS: tuple[Kind, ...] = (*ANY, flip_bytes, change_weight, change_weight)
CHECKPOINT: tuple[Kind, ...] = (*ANY, flip_bytes, change_checkpoint, change_checkpoint_entry, change_checkpoint_entry)
