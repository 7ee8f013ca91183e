"""What finds personally identifiable information (PII) in a text: the plug-in behind `preprocessing.pii`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from lit_rlhf.errors import UserError


@runtime_checkable
class PIIDetector(Protocol):
    """What says whether a text holds personal data."""

    def find(self, text: str) -> Sequence[str]:
        """The kinds that are in the text, such as "EMAIL_ADDRESS"; empty where there are none."""


class PythonDetector:
    """A function of your own as a detector: from a text to the kinds in it."""

    def __init__(self, function: Callable[[str], Any], name: str) -> None:
        self.function = function
        self.name = name

    def find(self, text: str) -> Sequence[str]:
        """What the function returns, which must be a list of kinds."""
        kinds = self.function(text)
        if isinstance(kinds, str) or not isinstance(kinds, Sequence):
            raise UserError(f"preprocessing.pii: {self.name} returned a {type(kinds).__name__}, not a list of kinds")
        return kinds


class PresidioPatterns:
    """Microsoft Presidio's recognisers that go by patterns and check sums; needs `pip install 'lit-rlhf[pii]'`.

    No language model and no network are used; names of people and places are beyond patterns.

    Args:
        recognisers: Presidio's classes, by name.
        score: From which certainty on, 0 to 1; a telephone number alone reaches 0.4.
    """

    def __init__(
        self,
        recognisers: Sequence[str] = (
            "EmailRecognizer",
            "PhoneRecognizer",
            "CreditCardRecognizer",
            "IbanRecognizer",
            "IpRecognizer",
            "UsSsnRecognizer",
        ),
        score: float = 0.4,
    ) -> None:
        self.recognisers = recognisers
        self.score = score

    def find(self, text: str) -> list[str]:
        """The kinds found, in the order of their names."""
        found = set()
        for recogniser in self._made:
            results = recogniser.analyze(text, recogniser.supported_entities, None) or []
            found |= {each.entity_type for each in results if each.score >= self.score}
        return sorted(found)

    @cached_property
    def _made(self) -> list[Any]:
        try:
            import tldextract
            from presidio_analyzer import predefined_recognizers
        except ImportError as error:
            raise UserError(
                f"preprocessing.pii: PresidioPatterns needs presidio-analyzer ({error}); run pip install 'lit-rlhf[pii]'"
            ) from error
        made = []
        for name in self.recognisers:
            if not hasattr(predefined_recognizers, name):
                near = get_close_matches(name, predefined_recognizers.__all__, n=1)
                mend = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f"preprocessing.pii: presidio-analyzer has no recogniser {name!r}{mend}")
            made.append(getattr(predefined_recognizers, name)())
        # the endings of domains that come with the package: Presidio would fetch the newest
        endings = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
        for recogniser in made:
            if isinstance(recogniser, predefined_recognizers.EmailRecognizer):
                recogniser.validate_result = lambda found: bool(endings(found).fqdn)
        return made
