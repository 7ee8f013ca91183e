"""Messages of the libraries below that are known and harmless, kept off the terminal."""

import logging
import os
import warnings

#: beginnings of this library's own metrics, which are of all ranks before they are logged
_OURS = "centring|policy|pretraining|quality|response|reward|rollout|time|update|validation|value"
HARMLESS_WARNINGS = (
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*`tensorboardX` has been removed as a dependency.*",
    f".*recommended to use `self.log\\('({_OURS})/.*sync_dist=True.*",
)
HARMLESS_RECORDS = ("💡 Tip:", "TPU available: False", "Seed set to", "Loading `train_dataloader` to estimate")


def quiet() -> None:
    """Install the filters. Call it before the libraries are imported; calling it twice does no harm."""
    for message in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(is_worth_reading)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an absent optional CPU kernel
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns at every fork otherwise


def is_worth_reading(record: logging.LogRecord) -> bool:
    """Whether a log record is not among the harmless ones."""
    return not record.getMessage().startswith(HARMLESS_RECORDS)
