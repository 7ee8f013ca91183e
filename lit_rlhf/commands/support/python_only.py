"""Settings that take a path or an object: of the two, a recipe can give the path."""

from typing import Any, NoReturn

from jsonargparse.typing import register_type_on_first_use

OBJECTS = (
    "transformers.PreTrainedModel",
    "transformers.PreTrainedTokenizerBase",
    "transformers.TextClassificationPipeline",
    "lit_rlhf.models.scalar_model.ScalarModel",
    "lit_rlhf.data.sources.RowIterable",
    "lit_rlhf.data.preprocessing.pii.PresidioRecognizer",
    "lit_rlhf.importing.Function",
    "torch.device",
    "torch.dtype",
)


def register_python_only_types() -> None:
    """Make jsonargparse refuse these types in recipes, where it would look for a class or a function to call."""
    for path in OBJECTS:
        register_type_on_first_use(path, _refuse, _refuse, type_check=lambda value, kind: False)


def _refuse(value: Any) -> NoReturn:
    raise ValueError("objects are given in Python")
