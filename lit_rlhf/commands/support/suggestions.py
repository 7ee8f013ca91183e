"""Small words for error lines: the nearest right name, one line, how to install."""

import argparse
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from lit_rlhf.errors import UserError

# import name -> what pip calls it; only packages a recipe may ask for and a machine may lack
OPTIONAL_PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "deepspeed": "'lit-rlhf[deepspeed]'",
    "krippendorff": "krippendorff",
    "langdetect": "langdetect",
    "lm_eval": "lm-eval",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "peft": "peft",
    "sentencepiece": "sentencepiece",
    "tensorboard": "tensorboard",
    "torchao": "'lit-rlhf[torchao]'",
    "vllm": "vllm",
    "wandb": "wandb",
}


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" with the nearest of `names`, or nothing where none is near."""
    near = get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def one_line(message: str) -> str:
    """Return the message with every run of white space, newlines included, as one space."""
    return " ".join(message.split())


def pip_command(module: str | None) -> str | None:
    """Return how to install the package that holds `module`, or None where it is no optional package."""
    package = OPTIONAL_PACKAGES.get((module or "").split(".")[0])
    return None if package is None else f"pip install {package}"


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` with the nearest right option, and guesses no abbreviation."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UserError(f"{self.prog}: {message}")

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse all of `args`.

        Raises:
            UserError: an unknown option, a missing or an ill-typed argument.
        """
        options = [option for action in self._actions for option in action.option_strings]
        names = [arg.split("=")[0] for arg in args if re.match(r"--[a-z][a-z-]*(=|$)", arg)]
        unknown = [name for name in names if name not in options]
        if unknown:  # before argparse, which would complain of a missing argument first
            name = unknown[0]
            raise UserError(f"{self.prog} has no option {name!r}{did_you_mean(name, options)}")
        return self.parse_args(args)
