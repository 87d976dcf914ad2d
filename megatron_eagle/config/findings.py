"""Settings made of plain data, and what is wrong with the data, in one line: the place, the value, what is wanted."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from megatron_eagle.config.numbers import shown
from megatron_eagle.config.schema import advice, meant
from megatron_eagle.errors import UserError

Where = tuple[str | int, ...]
Settings = TypeVar("Settings")
LONGEST = 290

_WANTED = {
    "dataclass_type": "a mapping of keys is wanted",
    "dict_type": "a mapping of keys is wanted",
    "tuple_type": "a list is wanted",
    "string_type": "a text is wanted",
    "bytes_type": "a text is wanted",
}


class Refused(ValueError):
    """What is wrong below a value, for a check that pydantic does not make: its findings keep their places.

    about: what the value is, for a message that does not say where it stands.
    """

    def __init__(self, findings: Sequence[tuple[Where, str]], about: str = "") -> None:
        super().__init__(f"{about}{': ' * bool(about)}{one_line(findings, None)}")
        self.findings = tuple(findings)


def checked(settings: type[Settings], raw: Any, source: object) -> Settings:
    """``raw`` as ``settings``; UserError names ``source`` and says all that is wrong, as far as a line holds it."""
    try:
        return TypeAdapter(settings).validate_python(raw)
    except ValidationError as error:
        raise UserError(f"{source}: {one_line(findings_of(error, settings), raw)}") from None


def findings_of(error: ValidationError, settings: type) -> list[tuple[Where, str]]:
    """(place, what is wrong with it), of settings of this class."""
    found: list[tuple[Where, str]] = []
    for item in error.errors(include_url=False):
        where: Where = tuple(part for part in item["loc"] if part != "[key]")
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, Refused):
            found += [(where + place, words) for place, words in cause.findings]
        else:
            found.append((where, _words(item["type"], item, where, settings)))
    return found


@contextmanager
def refusing(settings: type) -> Iterator[None]:
    """Make a UserError of what the checks of ``settings`` refuse inside."""
    try:
        yield
    except ValidationError as error:
        raise UserError(words_of(error, settings)) from None


def words_of(error: ValueError, settings: type) -> str:
    """What a check of ``settings`` raised, on one line."""
    return one_line(findings_of(error, settings), None) if isinstance(error, ValidationError) else str(error)


def one_line(findings: Sequence[tuple[Where, str]], raw: Any) -> str:
    """As many findings as one line of ``LONGEST`` characters holds, and how many more there are.

    raw: what was checked, whose lists have named entries; None if it is not at hand.
    """
    lines: list[str] = []
    for where, words in findings:
        place = _named(where, raw)
        line = f"{place}: {words}" if place else words
        line = line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
        if lines and len("; ".join([*lines, line])) > LONGEST:
            return f"{'; '.join(lines)}; and {len(findings) - len(lines)} more"
        lines.append(" ".join(line.split()))
    return "; ".join(lines)


def _named(where: Where, raw: Any) -> str:
    """``stages.stage1.steps``: entries of lists by their name if they have one, as overrides call them."""
    parts = []
    for key in where:
        try:
            raw = raw[key]
        except (TypeError, KeyError, IndexError):
            raw = None
        name = raw.get("name") if isinstance(key, int) and isinstance(raw, dict) else None
        parts.append(shown(name if isinstance(name, str) and name else str(key), 40).strip("'"))
    return ".".join(parts)


def _words(kind: str, item: Any, where: Where, settings: type) -> str:
    got = f"got {shown(item['input'])}"
    match kind:
        case "value_error":
            return str(item["msg"]).removeprefix("Value error, ")
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"no such key{advice(settings, where)}"
        case "missing" | "missing_argument":
            return "this key is needed"
        case "literal_error":
            names = re.findall(r"'([^']*)'", item["ctx"]["expected"])
            return f"one of {', '.join(names)} is wanted ({got}){meant(item['input'], names)}"
        case "string_pattern_mismatch":
            return f"a text of the form {item['ctx']['pattern']} is wanted ({got})"
        case "string_type" if isinstance(item["input"], bool | int | float):
            return f"a text is wanted ({got}): put it in quotes"
        case _ if kind in _WANTED:
            return f"{_WANTED[kind]} ({got})"
    return f"{item['msg']} ({got})"
