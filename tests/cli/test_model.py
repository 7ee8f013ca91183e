"""`lit-rlhf model`: a model of the catalog, or a GGUF file, as a folder."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lit_rlhf.cli import main
from lit_rlhf.hashing import hash_file
from lit_rlhf.models import catalog
from tests.helpers.gguf_files import random_model, write_gguf


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of an installed package that the catalog names; the hub is out of reach in tests."""
    folder = tmp_path / "site" / "tiny_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    file = folder / "tiny.gguf"
    write_gguf(file, random_model(True))
    entry = catalog.CatalogModel("org/tiny", "tiny-package", "1.0", "tiny_package", file.name, hash_file(file), "tiny")
    monkeypatch.setitem(catalog.CATALOG, "tiny", entry)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.chdir(tmp_path)
    return file


def test_a_model_comes_from_an_installed_package(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "get", "tiny", "out"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("out: from the installed package tiny-package (tiny.gguf), as the hub cannot be reached")
    assert AutoModelForCausalLM.from_pretrained("out").config.vocab_size == 64


def test_another_file_in_the_package_is_refused(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package.write_bytes(package.read_bytes() + b"\0")
    assert main(["model", "get", "tiny", "out"]) == 2
    assert "is not the file of tiny-package 1.0" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_file_of_ones_own(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "get", "--gguf", str(package), "out"]) == 0
    assert capsys.readouterr().out == f"out: from {package}, dequantized to float32\n"


def test_a_folder_of_something_else_is_left_alone(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("mine")
    assert main(["model", "get", "--gguf", str(package), "out"]) == 2
    assert [path.name for path in Path("out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["get"], "DIR"),
        (["get", "out"], "takes either a NAME or --gguf FILE"),
        (["get", "tiny", "out", "--gguf=x.gguf"], "takes either a NAME or --gguf FILE"),
        (["get", "tinny", "out"], "did you mean 'tiny'?"),
        (["get", "--gguf=no.gguf", "out"], "there is no file 'no.gguf'"),
        (["gets", "tiny", "out"], "did you mean 'get'?"),
    ],
)
def test_one_line_says_what_is_wrong(
    args: list[str], said: str, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model", *args]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_catalog_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "ls"]) == 0
    assert capsys.readouterr().out.startswith("smollm2-135m  SmolLM2-135M-Instruct")
