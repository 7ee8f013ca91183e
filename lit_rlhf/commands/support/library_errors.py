"""Say in one line what another library or the disk refuses, and what the user can change.

An exception is the user's if a library of the table raised it to refuse its input: one of its own exception classes, or
a ValueError (or a bare Exception, which the Rust libraries raise) out of its code. Every other exception is a bug.
"""

import errno
import re
import traceback
from collections.abc import Iterator

# package -> what it refuses, and the fix; the library's own message stands between
LIBRARIES = {
    "wandb": (
        "trainer.logger: Weights & Biases refuses this run",
        "correct the WandbLogger's settings or WANDB_API_KEY, or record offline with -c logger/wandb-offline or "
        "WANDB_MODE=offline",
    ),
    "peft": ("model.adapter: PEFT refuses the adapter", "correct model.adapter, or name another adapter folder"),
    "tokenizers": ("the tokenizer cannot be read or used", "save tokenizer.json of the model folder again"),
    "safetensors": (
        "a weights file (.safetensors) cannot be read or written",
        "copy or save the model folder again, on a disk with free space",
    ),
    "datasets": ("the data cannot be read", "correct the data setting path, or the files that it names"),
    "pyarrow": ("a data file cannot be read", "correct or write again the files that the data setting path names"),
    "jinja2": ("a template cannot be rendered", "correct data.template, or chat_template of the model folder"),
    "huggingface_hub": (
        "the Hugging Face hub refuses the request",
        "correct the name, log in (HF_TOKEN), check the network, or name a folder of this machine",
    ),
    "httpx": ("no connection", "check the network and its proxy, or name a folder of this machine"),
    "requests": ("no connection", "check the network and its proxy, or name a folder of this machine"),
}
# whose exceptions are whose
MODULES = {"safetensors_rust": "safetensors", "transformers": "tokenizers", "httpx2": "httpx"}
DISK = {
    errno.ENOSPC: "free some space, or name another output folder",
    errno.EDQUOT: "free some of your quota, or name another output folder",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or name another output folder",
    errno.EROFS: "name a folder that can be written to",
    errno.EACCES: "change its permissions, or name another",
    errno.EPERM: "change its permissions, or name another",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOTDIR: "a part of the path is a file; name another",
    errno.EISDIR: "it is a folder; name a file",
    errno.EIO: "the disk fails; name a folder on another",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.ELOOP: "its symbolic links form a circle",
}
TORCH_WRITE = re.compile(r"PytorchStreamWriter failed|file write failed|iostream error|unexpected pos \d+ vs \d+")


def explain_library_error(problem: BaseException) -> str | None:
    """Return one line about an exception that another library or the disk raised, or None if it is a bug."""
    explained = [line for cause in iter_causes(problem) if (line := explain_disk(cause))]
    if explained and (find_library(problem) or explain_disk(problem)):
        return explained[0]
    library = find_library(problem)
    if library is None:
        return None
    causes = [cause for cause in iter_causes(problem) if find_library(cause)]
    what, fix = LIBRARIES[library]
    reason = " ".join(str(causes[-1]).split()) or type(causes[-1]).__name__
    return f"{what}: {reason.rstrip('. ')[:500]}; {fix}"


def explain_disk(problem: BaseException) -> str | None:
    """Return one line about what the disk refuses, or None."""
    if isinstance(problem, OSError) and problem.errno in DISK:
        return f"{problem.filename or 'a file'}: {problem.strerror}; {DISK[problem.errno]}"
    if isinstance(problem, RuntimeError) and TORCH_WRITE.search(str(problem)):
        return f"a checkpoint cannot be written; {DISK[errno.ENOSPC]}"
    return None


def find_library(problem: BaseException) -> str | None:
    """Return the library of the table that raised an exception to refuse its input, or None."""
    package = type(problem).__module__.split(".")[0]
    package = MODULES.get(package, package)
    if package in LIBRARIES:
        return package
    is_refusal = type(problem) is Exception or (
        isinstance(problem, ValueError) and type(problem).__module__ in ("builtins", "pydantic_core._pydantic_core")
    )
    packages = [
        frame.f_globals.get("__name__", "").split(".")[0] for frame, _ in traceback.walk_tb(problem.__traceback__)
    ]
    raising = [package for package in packages if package != "pydantic"]  # which checks W&B's settings
    if not is_refusal or not raising:
        return None
    package = MODULES.get(raising[-1], raising[-1]) if type(problem) is Exception else raising[-1]
    return package if package in LIBRARIES else None


def iter_causes(problem: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that it was raised from or while handling, the first one last."""
    cause: BaseException | None = problem
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
