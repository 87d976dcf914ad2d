"""How far something is: a bar on a terminal, elsewhere a plain line now and then, nothing where quiet was asked for.

Files and the logs of a scheduler keep every character that is written, so nothing there may be drawn over: no carriage
return, no line more often than every half minute, none at all of what takes less. Whether to be quiet is said once, by
the command line, around the whole verb (``quiet``); what computes need not hand it down.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
SECONDS_BEFORE_BAR = 3.0
_WITH_TOTAL = "{desc}: {n_fmt} of {total_fmt}{unit}, {percentage:.0f} %, {elapsed} passed, {remaining} left{postfix}"
_WITHOUT_TOTAL = "{desc}: {n_fmt}{unit}, {elapsed} passed, {rate_fmt}{postfix}"
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_verbose: ContextVar[bool] = ContextVar("verbose", default=False)


@contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Within it no progress is shown, if that is ``wanted``."""
    token = _quiet.set(wanted)
    try:
        yield
    finally:
        _quiet.reset(token)


@contextmanager
def verbose(wanted: bool = True) -> Iterator[None]:
    """Within it lines say all that there is to say, if that is ``wanted``."""
    token = _verbose.set(wanted)
    try:
        yield
    finally:
        _verbose.reset(token)


def is_verbose() -> bool:
    """Whether lines should hold what is left out otherwise."""
    return _verbose.get()


def is_quiet() -> bool:
    """Whether lines that only say how far something is should be left out."""
    return _quiet.get()


class Progress(tqdm):
    """tqdm's bar on a terminal, lines elsewhere; used as tqdm is.

    title: what is being done. total: of units, None where it is not known. unit: as it is written behind a number; "B"
    counts bytes in powers of a thousand. shown: False on processes that are not the one that speaks.
    """

    def __init__(
        self,
        title: str,
        iterable: Iterable[Any] | None = None,
        *,
        total: float | None = None,
        unit: str,
        initial: int = 0,
        shown: bool = True,
    ) -> None:
        self.in_lines, self.said = not sys.stderr.isatty(), -1.0
        pace: dict[str, Any] = {"delay": SECONDS_BEFORE_BAR, "mininterval": 0.5}
        if self.in_lines:  # miniters: tqdm's watching thread would draw in between
            pace = {"delay": SECONDS_BETWEEN_LINES, "mininterval": SECONDS_BETWEEN_LINES, "miniters": 1}
        super().__init__(
            iterable,
            desc=title,
            total=total,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B",
            initial=initial,
            leave=False,
            disable=not shown or is_quiet(),
            **pace,
        )
        if self.in_lines and not self.disable:
            self.bar_format = _WITH_TOTAL if self.total else _WITHOUT_TOTAL

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:  # a bool, which its stub denies
        """Draw the bar, or write a line; tqdm calls it when it is time, and once more at the end if it was before."""
        if not self.in_lines:
            return super().display(msg, pos)
        if self.n != self.said:  # the last one may have been the end already
            print(self, file=sys.stderr, flush=True)
        self.said = self.n
        return False  # there is nothing to draw over

    def say(self, line: str) -> None:
        """A line on standard output, above the bar."""
        if self.in_lines or self.disable:
            print(line, flush=True)
        else:
            self.write(line)
