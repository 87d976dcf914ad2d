"""Questions about an image that the conversation does not show, or about more of them than it shows.

Markers without images and images without markers are refused when a record is read, and stand in the ledger under
``read``; this is about the words.
"""

import re
from collections.abc import Iterable

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.curation.operator import SampleOperator
from megatron_eagle.curation.questions import works_on_text
from megatron_eagle.curation.sample import Finding, Sample

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_NOUN = r"(?:image|picture|photo|photograph|screenshot)"
_SHOWN = re.compile(
    rf"\b(?:in|of|from|at|describe|caption|see|about|using)\s+(?:the|this|that|these)\s+(?:\w+\s+)?{_NOUN}s?\b"
    rf"|\battached {_NOUN}",
    re.I,
)
_NUMBERED = re.compile(rf"\b(?:({'|'.join(_ORDINALS)})\s+{_NOUN}|{_NOUN}\s+(\d))\b", re.I)


@dataclass(frozen=True, config=STRICT)
class Operator(SampleOperator):
    """No settings. Questions that work on a text of their own are not looked at."""

    def findings(self, sample: Sample) -> Iterable[Finding]:
        """The first such question."""
        shown = len(sample.images) + len(sample.videos)
        for exchange in sample.exchanges:
            if works_on_text(exchange.question):
                continue
            if not shown and (found := _SHOWN.search(exchange.question)):
                yield Finding("rejected", "an image is spoken of, none is shown", found[0], exchange.turn)
                return
            for ordinal, digit in _NUMBERED.findall(exchange.question):
                number = int(digit) if digit else _ORDINALS.index(ordinal.lower()) + 1
                if number > max(shown, 1) and shown and not sample.videos:
                    yield Finding(
                        "rejected", "more images are spoken of than shown", f"image {number} of {shown}", exchange.turn
                    )
                    return
