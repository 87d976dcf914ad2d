"""Tables that a sample knows, in Markdown in an answer or as data beside it, and what may be asked of them.

Answers are computed in decimal, with no more digits than the table has, so that they can be read off the picture.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, get_args

Kind = Literal["lookup", "largest", "smallest", "difference", "total", "above"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SUMMARY = ("total", "grand total", "subtotal", "sum", "all", "overall", "average", "mean", "median")  # names of rows
_RULE = re.compile(r"\|?\s*:?-{2,}:?\s*(?:\|\s*:?-{2,}:?\s*)*\|?")
_NUMBER = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Table:
    """columns: their names, the first of what names a row. rows: of as many cells, with names that differ."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        names = [row[0] for row in self.rows if row]
        if len(self.columns) < 2 or any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(
                f"a table of {len(self.columns)} columns has rows of {sorted({len(r) for r in self.rows})}"
            )
        columns = {column.casefold() for column in self.columns}
        if len(columns) != len(self.columns):
            raise ValueError(f"a table of {len(self.columns)} columns, {len(columns)} different names among them")
        if not names or len(set(names)) != len(names) or not all(names) or not all(self.columns):
            raise ValueError(f"a table of {len(self.rows)} rows, {len(set(names))} different names among them")

    def numbers(self, column: int) -> list[Decimal] | None:
        """A column as numbers; None if a cell is none."""
        found = [number_of(row[column]) for row in self.rows]
        return None if None in found else [one for one in found if one is not None]

    @property
    def summary(self) -> tuple[str, ...]:
        """Names of rows that sum the others up."""
        return tuple(row[0] for row in self.rows if row[0].casefold().strip(" :*.") in SUMMARY)

    @property
    def own(self) -> "Table":
        """Without the rows that sum the others up; itself if there are no others."""
        rows = tuple(row for row in self.rows if row[0] not in self.summary)
        return replace(self, rows=rows) if rows else self

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number_of(cell: str) -> Decimal | None:
    """A plain number, with or without commas; None for anything else."""
    if not _NUMBER.fullmatch(cell):
        return None
    try:
        return Decimal(cell.replace(",", ""))
    except InvalidOperation:
        return None


def table_of(data: Any) -> Table | None:
    """The table of ``{"columns": [...], "rows": [[...], ...]}``; None if it is none."""
    if (
        not isinstance(data, Mapping)
        or not isinstance(data.get("columns"), list)
        or not isinstance(data.get("rows"), list)
    ):
        return None
    if not all(isinstance(row, list) for row in data["rows"]):
        return None
    try:
        return Table(tuple(map(str, data["columns"])), tuple(tuple(map(str, row)) for row in data["rows"]))
    except ValueError:
        return None


def table_in(text: str) -> Table | None:
    """The first Markdown table of a text; None if there is none."""
    lines = [line.strip() for line in text.splitlines()]
    for number in range(1, len(lines)):
        if _RULE.fullmatch(lines[number]) and "|" in lines[number - 1]:
            body = []
            for line in lines[number + 1 :]:
                if "|" not in line:
                    break
                body.append(_cells(line))
            return table_of({"columns": list(_cells(lines[number - 1])), "rows": [list(row) for row in body]})
    return None


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def table_exchanges(table: Table, kinds: tuple[Kind, ...], choose: random.Random) -> Iterator[tuple[Kind, str, str]]:
    """Kind, question and answer, endless, at random; what has no one answer is left out."""
    columns = list(range(1, len(table.columns)))
    usable = [kind for kind in kinds if kind == "lookup" or any(table.numbers(column) for column in columns)]
    while usable:
        kind = choose.choice(usable)
        found = _ASKED[kind](table, choose.choice(columns), choose)
        yield (kind, *found) if found is not None else (kind, "", "")


def _lookup(table: Table, column: int, choose: random.Random) -> tuple[str, str] | None:
    row = choose.choice(table.rows)
    return (f"What is the {table.columns[column]} of {row[0]}?", row[column]) if row[column] else None


def _extreme(word: str, best: Callable[[list[Decimal]], Decimal]) -> Callable[..., tuple[str, str] | None]:
    def ask(table: Table, column: int, choose: random.Random) -> tuple[str, str] | None:
        table = table.own
        values = table.numbers(column)
        if values is None or values.count(best(values)) != 1 or len(values) < 2:
            return None
        question = f"Which {table.columns[0]} has the {word} {table.columns[column]}?"
        return question, table.rows[values.index(best(values))][0]

    return ask


def _difference(table: Table, column: int, choose: random.Random) -> tuple[str, str] | None:
    values = table.numbers(column)
    if values is None or len(values) < 2:
        return None
    first, second = choose.sample(range(len(values)), 2)
    if values[first] < values[second]:
        first, second = second, first
    apart = values[first] - values[second]
    question = f"By how much is the {table.columns[column]} of {table.rows[first][0]} larger than that of "
    return (question + f"{table.rows[second][0]}?", _plain(apart)) if apart else None


def _total(table: Table, column: int, choose: random.Random) -> tuple[str, str] | None:
    values = table.own.numbers(column)
    if values is None or len(values) < 2:
        return None
    question = f"What is the sum of {table.columns[column]} over all rows{_but(table)}?"
    return question, _plain(sum(values, Decimal(0)))


def _above(table: Table, column: int, choose: random.Random) -> tuple[str, str] | None:
    values = table.own.numbers(column)
    if values is None or len(values) < 3:
        return None
    border = choose.choice(values)
    question = f"How many rows{_but(table)} have a {table.columns[column]} above {_plain(border)}?"
    return question, str(sum(one > border for one in values))


def _but(table: Table) -> str:
    return f" but {' and '.join(table.summary)}" if table.summary else ""


def _plain(value: Decimal) -> str:
    return f"{value:f}"


_ASKED: dict[Kind, Callable[..., tuple[str, str] | None]] = {
    "lookup": _lookup, "largest": _extreme("largest", max), "smallest": _extreme("smallest", min),
    "difference": _difference, "total": _total, "above": _above,
}  # fmt: skip
