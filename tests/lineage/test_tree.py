"""The tree of small files: every kind of change is named, by whom the file was used."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.hashing import hash_file
from lit_rlhf.lineage.fingerprints import describe_data_input, describe_model_input, hash_weight_files
from lit_rlhf.lineage.page import place_boxes, render_page
from lit_rlhf.lineage.records import Compute, Environment, LineageRecord, write_record
from lit_rlhf.lineage.text import WIDTH, describe_record, format_compute, format_seconds, format_tree, stages
from lit_rlhf.lineage.tree import Node, build_tree

STAGE_FLOPS = {"sft": 8.64e19, "reward": 2 * 8.64e19, "ppo": 3 * 8.64e19}


def write_model(folder: Path, weights: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)


def export(folder: Path, role: str, models: dict[str, Path], data: dict[str, Path], day: int) -> None:
    """Write a model and its record, as if `models` and `data` had been used for it."""
    inputs = tuple(describe_model_input(name, str(path), hash_file=hash_file) for name, path in models.items())
    rows = tuple(
        replace(describe_data_input(name, str(path), hash_file=hash_file), rows_kept=12) for name, path in data.items()
    )
    write_model(folder, role)
    compute = Compute("", f"2026-01-{day:02}T00:00:00+00:00", 60.0, 120.0, 1000, STAGE_FLOPS[role])
    record = LineageRecord(
        role,
        compute,
        hash_weight_files(folder, hash_file),
        inputs,
        rows,
        configs=(f"small/{role}",),
        command=f"lit-rlhf fit -c small/{role}",
        environment=Environment("0123456789", False, {"torch": "2"}, "1 x CPU"),
    )
    write_record(record, folder / "lineage.json")


@pytest.fixture
def procedure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base -> sft -> reward; sft, reward -> ppo; each stage with a data file."""
    monkeypatch.chdir(tmp_path)
    write_model(Path("base"), "base")
    for name in ("demonstrations", "rankings", "prompts"):
        Path(f"{name}.jsonl").write_text(name)
    sft, reward = Path("runs/sft/model"), Path("runs/reward/model")
    export(sft, "sft", {"starting model": Path("base")}, {"demonstrations": Path("demonstrations.jsonl")}, 1)
    export(reward, "reward", {"starting model": sft}, {"rankings": Path("rankings.jsonl")}, 2)
    models = {"starting policy": sft, "reference policy": sft, "reward model 1": reward}
    export(Path("runs/ppo/model"), "ppo", models, {"prompts": Path("prompts.jsonl")}, 3)
    return tmp_path


def problems(tree: Node) -> list[str]:
    return list(dict.fromkeys(problem for node in tree.walk() for problem in node.problems))


def test_the_tree_leads_back_to_base_model_and_data(procedure: Path) -> None:
    tree = build_tree(Path("runs/ppo/model"))
    assert problems(tree) == []
    assert format_tree(tree) == (
        "ppo: runs/ppo/model\n"
        "│  ppo · 2026-01-03 · 60 s · 0123456 · small/ppo\n"
        "├─ starting policy: runs/sft/model\n"
        "│  │  sft · 2026-01-01 · 60 s · 0123456 · small/sft\n"
        "│  ├─ starting model: base\n"
        "│  └─ demonstrations: demonstrations.jsonl\n"
        "│        12 rows\n"
        "├─ reference policy: runs/sft/model\n"
        "│     as above\n"
        "├─ reward model 1: runs/reward/model\n"
        "│  │  reward · 2026-01-02 · 60 s · 0123456 · small/reward\n"
        "│  ├─ starting model: runs/sft/model\n"
        "│  │     as above\n"
        "│  └─ rankings: rankings.jsonl\n"
        "│        12 rows\n"
        "└─ prompts: prompts.jsonl\n"
        "      12 rows"
    )


