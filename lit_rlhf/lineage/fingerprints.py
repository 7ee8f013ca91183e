"""Fingerprints of the models and data that something is made from; a file is hashed once, until it changes."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.token_cache import get_cache_folder
from lit_rlhf.hashing import hash_file
from lit_rlhf.lineage.records import DataInput, ModelInput, combine_hashes, lineage_path
from lit_rlhf.models.fingerprint import find_weight_files, model_fingerprint
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.paths import expand_path, written_whole

CACHE = "lit_rlhf_hashes"  # folder of known hashes, beside that of the token cache

HashFile = Callable[[Path], str]


def cached_hash_file(file: Path) -> str:
    """Return a file's SHA-256, kept by path, size and modification time: weights take a second per gigabyte."""
    entry = _cache_entry(file)
    try:
        return entry.read_text()
    except OSError:
        pass
    digest = hash_file(file)
    _store(entry, digest)
    return digest


def remember_hashes(folder: Path, files: dict[str, str]) -> None:
    """Keep the known hashes of files in a folder, so that the next run need not read them."""
    for name, digest in files.items():
        _store(_cache_entry(folder / name), digest)


def _cache_entry(file: Path) -> Path:
    status = file.stat()
    key = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    return get_cache_folder().with_name(CACHE) / hashlib.sha256(key.encode()).hexdigest()[:32]


def _store(entry: Path, digest: str) -> None:
    with suppress(OSError):  # an unwritable or full cache: the file is hashed again next time
        entry.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(entry) as part:
            part.write_text(digest)


def hash_weight_files(folder: Path, hash_file: HashFile) -> dict[str, str]:
    """Return name -> SHA-256 of the files of a model folder that decide what it computes."""
    return {path.name: hash_file(path) for path in find_weight_files(folder)}


def hash_lineage(output: Path) -> str:
    """Return the SHA-256 of the lineage.json of a folder or file; "" if it has none."""
    file = lineage_path(output)
    return hash_file(file) if file.is_file() else ""


def describe_model_input(
    role: str, path: str, loading: ModelLoadingConfig | None = None, hash_file: HashFile = cached_hash_file
) -> ModelInput:
    """Return the record of a model as it is now, with an absolute location.

    Args:
        role: what it is used as.
        path: folder, checkpoint file or hub name.
        loading: how it is loaded.
        hash_file: returns the SHA-256 of a file.
    """
    local = expand_path(path)
    if local.is_dir():
        files = hash_weight_files(local, hash_file)
        return ModelInput(role, path, combine_hashes(files), str(local.resolve()), files, hash_lineage(local))
    fingerprint = model_fingerprint(str(local) if local.is_file() else path, loading or ModelLoadingConfig(), hash_file)
    if not local.is_file():
        return ModelInput(role, path, fingerprint)
    files = {local.name: fingerprint.removeprefix("sha256 ")}
    return ModelInput(role, path, fingerprint, str(local.resolve()), files, hash_lineage(local))


def describe_data_input(
    role: str, path: str, report: DatasetReport | None = None, hash_file: HashFile = cached_hash_file
) -> DataInput:
    """Return the record of a dataset as it is now, with an absolute location.

    Args:
        role: what it is used as.
        path: file or hub name.
        report: what was kept of it; None or without a row: not counted.
        hash_file: returns the SHA-256 of a file.
    """
    read, kept = (report.num_read, report.num_kept) if report is not None and report.num_read else (None, None)
    local = expand_path(path)
    if not local.is_file():
        return DataInput(role, path, "", read, kept)
    fingerprint = f"sha256 {hash_file(local)}"
    return DataInput(role, path, fingerprint, read, kept, str(local.resolve()), hash_lineage(local))
