"""`lit-rlhf recipes`: list, print and copy the shipped recipes, and resolve `-c NAME`."""

import shutil
from importlib.resources import files
from pathlib import Path

from lit_rlhf.commands.support.argument_parser import Parser, read_action
from lit_rlhf.errors import UserError
from lit_rlhf.suggestions import did_you_mean

OVERLAY_FOLDERS = (
    "strategy",
    "precision",
    "optimizer",
    "adapter",
    "averaging",
    "compute",
    "generator",
    "reward-model",
    "logger",
)
EVALUATION_FOLDER = "evaluate"
LIST = "lit-rlhf recipes ls lists them"


def run(command: str, args: list[str]) -> int:
    """List the recipes, print one, or copy one."""
    actions = {
        "ls": "list the shipped recipes",
        "show": "print one: show NAME",
        "cp": "copy one: cp NAME DEST",
    }
    action, rest = read_action("lit-rlhf recipes", "ls | show NAME | cp NAME DEST", actions, args), args[1:]
    if action is None:
        return 0
    parser = Parser(prog=f"lit-rlhf recipes {action}", description=actions[action])
    if action == "ls":
        parser.parse(rest)
        print(format_listing(shipped_recipes() | wandb_sweeps()))
        return 0
    parser.add_argument("name", help="as lit-rlhf recipes ls prints it")
    if action == "show":
        file = recipe_file(parser.parse(rest).name, shipped_recipes() | wandb_sweeps())
        print(file.read_text(encoding="utf-8"), end="")
        return 0
    parser.add_argument("destination", type=Path, help="a file that does not exist yet, or a folder")
    parsed = parser.parse(rest)
    print(copy_recipe(parsed.name, parsed.destination))
    return 0


def shipped_recipes() -> dict[str, Path]:
    """Return name -> file of every shipped recipe, such as "quickstart/sft"; sorted by name."""
    root = Path(str(files("lit_rlhf") / "recipes")).resolve()
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.glob("*/*.yaml"))}


def wandb_sweeps() -> dict[str, Path]:
    """Return name -> file of every shipped configuration for `wandb sweep`, which is no recipe."""
    root = Path(str(files("lit_rlhf") / "recipes")).resolve()
    return {path.stem: path for path in sorted(root.glob("*.yaml"))}


def is_overlay(name: str) -> bool:
    """Return whether a recipe is an overlay for a second `-c`, which changes a run and is not one by itself."""
    return name.split("/")[0] in OVERLAY_FOLDERS


def is_evaluation(name: str) -> bool:
    """Return whether a recipe is for `lit-rlhf evaluate`; the others are for `lit-rlhf fit`."""
    return name.split("/")[0] == EVALUATION_FOLDER


def read_description(path: Path) -> str:
    """Return the first line of a recipe, a comment that says what it is."""
    with path.open(encoding="utf-8") as lines:
        first = next(lines, "").strip()
    return first.lstrip("#").strip() if first.startswith("#") else ""


def format_listing(recipes: dict[str, Path]) -> str:
    """Return the text of `recipes ls`: names and descriptions, recipes first, then overlays."""
    width = max(map(len, recipes), default=0) + 2
    sweeps = wandb_sweeps()
    others = {name for name in recipes if is_overlay(name) or is_evaluation(name)} | sweeps.keys()
    groups = {
        "Recipes: lit-rlhf fit -c NAME": [name for name in recipes if name not in others],
        "Evaluations: lit-rlhf evaluate -c NAME": [name for name in recipes if is_evaluation(name)],
        "Overlays: one more -c NAME after a recipe": [name for name in recipes if is_overlay(name)],
        "Sweeps: lit-rlhf recipes cp NAME ., then wandb sweep NAME.yaml": [n for n in recipes if n in sweeps],
    }
    blocks = []
    for title, names in groups.items():
        if not names:
            continue
        blocks.append(
            "\n".join([title, *(f"  {name:<{width}}{read_description(recipes[name])}".rstrip() for name in names)])
        )
    return "\n\n".join(blocks)


def recipe_file(name: str, recipes: dict[str, Path]) -> Path:
    """Return the file of one of `recipes` by its name, with or without .yaml.

    Raises:
        UserError: there is no such recipe; names the nearest one.
    """
    bare = name.removesuffix(".yaml")
    if bare not in recipes:
        last = {known.split("/")[-1]: known for known in recipes}  # "sft" is not close enough to "quickstart/sft"
        hint = did_you_mean(bare, recipes)
        if not hint and bare.split("/")[-1] in last:
            hint = f" (did you mean {last[bare.split('/')[-1]]!r}?)"
        raise UserError(f"no recipe {name!r}{hint}; {LIST}")
    return recipes[bare]


def find_recipe(name: str) -> Path:
    """Return the file of `-c NAME`: an existing file, or else a shipped recipe.

    Raises:
        UserError: there is neither; names the nearest recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir() and name.removesuffix(".yaml") not in shipped_recipes():
        raise UserError(f"-c {name}: a folder, not a recipe file")
    try:
        return recipe_file(name, shipped_recipes())
    except UserError as problem:
        raise UserError(f"-c {name}: no such file, and {problem}") from None


def copy_recipe(name: str, destination: Path) -> Path:
    """Copy a shipped recipe to a new file, or into a folder; return the file written.

    Raises:
        UserError: there is no such recipe, the file exists already, or it cannot be written.
    """
    source = recipe_file(name, shipped_recipes() | wandb_sweeps())
    target = destination / source.name if destination.is_dir() else destination
    if target.exists():
        raise UserError(f"{target} exists already; name another destination")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as problem:
        raise UserError(f"cannot write {target}: {problem.strerror}") from None
    return target
