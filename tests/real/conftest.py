"""The real model stories260K as a transformers folder."""

from pathlib import Path

import pytest

from tests.helpers.stories import convert


@pytest.fixture(scope="session")
def stories_source(real_data: Path) -> Path:
    """The folder of the original llama2.c files."""
    return real_data / "models" / "stories260K"


@pytest.fixture(scope="session")
def stories(stories_source: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the converted model."""
    return str(convert(stories_source, tmp_path_factory.mktemp("stories260K")))