Change = Callable[[], object]
CHANGES: dict[str, tuple[Change, str]] = {
    "weights of the reward model": (
        lambda: Path("runs/reward/model/model.safetensors").write_text("Reward"),
        "changed since it was used for runs/ppo/model: runs/reward/model/model.safetensors",
    ),
    "config of the base model": (
        lambda: Path("base/config.json").write_text("{ }"),
        "changed since it was used for runs/sft/model: base/config.json",
    ),
    "data": (
        lambda: Path("rankings.jsonl").write_text("Rankings"),
        "changed since it was used for runs/reward/model: rankings.jsonl",
    ),
    "data is missing": (lambda: Path("prompts.jsonl").unlink(), "missing: prompts.jsonl"),
    "weights are missing": (
        lambda: Path("base/model.safetensors").unlink(),
        "missing: base/model.safetensors",
    ),
    "weights are added": (
        lambda: Path("base/adapter.safetensors").write_text("x"),
        "added since it was used for runs/sft/model: base/adapter.safetensors",
    ),
    "own weights": (
        lambda: Path("runs/ppo/model/model.safetensors").write_text("Ppo"),
        "changed since it was written: runs/ppo/model/model.safetensors",
    ),
    "a lineage": (
        lambda: Path("runs/reward/model/lineage.json").write_text(
            Path("runs/reward/model/lineage.json").read_text().replace("small/reward", "other")
        ),
        "its lineage.json is another than when it was used for runs/ppo/model: runs/reward/model",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_no_longer_matches_is_named(kind: str, procedure: Path) -> None:
    change, message = CHANGES[kind]
    change()
    tree = build_tree(Path("runs/ppo/model"))
    assert problems(tree) == [message]
    assert message in render_page(tree) and "changed" in render_page(tree)


def test_a_model_that_was_trained_again_between_two_uses_is_named(procedure: Path) -> None:
    """The policy is the new SFT model, the reward model came from the old one: the tree shows it at its first place."""
    export(
        Path("runs/sft/model"),
        "sft",
        {"starting model": Path("base")},
        {"demonstrations": Path("demonstrations.jsonl")},
        4,
    )
    Path("runs/sft/model/model.safetensors").write_text("sft, again")
    models = {"starting policy": Path("runs/sft/model"), "reward model 1": Path("runs/reward/model")}
    export(Path("runs/ppo/model"), "ppo", models, {"prompts": Path("prompts.jsonl")}, 5)
    assert problems(build_tree(Path("runs/ppo/model"))) == [
        "changed since it was used for runs/reward/model: runs/sft/model/model.safetensors"
    ]


def test_a_tree_that_is_moved_as_one_still_matches(procedure: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = procedure.with_name(f"{procedure.name}-moved")
    monkeypatch.chdir(procedure.parent)
    procedure.rename(moved)
    tree = build_tree(moved / "runs/ppo/model")
    assert problems(tree) == [] and len(list(tree.walk())) == 9
    moved.rename(procedure)


def test_a_model_that_was_copied_alone_finds_its_inputs_where_the_settings_name_them(procedure: Path) -> None:
    shutil.copytree("runs/ppo/model", procedure / "far" / "from" / "here" / "model")
    assert problems(build_tree(Path("far/from/here/model"))) == []


def test_a_stage_that_is_named_by_two_paths_counts_once(procedure: Path) -> None:
    models = {"starting policy": Path("runs/sft/model"), "reference policy": Path("runs/sft/model").resolve()}
    export(Path("runs/ppo/model"), "ppo", models, {"prompts": Path("prompts.jsonl")}, 3)
    tree = build_tree(Path("runs/ppo/model"))
    assert [node.record.role for node in stages(tree) if node.record] == ["sft", "ppo"]


def test_uncommitted_changes_are_said() -> None:
    record = LineageRecord("sft", Compute("", ""), environment=Environment("0123456789", True))
    assert describe_record(record) == ["sft", "0123456+changes"]


def test_lines_keep_to_the_width(procedure: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = Path("runs") / ("a" * 60) / ("b" * 60) / "model"
    export(deep, "ppo", {"starting policy": Path("runs/sft/model")}, {"prompts": Path("prompts.jsonl")}, 6)
    further = Path("model")
    export(further, "ppo", {"starting policy": deep, "reward model 1": Path("runs/reward/model")}, {}, 7)
    Path("base/model.safetensors").write_text("changed")
    tree = build_tree(further)
    text = format_tree(tree) + "\n" + format_compute(tree)
    assert max(map(len, text.split("\n"))) == WIDTH and "…" in text


def test_the_compute_is_the_sum_over_the_stages_each_once(procedure: Path) -> None:
    tree = build_tree(Path("runs/ppo/model"))
    assert [node.record.role for node in stages(tree) if node.record] == ["sft", "reward", "ppo"]
    lines = [line.split() for line in format_compute(tree).splitlines()]
    assert [line[:2] for line in lines[1:]] == [["sft", "1"], ["reward", "2"], ["ppo", "3"], ["sum", "6"]]
    assert lines[-1] == ["sum", "6", "6.0", "min"]


def test_a_stage_that_was_not_counted_is_said() -> None:
    node = Node("sft", "x", LineageRecord("sft", Compute("", "")))
    assert format_compute(node).endswith("a stage without a number was not counted")


def test_every_edge_of_the_drawing_leads_to_the_right(procedure: Path) -> None:
    boxes = place_boxes(build_tree(Path("runs/ppo/model")))
    assert len(boxes) == 7
    for box in boxes.values():
        assert all(boxes[path].x < box.x for path in box.parents)
    places = [(box.x, box.y) for box in boxes.values()]
    assert len(set(places)) == len(places)


def test_the_page_is_self_contained_and_escapes(procedure: Path) -> None:
    Path("<b>.jsonl").write_text("x")
    export(Path("odd"), "ppo", {}, {"prompts": Path("<b>.jsonl")}, 8)
    page = render_page(build_tree(Path("odd")))
    assert "<b>" not in page and "&lt;b&gt;.jsonl" in page
    assert "src=" not in page and "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_what_has_no_lineage_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no"):
        build_tree(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no lineage\.json"):
        build_tree(tmp_path)


@pytest.mark.parametrize(
    "seconds, text", [(None, ""), (0.5, "0.5 s"), (99, "99 s"), (100, "1.7 min"), (5970, "99.5 min"), (6000, "1.7 h")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text
