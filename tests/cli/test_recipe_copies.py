"""Copies of shipped recipes with other texts in them."""

from pathlib import Path

from lit_rlhf.commands.recipes import shipped_recipes
from lit_rlhf.commands.support.recipe_copies import copy_shipped_recipes, read_shipped_recipe, replace_texts


def test_replaced_texts_are_not_searched_again_and_the_longest_counts() -> None:
    texts = {"data/": "/x/data/", "data/a.csv": "/y/data/b.csv", "runs/one": "out"}
    assert replace_texts("data/a.csv data/a runs/one/data", texts) == "/y/data/b.csv /x/data/a out/data"


def test_a_folder_of_recipes_is_copied_with_another_folder_of_runs(tmp_path: Path) -> None:
    copies = copy_shipped_recipes("quickstart", {"runs/quickstart": "here"}, tmp_path / "recipes")
    shipped = {name.split("/")[1]: path for name, path in shipped_recipes().items() if name.startswith("quickstart/")}
    assert copies.keys() == shipped.keys()
    for name, path in copies.items():
        assert path.read_text() == shipped[name].read_text().replace("runs/quickstart", "here")
        assert path.read_text() == read_shipped_recipe(f"quickstart/{name}", {"runs/quickstart": "here"})
