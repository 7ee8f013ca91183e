"""No argument of the Python API is a string only because YAML needs one: where it names an object, it takes the object.

Every argument that takes text alone is listed here with what the text is; a new one must be listed, or take an object.
"""

import inspect
import re
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import pytest
from transformers import PreTrainedTokenizerBase

from tests.helpers.pages import ROOT

PACKAGES = ("callbacks", "data", "evaluation", "generation", "models", "modules", "rewards", "rollout")
CLASS_PATH = re.compile(r"\blit_rlhf(?:\.\w+)*\.[A-Z]\w+")

#: content, not a name: rows, texts and results, which are strings in any language
CONTENT = {
    *("Claim", "Completion", "CompletionPair", "Demonstration", "Episodes", "Experience", "Instruction", "MetricValue"),
    *("PromptBatch", "PromptRow", "RatedItem", "Ranking", "Rating", "SuiteResult", "TextRow", "Verdict"),
}
#: argument -> what its text is, of every class that has one of that name
NAMES = {
    "api_key_env": "name of an environment variable",
    "attn_implementation": "name",
    "group": "column",
    "label": "name of a label",
    "names": "names of metrics",
    "prefix": "text",
    "revision": "branch, tag or commit",
    "stop_strings": "texts",
    "template": "name of a template, or jinja text",
    "url": "address of a service",
}
#: class and argument -> what its text is
TEXTS = {
    "Benchmark.task": "name of a task",
    "Benchmarks.include": "folder of task files",
    "ChatCompletions.model": "name at a service",
    "DemonstrationPreprocessing.few_shot_by": "column",
    "DemonstrationPreprocessing.split_by": "column",
    "DemonstrationPreprocessing.user_column": "column",
    "EndpointJudge.name": "name in the report",
    "EvaluatedModel.name": "name in the report",
    "Evaluation.baseline": "name of a model",
    "Evaluation.out": "output folder",
    "ExportModel.directory": "output folder",
    "ExportModel.push": "name of a repository",
    "KeywordToxicity.path": "file of words, or the words",
    "Lineage.registry": "name of a registry",
    "LoRA.target_modules": "names of layers",
    "ModelLoadingConfig.pad_token": "token",
    "ModelSpec.prefixes": "file of texts, or the texts",
    "NCCLTransfer.address": "address of this machine",
    "PairwisePreference.annotation_dir": "output folder",
    "Perspective.attribute": "name at a service",
    "Preprocessing.split_by": "column",
    "Preprocessing.user_column": "column",
    "RewardModelReport.refusal": "text",
    "RewardModelReport.thanks": "text",
    "RunState.command": "command line",
    "RunState.configs": "names of recipes",
    "VLLMGenerator.dtype": "name at a service",
    "VLLMGenerator.folder": "output folder",
    "VLLMGenerator.model": "name at a service",
    "VLLMLoRAGenerator.dtype": "name at a service",
    "VLLMLoRAGenerator.folder": "output folder",
    "VLLMLoRAGenerator.model": "name at a service",
    "VLLMRewardModel.model": "name at a service",
    "read_rows.split": "name of a split",
}


class Argument(NamedTuple):
    """An argument of a public class or function."""

    owner: Any
    name: str
    kinds: set[Any]  # of the values that it takes, those within lists included

    @property
    def path(self) -> str:
        return f"{self.owner.__name__}.{self.name}"

    @property
    def takes_text(self) -> bool:
        return bool(self.kinds & {str, Path})

    @property
    def takes_object(self) -> bool:
        """Whether it takes something that no YAML file could hold."""
        return any(kind not in PLAIN for kind in self.kinds)


PLAIN = {str, Path, int, float, bool, type(None), Any}


