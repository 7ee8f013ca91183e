"""The real model as a folder."""

from pathlib import Path

import pytest

from tests.helpers.stories import convert


@pytest.fixture(scope="session")
def stories_source(real_data: Path) -> Path:
    """The folder of the original files."""
    return real_data / "models" / "stories260K"


@pytest.fixture(scope="session")
def stories(stories_source: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The converted folder."""
    return str(convert(stories_source, tmp_path_factory.mktemp("stories260K")))
