"""Filters for known, harmless warnings and log records of the libraries below."""

import logging
import os
import warnings

# prefixes of this library's metrics, which are reduced over ranks before they are logged
_REDUCED_METRICS = (
    "centering|policy|pretraining|response|reward|reward_model|rollout|throughput|time|update|validation|value"
)
HARMLESS_WARNINGS = (
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*`tensorboardX` has been removed as a dependency.*",
    f".*recommended to use `self.log\\('({_REDUCED_METRICS})/.*sync_dist=True.*",
)
HARMLESS_RECORDS = ("💡 Tip:", "TPU available: False", "Seed set to", "Loading `train_dataloader` to estimate")


def install_log_filters() -> None:
    """Install the filters; call it before the libraries are imported. Idempotent."""
    for message in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(is_worth_reading)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # a missing optional CPU kernel
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise it warns at every fork


def is_worth_reading(record: logging.LogRecord) -> bool:
    """Return whether a log record is not one of the harmless ones."""
    return not record.getMessage().startswith(HARMLESS_RECORDS)
