"""The quiet trainer of the modules' tests."""

from tests.modules.conftest import trainer_of

__all__ = ["trainer_of"]
