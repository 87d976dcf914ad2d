"""Text for terminals and logs: what is printed fits ``WIDTH`` columns, wherever it goes to.

Errors are not folded, and neither are paths, commands to copy and lines of YAML: each stays a line of its own, to be
searched for and pasted.
"""

import textwrap
from collections.abc import Iterable, Iterator, Sequence

WIDTH = 80


def folded(text: str, indent: str = "  ") -> str:
    """``text`` with its lines broken at spaces, what is broken off under ``indent``; no word is cut."""
    fold = textwrap.TextWrapper(WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join("\n".join(fold.wrap(line)) for line in text.splitlines())


def in_line(fields: Iterable[str], indent: str = "    ") -> str:
    """``fields`` with two spaces between them, on as few lines as hold them; none is divided."""
    lines: list[str] = []
    for field in fields:
        if lines and len(lines[-1]) + 2 + len(field) <= WIDTH:
            lines[-1] += f"  {field}"
        else:
            lines.append(indent * bool(lines) + field)
    return "\n".join(lines)


def stacked(header: Sequence[str], rows: Sequence[Sequence[str]], borders: int, keep: int) -> Iterator[list[int]]:
    """Which columns of a table go beside each other: the first ``keep`` in each part, the others in their order.

    borders: characters that a column takes beside its text; the whole has one more.
    """
    widths = [max(len(line[column]) for line in [header, *rows]) + borders for column in range(len(header))]
    first = list(range(keep))
    part, taken = first[:], sum(widths[:keep]) + 1
    for column in range(keep, len(header)):
        if len(part) > keep and taken + widths[column] > WIDTH:
            yield part
            part, taken = first[:], sum(widths[:keep]) + 1
        part.append(column)
        taken += widths[column]
    yield part