def kinds(annotation: Any) -> set[Any]:
    """Return the classes in an annotation: of a union all, of a list those of its items, of a dict of its values."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {type(None)}  # an enumeration
    if origin in (Union, types.UnionType):
        return set().union(*map(kinds, arguments))
    if origin is Callable or inspect.isfunction(origin):
        return {Callable}
    if isinstance(origin, type) and issubclass(origin, dict):
        return kinds(arguments[1])
    if origin is not None and origin is not type:
        return set().union(*(kinds(each) for each in arguments if each is not Ellipsis))
    return {annotation}


def public_objects() -> dict[str, Any]:
    """Return what the packages export, and every class that a recipe or a page names by its path."""
    found = {}
    for package in PACKAGES:
        module = import_module(f"lit_rlhf.{package}")
        found |= {name: getattr(module, name) for name in module.__all__}
    files = [*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    for path in sorted({match for file in files for match in CLASS_PATH.findall(file.read_text())}):
        module_name, _, name = path.rpartition(".")
        found[name] = getattr(import_module(module_name), name)
    return {name: value for name, value in found.items() if inspect.isclass(value) or inspect.isfunction(value)}


def arguments_of(owner: Any) -> Iterator[Argument]:
    parameters = inspect.signature(owner).parameters
    function = owner if inspect.isfunction(owner) else owner.__init__
    names = {"PreTrainedTokenizerBase": PreTrainedTokenizerBase}  # imported for type checkers alone
    hints = get_type_hints(owner if hasattr(owner, "_fields") else function, localns=names)
    for name, parameter in parameters.items():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            yield Argument(owner, name, kinds(hints[name]))


@pytest.fixture(scope="module")
def arguments() -> list[Argument]:
    owners = [owner for name, owner in public_objects().items() if name not in CONTENT]
    return [each for owner in owners for each in arguments_of(owner)]


def test_what_names_an_object_takes_the_object(arguments) -> None:
    only_text = {each.path for each in arguments if each.takes_text and not each.takes_object}
    named = {path for path in only_text if path.rpartition(".")[2] in NAMES}
    assert sorted(only_text - named) == sorted(TEXTS), "take the object as well, or say here what the text is"
    assert {path.rpartition(".")[2] for path in named} == NAMES.keys()


def test_the_api_was_found(arguments) -> None:
    """Some of each package; and the arguments that take a model, its tokenizer, a function or data."""
    paths = {each.path for each in arguments if each.takes_text and each.takes_object}
    assert len(arguments) > 250
    assert paths >= {
        *("SFTModule.model", "RewardModule.model", "PPOModule.model", "PPOModule.reference", "PPOModule.critic"),
        *("PPOModule.tokenizer", "LoRACritic.checkpoint", "SeparateCritic.model", "StandardizeScores.policy"),
        *("RewardModelScorer.model", "LoRARewardModel.checkpoint", "SequenceClassifierReward.model"),
        *("FunctionReward.function", "PromptDataModule.path", "PromptDataModule.format", "load_text_blocks.path"),
        *("ModelSpec.path", "ModelSpec.trained_against", "BestOf.reward_model", "BestPrefix.reward_model"),
        *("BestPrefix.path", "RewardModelJudge.model", "HuggingFaceJudge.model", "HuggingFaceTruthJudge.truth"),
        *("ToxicityClassifier.model", "Winogender.occupations", "Benchmark.path", "Benchmark.shots_path"),
        *("EMA.device", "PresidioPatterns.recognizers", "Preprocessing.pii", "HumanLabels.path"),
    }


def test_a_model_comes_with_its_tokenizer(arguments) -> None:
    """A model that was built in memory is from no folder that would hold one."""
    models = {"model", "policy", "reward_model", "truth"}
    by_owner: dict[str, set[str]] = {}
    for each in arguments:
        if each.takes_text and each.takes_object:
            by_owner.setdefault(each.owner.__name__, set()).add(each.name)
    missing = {owner for owner, names in by_owner.items() if names & models and "tokenizer" not in names}
    assert missing == {"SeparateCritic"}  # it has the policy's


def test_the_page_names_every_argument_that_takes_an_object(arguments) -> None:
    table = [line for line in (ROOT / "docs" / "python.md").read_text().splitlines() if line.startswith("| ")]
    words = set(re.findall(r"\w+", " ".join(table)))
    named = {each.name for each in arguments if each.takes_text and each.takes_object}
    assert sorted(named - words) == []


def test_docstrings_say_what_an_argument_takes(arguments) -> None:
    for each in arguments:
        if each.takes_text and each.takes_object:
            text = "\n".join(inspect.getdoc(owner) or "" for owner in getattr(each.owner, "__mro__", [each.owner]))
            assert re.search(rf"^\s*{each.name}: ", text, re.MULTILINE), each.path
