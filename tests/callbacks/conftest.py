"""The quiet trainer of the modules' tests."""

from tests.modules.conftest import make_trainer

__all__ = ["make_trainer"]
