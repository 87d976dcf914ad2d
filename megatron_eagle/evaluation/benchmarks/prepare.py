"""A benchmark made ready to be asked: its entries, prompts of those that can be, and their tiles when they are next."""

from collections.abc import Sequence
from pathlib import Path

from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.errors import BrokenSample, UserError
from megatron_eagle.evaluation.benchmarks.entry import Entry
from megatron_eagle.evaluation.benchmarks.files import PictureFile
from megatron_eagle.evaluation.benchmarks.locate import Request
from megatron_eagle.evaluation.prompt import Prompt, prompt_of
from megatron_eagle.parallel.agreement import on_rank_zero


def read_entries(request: Request, pictures: Path, limit: int | None) -> tuple[list[Entry], tuple[str, ...]]:
    """(the first ``limit`` entries, what to say of them) as rank 0 reads them, on every process.

    pictures: the file where its pictures lie while it is asked, which every process must see. Raises UserError, on
    every process, if a file cannot be read.
    """

    def read() -> tuple[list[Entry], tuple[str, ...]]:
        with PictureFile(pictures) as file:
            return request.read(file)

    try:
        entries, notes = on_rank_zero(read)
    except (UserError, OSError) as error:
        raise UserError(f"{request.benchmark.name}: {error}") from None
    return limited(entries, notes, limit)


def limited(entries: list[Entry], notes: tuple[str, ...], limit: int | None) -> tuple[list[Entry], tuple[str, ...]]:
    """The first ``limit`` entries of the split that counts, and what to say of it; all if there are no more."""
    counted = [entry for entry in entries if entry.counts]
    if limit is None or limit >= len(counted):
        return entries, notes
    return counted[:limit], (*notes, f"the first {limit} of {len(counted)} questions")


def outlines(entries: Sequence[Entry], planner: VisualPlanner) -> tuple[list[Prompt], list[Entry]]:
    """(what can be asked as far as headers say, the entries with the others broken)"""
    prompts, checked = [], []
    for entry in entries:
        if entry.question is not None and entry.counts:
            try:
                prompts.append(prompt_of(entry.stored(), planner, tiles=False))
            except BrokenSample as reason:
                entry = entry.broken(str(reason))
        checked.append(entry)
    return prompts, checked


class Filler:
    """Gives a prompt its tiles, from the entry of its name; raises BrokenSample."""

    def __init__(self, entries: Sequence[Entry], planner: VisualPlanner) -> None:
        self._entries, self._planner = {entry.id: entry for entry in entries}, planner

    def __call__(self, prompt: Prompt) -> Prompt:
        return prompt_of(self._entries[prompt.identity].stored(), self._planner)
