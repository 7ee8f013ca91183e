"""Step 4: personally identifiable information (PII) is removed from the training split (§3.2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

from lit_rlhf.data.preprocessing.keys import RecordT
from lit_rlhf.data.records import Demonstration, PromptRow, Ranking, to_plain_text
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.errors import UserError
from lit_rlhf.suggestions import did_you_mean


class PIIDetector(ABC):
    """Base of detectors of personal data, for the setting `preprocessing.pii`."""

    @abstractmethod
    def find(self, text: str) -> Sequence[str]:
        """Return the kinds of personal data in a text, such as "EMAIL_ADDRESS"; empty without any."""


class FunctionDetector(PIIDetector):
    """A user's own function as a detector: from a text to the kinds in it."""

    def __init__(self, function: Callable[[str], Any], name: str) -> None:
        self.function = function
        self.name = name

    def find(self, text: str) -> Sequence[str]:
        """Return what the function returns, which must be a list of kinds."""
        kinds = self.function(text)
        if isinstance(kinds, str) or not isinstance(kinds, Sequence):
            raise UserError(f"preprocessing.pii: {self.name} returned a {type(kinds).__name__}, not a list of kinds")
        return kinds


class PresidioRecognizer(Protocol):
    """A recognizer of Presidio, given where YAML names its class."""

    supported_entities: Any

    def analyze(self, text: str, entities: Any, nlp_artifacts: Any) -> Any:
        """Return what was found in a text, each with `entity_type` and `score`."""
        ...


class PresidioPatterns(PIIDetector):
    """Microsoft Presidio's recognizers by patterns and checksums; needs `pip install 'lit-rlhf[pii]'`.

    They use no language model and no network, and do not find the names of people and places.

    Args:
        recognizers: Names of Presidio's classes, or recognizers of it.
        min_score: Confidence threshold, 0 to 1; a telephone number alone reaches 0.4.
    """

    def __init__(
        self,
        recognizers: Sequence[str | PresidioRecognizer] = (
            "EmailRecognizer",
            "PhoneRecognizer",
            "CreditCardRecognizer",
            "IbanRecognizer",
            "IpRecognizer",
            "UsSsnRecognizer",
        ),
        min_score: float = 0.4,
    ) -> None:
        self.recognizers = recognizers
        self.min_score = min_score

    def find(self, text: str) -> list[str]:
        """Return the kinds found, in alphabetical order."""
        kinds = set()
        for recognizer in self._recognizers:
            results = recognizer.analyze(text, recognizer.supported_entities, None) or []
            kinds |= {each.entity_type for each in results if each.score >= self.min_score}
        return sorted(kinds)

    @cached_property
    def _recognizers(self) -> list[Any]:
        return [_load_recognizer(each) if isinstance(each, str) else each for each in self.recognizers]


def _load_recognizer(name: str) -> Any:
    """Return a recognizer of Presidio by the name of its class."""
    try:
        import tldextract
        from presidio_analyzer import predefined_recognizers
    except ImportError as error:
        raise UserError(
            f"preprocessing.pii: PresidioPatterns needs presidio-analyzer ({error}); run pip install 'lit-rlhf[pii]'"
        ) from error
    if not hasattr(predefined_recognizers, name):
        hint = did_you_mean(name, predefined_recognizers.__all__)
        raise UserError(f"preprocessing.pii: presidio-analyzer has no recognizer {name!r}{hint}")
    recognizer = getattr(predefined_recognizers, name)()
    if isinstance(recognizer, predefined_recognizers.EmailRecognizer):
        # the domain suffixes that come with the package: Presidio would download the newest
        extract_domain = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
        recognizer.validate_result = lambda address: bool(extract_domain(address).fqdn)
    return recognizer


def drop_pii(records: list[RecordT], detector: PIIDetector, report: DatasetReport) -> list[RecordT]:
    """Keep the records without personal data in the prompt and in its completions.

    Args:
        records: The training records; the paper leaves validation and test as they are.
        detector: Finds personal data.
        report: Counts the others, by the kind that was found first.
    """
    kept = []
    for record in records:
        kinds = [kind for text in _texts(record) for kind in detector.find(text)]
        if kinds:
            report.skip(f"personal data: {kinds[0]}", record.origin)
        else:
            kept.append(record)
    if len(kept) == len(records):
        report.register_skip_reason("personal data")
    return kept


def _texts(record: Demonstration | Ranking | PromptRow) -> list[str]:
    completions: list[str] = []
    if isinstance(record, Demonstration):
        completions = [record.completion]
    elif isinstance(record, Ranking):
        completions = record.completions
    return [to_plain_text(record.prompt), *completions]
