"""Questions and answers in keys of their own: Alpaca's ``instruction``, ``input``, ``output``, ms-swift's ``query`` and
``response``, both with ``history``, a list of [question, answer]; and ms-swift's ``conversation`` of such pairs.
"""

from collections.abc import Mapping
from typing import Any

from megatron_eagle.data.build.forms.draft import Said, shorten
from megatron_eagle.data.build.forms.keys import Ignored
from megatron_eagle.errors import BrokenSample


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise BrokenSample(f"'{key}' is a {type(value).__name__}, not text")
    return value


def _history(value: Any) -> tuple[Said, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        raise BrokenSample(f"'history' is no list of [question, answer]: {shorten(value)}")
    return tuple(said for question, answer in value for said in _pair(question, answer, "history"))


def _pair(question: Any, answer: Any, key: str) -> tuple[Said, Said]:
    return Said("user", (_text(question, key),)), Said("assistant", (_text(answer, key),))


class Alpaca:
    """``instruction``, with ``input`` on the next line (the rule of LLaMA-Factory), and ``output``."""

    NAME = "instruction"
    KEYS = frozenset({"instruction", "input", "output", "history"})

    @staticmethod
    def read(record: Mapping[str, Any], ignored: Ignored) -> tuple[Said, ...]:
        """The turns of a record; raises BrokenSample."""
        asked = [_text(record[key], key) for key in ("instruction", "input") if record.get(key)]
        answer = _text(record.get("output"), "output")
        return (*_history(record.get("history")), *_pair("\n".join(asked), answer, "instruction"))


class QueryResponse:
    """``query`` and ``response``; a response alone is text to be learned."""

    NAME = "response"
    KEYS = frozenset({"query", "response", "history"})

    @staticmethod
    def read(record: Mapping[str, Any], ignored: Ignored) -> tuple[Said, ...]:
        """The turns of a record; raises BrokenSample."""
        answer = Said("assistant", (_text(record["response"], "response"),))
        asked = (Said("user", (_text(record["query"], "query"),)),) if record.get("query") else ()
        return (*_history(record.get("history")), *asked, answer)


class Exchanges:
    """``conversation``, a list of ``{"human", "assistant"}``."""

    NAME = "conversation"
    KEYS = frozenset({"conversation"})

    @staticmethod
    def read(record: Mapping[str, Any], ignored: Ignored) -> tuple[Said, ...]:
        """The turns of a record; raises BrokenSample."""
        pairs = record["conversation"]
        if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
            raise BrokenSample("'conversation' is no list of {'human', 'assistant'}")
        said: list[Said] = []
        for number, pair in enumerate(pairs, 1):
            given = ignored.without(pair)
            ignored.check_keys(given, {"human", "assistant"}, f"exchange {number}")
            said += _pair(given.get("human"), given.get("assistant"), f"exchange {number}")
        return tuple(said)
