"""Conversations in other languages than wanted, told by py3langid (the extra ``curate``)."""

import functools
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Fraction, Positive
from megatron_eagle.curation.operator import SampleOperator
from megatron_eagle.curation.questions import works_on_text
from megatron_eagle.curation.sample import Finding, Sample
from megatron_eagle.errors import UserError

_IDEOGRAPHS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_NO_PROSE = re.compile(
    r"```.*?(?:```|\Z)|\$[^$]*\$|\\begin\{.*?\\end\{\w+\*?\}|\\\w+|https?://\S+|[\d_|<>{}\[\]]", re.DOTALL
)
WORTH = 4  # letters that an ideograph stands for


@dataclass(frozen=True, config=STRICT)
class Operator(SampleOperator):
    """languages: ISO 639-1 codes that are wanted. letters: shorter texts are not judged, nor less sure ones.

    A question and its answer are judged apart. Answers that copy or translate a text are not judged, nor is code.
    """

    languages: tuple[str, ...] = ("en",)
    letters: Positive = 40
    confidence: Fraction = 0.8

    def prepare(self, folder: Path) -> None:
        """UserError if py3langid is missing or does not know a language."""
        if importlib.util.find_spec("py3langid") is None:
            raise UserError("operator 'language' needs the package py3langid: pip install '.[curate]' beside setup.py")
        known = sorted(set(_identifier().labels))
        for one in self.languages:
            if one not in known:
                raise UserError(f"operator 'language': language {one!r} is not known; there are {', '.join(known)}")

    def findings(self, sample: Sample) -> Iterable[Finding]:
        """Each turn that is in another language."""
        for exchange in sample.exchanges:
            texts = [exchange.question] if works_on_text(exchange.question) else [exchange.question, exchange.answer]
            for text in texts:
                found = self._other(text)
                if found is not None:
                    name, sure = found
                    yield Finding(
                        "rejected",
                        "another language",
                        f"{name}: {text[:100]}",
                        exchange.turn,
                        scores={"confidence": sure},
                    )
                    break

    def _other(self, text: str) -> tuple[str, float] | None:
        """The language and how sure it is, if it is none of those wanted."""
        prose = " ".join(_NO_PROSE.sub(" ", text).split())
        letters = sum(map(str.isalpha, prose)) + (WORTH - 1) * len(_IDEOGRAPHS.findall(prose))
        if letters < self.letters:
            return None
        name, sure = _identifier().classify(prose)
        sure = round(float(sure), 3)  # the last digits depend on the machine
        return None if name in self.languages or sure < self.confidence else (name, sure)


@functools.lru_cache
def _identifier() -> Any:
    """Loaded once a process, for it takes a moment."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
