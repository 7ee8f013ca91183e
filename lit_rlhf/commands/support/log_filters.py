"""Filters for what the libraries below, and this one, write to the log: what a person needs, unless `-v` asks for all.

An information of this library may carry another text for the console: `extra={"brief": text}`; "" leaves it out.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lit_rlhf.commands.support.console import Verbosity, get_verbosity, terminal_width, wrap_words

# prefixes of this library's metrics, which are reduced over ranks before they are logged
_REDUCED_METRICS = (
    "advantage|centering|grad_norm|lr|memory|policy|pretraining|prompt|"
    "response|reward|reward_model|rollout|throughput|time|update|validation|value"
)
HARMLESS_WARNINGS = (
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*`tensorboardX` has been removed as a dependency.*",
    ".*Checkpoint directory .* exists and is not empty.*",  # it is resumed or replaced, or the run is refused
    ".*Already found a `peft_config` attribute in the model.*",  # critic and reward model on the policy's base
    f".*recommended to use `self.log\\('({_REDUCED_METRICS})/.*sync_dist=True.*",
)
HARMLESS_RECORDS = ("💡 Tip:", "TPU available: False", "Seed set to", "Loading `train_dataloader` to estimate")
# true, but of the library's doings and not of the run
LIBRARY_RECORDS = (
    "GPU available:",
    "TPU available:",
    "HPU available:",
    "LOCAL_RANK:",
    "`Trainer.",
    "`Trainer(",
    "Restoring states from",
    "Restored all states",
    "Loaded model weights",
    "Initializing distributed:",
    "-----",
    "distributed_backend=",
    "Using ",
    "Running in `fast_dev_run` mode",
    "\nDetected KeyboardInterrupt",
)
RANK = re.compile(r"^\[rank: \d+\] ")
LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.fabric.utilities.distributed",
)


class ConsoleFilter(logging.Filter):
    """Shortens what one command logs: no record twice, none of the library's doings, none wider than the terminal.

    Args:
        verbosity: how much to print.
    """

    def __init__(self, verbosity: Verbosity) -> None:
        super().__init__()
        self.verbosity = verbosity
        self.printed: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to print a record; its text is changed in place."""
        text = RANK.sub("", record.getMessage())
        if text.startswith(HARMLESS_RECORDS):
            return False
        if record.levelno > logging.INFO or self.verbosity is Verbosity.VERBOSE:
            return True
        text = getattr(record, "brief", text)
        if self.verbosity is Verbosity.STAGE or not text.strip() or text in self.printed:
            return False
        if text.startswith(LIBRARY_RECORDS):
            return False
        self.printed.add(text)
        record.msg, record.args = wrap_words(text, terminal_width(sys.stderr)), ()
        return True


def install_log_filters() -> None:
    """Install the filters of this command; call it before the libraries are imported.

    `restored_log_filters` removes them again.
    """
    for message in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    console_filter = ConsoleFilter(get_verbosity())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.filters = [each for each in logger.filters if not isinstance(each, ConsoleFilter)] + [console_filter]
    install_warning_format()
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # a missing optional CPU kernel
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise it warns at every fork


def install_warning_format() -> None:
    """Show warnings by `format_warning` unless `-v` asks for all. Lightning sets a format of its own when imported."""
    if get_verbosity() is not Verbosity.VERBOSE:
        warnings.formatwarning = format_warning


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning as a person reads it, without the place in the library that gave it."""
    return wrap_words(f"warning: {' '.join(str(message).split())}", terminal_width(sys.stderr)) + "\n"


@contextmanager
def restored_log_filters() -> Iterator[None]:
    """Remove what a command installs within the block, and put back what the command around it has."""
    before, format_before = {name: list(logging.getLogger(name).filters) for name in LOGGERS}, warnings.formatwarning
    try:
        yield
    finally:
        warnings.formatwarning = format_before
        for name, filters in before.items():
            logging.getLogger(name).filters = filters
