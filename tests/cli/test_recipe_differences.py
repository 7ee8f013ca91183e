"""The table of what differs from the recipe of a checkpoint."""

from typing import Any

from lit_rlhf.commands.support.recipe_differences import describe_differences, iter_settings


def differences(then: dict[str, Any], now: dict[str, Any], ranks: int = 1) -> list[list[str]]:
    """Return the rows of the table, without its two headings."""
    lines = describe_differences({"run": {"recipe": then, "ranks": 1}}, now, ranks)
    return [line.split() for line in lines[2:]]


def adam(**settings: Any) -> dict[str, Any]:
    return {"optimizer": {"class_path": "torch.optim.Adam", "init_args": settings}}


def callbacks(*entries: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"callbacks": [{"class_path": name, "init_args": settings} for name, settings in entries]}


def test_nothing_is_printed_if_nothing_differs():
    recipe = {"model": adam(lr=1.0), "seed_everything": 3}
    assert differences(recipe, recipe) == []
    assert differences(recipe | {"ckpt_path": None}, recipe | {"ckpt_path": "last"}) == []
    assert describe_differences({}, recipe, 1) == [], "not a checkpoint of the command"


def test_changed_new_and_missing_settings():
    assert differences({"a": {"b": 1, "c": None}, "d": [1, 2]}, {"a": {"b": 2.5, "e": True}, "d": [2]}) == [
        ["a.b", "1", "2.5"], ["a.c", "null", "–"], ["a.e", "–", "true"], ["d", "[1,", "2]", "[2]"]
    ]  # fmt: skip
    assert differences(adam(lr=1.0, betas=[0.1, 0.2]), adam(lr=1.0, betas=[0.1, 0.3])) == [
        ["optimizer.betas", "[0.1,", "0.2]", "[0.1,", "0.3]"]
    ]


def test_another_number_of_ranks_is_a_difference():
    assert differences({}, {}, ranks=2) == [["ranks", "1", "2"]]


def test_of_another_class_only_its_name_is_listed():
    then, now = (
        adam(lr=1.0),
        {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 2.0, "momentum": 0.9}}},
    )
    assert differences(then, now) == [["optimizer", "torch.optim.Adam", "torch.optim.SGD"]]


def test_entries_of_a_list_are_compared_by_class():
    then = callbacks(("x.A", {"n": 1}), ("x.B", {"n": 1}), ("x.A", {"n": 3}))
    now = callbacks(("x.C", {"n": 5}), ("x.A", {"n": 1}), ("x.A", {"n": 4}))
    assert differences(then, now) == [
        ["callbacks.A.2.n", "3", "4"], ["callbacks.B", "x.B", "–"], ["callbacks.C", "–", "x.C"]
    ]  # fmt: skip


def test_the_address_of_an_object_is_no_difference():
    assert differences({"a": "<x.Y object at 0x7f01>"}, {"a": "<x.Y object at 0x7f02>"}) == []


def test_a_long_value_is_shortened():
    (row,) = differences({"a": "x"}, {"a": "y" * 500})
    assert row == ["a", "x", "y" * 47 + "…"]


def test_every_setting_of_nested_values_has_a_name():
    value = {"a": {"class_path": "p.Q", "init_args": {"x": 1, "y": {"z": []}}}, "b": {}, "c": "text"}
    assert list(iter_settings(value)) == [("a", "class p.Q"), ("a.x", "1"), ("a.y.z", "[]"), ("c", "text")]
