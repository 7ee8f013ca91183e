"""The classes read from the sources are those that an import gives, with the same settings."""

import dataclasses
import inspect
from importlib import import_module

import lightning.pytorch as L
import pytest

from lit_rlhf.commands.support.class_index import find_class, list_classes, public_names, trainer_parameters
from lit_rlhf.commands.support.early_checks import NAMED_PACKAGES


@pytest.mark.parametrize("package", [*NAMED_PACKAGES, "lit_rlhf.evaluation"])
def test_settings_are_those_of_the_constructor(package: str) -> None:
    module = import_module(package)
    assert public_names(package) == module.__all__
    found = list_classes(package)
    assert {info.name for info in found} == {n for n in module.__all__ if inspect.isclass(getattr(module, n))}
    known = [info for info in found if info.settings is not None]
    assert len(known) > len(found) / 2
    for info in known:
        kind = getattr(module, info.name)
        is_record = dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")
        parameters = inspect.signature(kind if is_record else kind.__init__).parameters
        assert list(info.settings or ()) == [name for name in parameters if name != "self"], info.name
        assert info.summary and info.summary in inspect.cleandoc(kind.__doc__ or "")


@pytest.mark.parametrize("method", ["__init__", "fit", "validate", "test"])
def test_the_trainers_parameters_are_those_of_the_installed_one(method: str) -> None:
    expected = [name for name in inspect.signature(getattr(L.Trainer, method)).parameters if name != "self"]
    assert list(trainer_parameters(method) or ()) == expected


@pytest.mark.parametrize("path", ["lit_rlhf.modules.PPOModul", "toys.ToyModule", "PPOModule", "", "lit_rlhf.a b.C"])
def test_what_is_no_class_of_this_library_is_none(path: str) -> None:
    assert find_class(path) is None
