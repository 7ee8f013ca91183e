"""Suggestions for error messages: the nearest right name, and how to install a missing package."""

from collections.abc import Iterable
from difflib import get_close_matches

# import name -> pip requirement; only packages that a recipe may name and an installation may lack
OPTIONAL_PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "deepspeed": "'lit-rlhf[deepspeed]'",
    "gguf": "'lit-rlhf[gguf]'",
    "krippendorff": "krippendorff",
    "langdetect": "langdetect",
    "lm_eval": "lm-eval",
    "markdown_it": "'lit-rlhf[label]'",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "peft": "peft",
    "profanity_check": "'lit-rlhf[real]'",
    "sentencepiece": "sentencepiece",
    "starlette": "'lit-rlhf[label]'",
    "tensorboard": "tensorboard",
    "torchao": "'lit-rlhf[torchao]'",
    "uvicorn": "'lit-rlhf[label]'",
    "vllm": "vllm",
    "wandb": "wandb",
    "wandb_workspaces": "'lit-rlhf[workspace]'",
}


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" with the nearest of `names`, or "" if none is near."""
    near = get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def pip_command(module: str | None) -> str | None:
    """Return the command that installs the package of `module`, or None for a package that is not optional."""
    package = OPTIONAL_PACKAGES.get((module or "").split(".")[0])
    return None if package is None else f"pip install {package}"
