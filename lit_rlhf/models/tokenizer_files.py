"""The files of a tokenizer as text, in checkpoints and fingerprints."""

import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase as Tokenizer


def read_tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the files that a tokenizer saves, by path: its chat templates may be in a folder.

    Bytes that are not UTF-8 are kept as lone surrogates, which `write_tokenizer_files` writes as they were.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes().decode("utf-8", "surrogateescape") for path in files}


def write_tokenizer_files(files: dict[str, str], folder: Path) -> None:
    """Write the files of `read_tokenizer_files`, byte for byte."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
