"""The variable-length kernel of a GPU."""

import pytest

from tests.helpers.varlen_kernel import use_reference_kernel


@pytest.fixture
def varlen_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack for the kernel, in whose place a reference computes."""
    use_reference_kernel(monkeypatch)
